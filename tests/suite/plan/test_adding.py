"""The folder is the registry: a twelfth optimization takes two new files, a fifth model one, and no edits."""

import hashlib
import shutil

import pytest
import workbench

OPTIMIZATION = '''"""Rounds the weights."""

SEARCH_SPACE = {"decimals": (0, 4, 2)}


def applies_to(model):
    """Return None: every model has weights."""
    return None


def apply(model, calibration, decimals=2):
    """Return a copy with rounded weights."""
    import copy

    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.round(decimals=decimals))
    return rounded
'''
CODE = """import sys

sys.path.insert(0, "..")

from lib.measure.metrics import measurement
from lib.models import loading
from lib.optimizations import twelfth
from lib.report.records import record

loaded = loading.load(model, scale, device=device, random_weights=random_weights, seed=seed)
optimized = twelfth.apply(loaded.model, None, decimals)
count = [sum(one.numel() for one in arm.parameters()) for arm in (loaded.model, optimized)]
found = measurement.counted("parameters", "prefill", *count, source="counted")
record.glue(record.build("twelfth", model, scale, effort, {"decimals": decimals}, [found]))"""
MODEL = """name: Fifth
checkpoint: somebody/fifth
architecture: qwen3
full: {hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16,
       intermediate_size: 128, vocab_size: 256}
slice: {layers: 1}
proxy:
  config: {num_hidden_layers: 2}
  training: {steps: 1}
tasks: [retrieval]
optimizations:
  twelfth: {decimals: 1}
"""


def _fingerprints(root):
    files = [path for name in ("lib", "notebooks", "parameters") for path in sorted((root / name).rglob("*"))]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Return a copy of the real tree with one more optimization and model, and its files before the addition."""
    root = tmp_path_factory.mktemp("grown") / "project"
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("lib", "notebooks", "parameters"):
        shutil.copytree(workbench.ROOT / name, root / name, ignore=leave)
    for name in ("build.py", "requirements.txt"):
        shutil.copy(workbench.ROOT / name, root / name)
    before = _fingerprints(root)
    parameters = workbench.COMMON.replace("ratio: float = 0.25  # share of channels removed, in [0, 1)", "")
    parameters += "decimals: int = 2  # kept, in [0, 4]"
    workbench.notebook(root / "notebooks" / "twelfth.ipynb", [("All", CODE)], parameters)
    (root / "lib" / "optimizations" / "twelfth.py").write_text(OPTIMIZATION, encoding="utf-8")
    (root / "parameters" / "fifth.yaml").write_text(MODEL, encoding="utf-8")
    return root, before


def test_both_are_listed(grown):
    root, _ = grown
    lines = workbench.build(root, "list").stdout.splitlines()
    start = lines.index("optimizations:") + 1
    end = next(at for at, line in enumerate(lines) if line.startswith("results:"))
    optimizations = [line.split()[0] for line in lines[start:end]]
    assert any(line.split()[:1] == ["fifth"] for line in lines) and "twelfth" in optimizations
    assert sum("--fifth" in line for line in lines) == len(optimizations)


def test_both_are_built_without_an_edit(grown):
    root, before = grown
    ended = workbench.build(root, "run", "twelfth", "--model", "fifth", "--random-weights", timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = workbench.record(root, "twelfth--fifth")
    assert record["status"] == "ok" and record["parameters"]["decimals"] == 1
    assert record["measurements"][0]["metric"] == "parameters"
    page = (root / "executed/proxy/index.html").read_text(encoding="utf-8")
    assert "twelfth--fifth.html" in page
    after = _fingerprints(root)
    assert {name: after[name] for name in before} == before
    new = {"notebooks/twelfth.ipynb", "lib/optimizations/twelfth.py", "parameters/fifth.yaml"}
    assert set(after) - set(before) == new


def test_the_key_covers_the_new_module(grown):
    root, _ = grown
    path = root / "lib" / "optimizations" / "twelfth.py"
    path.write_text(OPTIMIZATION.replace("every model", "each model"), encoding="utf-8")
    lines = workbench.build(root, "list", "--model", "fifth", "--random-weights").stdout.splitlines()
    [line] = [line for line in lines if "twelfth--fifth" in line]
    assert "code: lib/optimizations/twelfth.py changed" in line
