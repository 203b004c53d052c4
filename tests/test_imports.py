"""Import rules: models ← measure ← optimizations ← notebooks, and the floors inside each of them.

Report and suite never import torch.
"""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "lib"
MAY = {
    "models": {"models"},
    "measure": {"models", "measure"},
    "optimizations": {"models", "measure", "optimizations"},
    # Measure defines the record's measurements, in modules that do not import torch.
    "report": {"report", "measure"},
    "suite": {"suite", "report", "models"},
}
# Inside an area: a module may import its own room on the same floor, and everything below.
# Rooms on one floor do not import each other.
FLOORS = {
    "models": (
        {"sources", "yaml_file", "dimensions"}, {"parameters"}, {"structure", "tokenizing"},
        {"checkpoints", "calibration", "decoding"}, {"tasks"}, {"offload"}, {"loading"}, {"proxies"},
    ),
    "measure": ({"metrics"}, {"timing"}, {"roofline"}, {"trackers", "quality"}, {"compare", "serving"}),
    "report": ({"text"}, {"records"}, {"analysis", "figures"}, {"tables"}, {"pages", "choosing", "earlier_runs"}),
    "suite": ({"bootstrap"}, {"plan"}, {"store"}, {"run"}, {"cluster", "lab"}, {"build"}, {"cli"}),
}  # fmt: skip
EVERYWHERE = {"errors", "memory_limits", "cpu_limits", "files", "forked_process"}
ABOUT_OTHERS = {"modular_components", "automl_components", "continuous_nas", "pre_vs_post_optimization"}
HEAVY = {"torch", "transformers", "accelerate", "safetensors", "optuna"}
FILES = sorted(LIB.rglob("*.py"))
MOST_MODULES = 12


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


def _floor(area: str, room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS[area]) if room in rooms]
    assert floors, f"{area} has no room {room}"
    return floors[0]


def _room(parts: tuple[str, ...]) -> str:
    return Path(parts[1]).stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIB).as_posix())
def test_floors_inside_an_area(path):
    parts = path.relative_to(LIB).parts
    if parts[0] not in FLOORS or path.name == "__init__.py":
        return
    area, room = parts[0], _room(parts)
    for name in _imports(path):
        other = name.split(".")
        if other[:2] == ["lib", area] and len(other) > 2 and other[2] != room:
            assert _floor(area, other[2]) < _floor(area, room), f"{area}/{room} must not import {name}"


@pytest.mark.parametrize("area", sorted(MAY))
def test_no_import_cycles_even_through_late_imports(area):
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (LIB / area).rglob("*.py")}
    graph = {name: {module for module in _modules(path) if module in known} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def _modules(path: Path) -> set[str]:
    """Return every name that an import in the file may refer to: `from a import b` is `a`, or `a.b`."""
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return {part for name in _imports(path) for part in (name, name.rpartition(".")[0])} - {own}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.is_relative_to(LIB / "optimizations") and path.name != "__init__.py"],
    ids=lambda path: path.relative_to(LIB / "optimizations").as_posix(),
)
def test_optimizations_stand_alone(path):
    own = Path(path.relative_to(LIB / "optimizations").parts[0]).stem
    others = {name.split(".")[2] for name in _imports(path) if name.startswith("lib.optimizations.")} - {own, "common"}
    if own not in ABOUT_OTHERS:
        assert not others, f"{own} must not import {sorted(others)}"


@pytest.mark.parametrize("area", ["lib", "tests"])
def test_no_folder_holds_more_than_twelve_modules(area):
    counts = Counter(path.parent for path in (ROOT / area).rglob("*.py") if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MOST_MODULES} == {}


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_packages_contain_only_a_docstring(path):
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


def test_setup_needs_only_the_standard_library():
    more = _loaded("from lib.suite import bootstrap") - _loaded("")
    assert more <= set(sys.stdlib_module_names) | {"lib"}


def test_no_two_classes_share_a_name():
    names = [
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name, number in Counter(names).items() if number > 1) == []
