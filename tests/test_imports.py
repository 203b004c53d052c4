"""What may import what: models ← measure ← optimizations ← notebooks; report and suite never reach torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "lib"
MAY = {
    "models": {"models"},
    "measure": {"models", "measure"},
    "optimizations": {"models", "measure", "optimizations"},
    # The record's measurements are defined by measure, whose modules of that kind know no torch.
    "report": {"report", "measure"},
    "suite": {"suite", "report", "models"},
}
EVERYWHERE = {"errors", "memory_limits", "files"}
ABOUT_OTHERS = {"modular_components", "automl_components", "continuous_nas", "pre_vs_post_optimization"}
HEAVY = {"torch", "transformers", "accelerate", "safetensors", "optuna"}
FILES = sorted(LIB.rglob("*.py"))


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; name the module in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIB).as_posix())
def test_layers(path):
    area = path.relative_to(LIB).parts[0]
    if area not in MAY:
        assert path.parent == LIB, f"{area} is no part of the design"
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "lib" and len(parts) > 1 and parts[1] not in EVERYWHERE:
            assert parts[1] in MAY[area], f"{area} must not import {name}"
        if area in ("report", "suite"):
            assert parts[0] not in HEAVY, f"{area} must not import {parts[0]}"
        assert parts[0] != "transformers" or area in ("models", "optimizations"), "transformers is below measure"
        assert parts[0] != "scrapbook" or path == LIB / "report" / "records" / "record.py", (
            "only record.py knows scrapbook"
        )


@pytest.mark.parametrize("path", sorted((LIB / "optimizations").rglob("*.py")), ids=lambda path: path.stem)
def test_optimizations_stand_alone(path):
    others = {name.split(".")[2] for name in _imports(path) if name.startswith("lib.optimizations.")}
    if path.stem not in ABOUT_OTHERS:
        assert not others, f"{path.stem} must not import {sorted(others)}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_packages_hold_nothing_but_a_docstring(path):
    assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


def _loaded(program: str) -> set[str]:
    """Return the top-level names of all modules that a program loads in a fresh process."""
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ended.stdout.splitlines()[-1].split())


def test_report_and_suite_load_no_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for area in ("report", "suite")
        for path in sorted((LIB / area).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert not _loaded("\n".join(f"import {name}" for name in modules)) & HEAVY


def test_listing_loads_next_to_nothing():
    loaded = _loaded("from lib.suite.cli import command\ncommand.main(['list'])")
    assert not loaded & (HEAVY | {"papermill", "nbformat", "nbconvert", "scrapbook", "numpy", "scipy", "pandas"})


def test_set_up_needs_the_standard_library_alone():
    more = _loaded("from lib.suite import bootstrap") - _loaded("")
    assert more <= set(sys.stdlib_module_names) | {"lib"}
