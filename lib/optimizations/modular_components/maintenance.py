"""Measure what one more optimization costs a maintainer: add one to a temporary copy of the project and count the files
and lines. A separate process then reports whether the copy lists the new part, orders it among the others and runs it.
Nothing in the project itself is changed.

The added optimization is a simple one: every weight is rounded to a few significant bits.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.measure.timing import children

ROOT = Path(__file__).resolve().parents[3]
STEM = "weight_rounding"
TIME_LIMIT_SECONDS = 300.0
LISTING = "lib.suite.plan.plan:optimizations"  # run in the copy: the optimizations that its commands list
MODULE = '''"""Weight rounding: the decoder's matrices keep a few bits of each weight, stored as wide as before."""

import copy

import torch

from lib.models.calibration.second_moments import matrices

SEARCH_SPACE = {"bits": {"type": "int", "range": (1, 23), "default": 6, "help": "significant bits kept of each weight"}}

COMPOSES = {"touches": ("weights",), "needs": ("dense matrices",), "invalidates": ("statistics",), "trial": {}}


def applies_to(model):
    """Return None if any matrix is stored dense, else the reason why the method does not apply."""
    return None if matrices(model) else "every matrix of the decoder is stored sparse"


def apply(model, calibration, *, bits=6):
    """Return a copy of `model` whose dense matrices are rounded to `bits` significant bits."""
    rounded = copy.deepcopy(model)
    for matrix in matrices(rounded):
        fraction, exponent = torch.frexp(matrix.weight.data.float())
        matrix.weight.data = torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent).to(matrix.weight.dtype)
    return rounded
'''
# The cell specific to this optimization; the rest of its template is the same as any other.
CELL = f"""import sys

sys.path.insert(0, "..")

from lib.measure.compare import costs, speed
from lib.models import loading
from lib.models.tasks import tasks
from lib.optimizations import {STEM}
from lib.report.records import record

loaded = loading.load(model, scale, device=device, random_weights=random_weights, seed=seed)
optimized = {STEM}.apply(loaded.model, None, bits=bits)
prompt = tasks.text_windows(loaded, "final", 1, 64, seed)
compared = speed.compare(loaded.model, optimized, prompt, effort, names=("prefill",), seed=seed)
resources = costs.resources(loaded.model, optimized, tokens=64)
record.glue(record.build("{STEM}", model, scale, effort, {{"bits": bits}}, [*compared.measurements, *resources]))"""
PARAMETERS = """model: str = "qwen3-4b-instruct-2507"  # a file in parameters/
scale: str = "proxy"  # one of proxy|slice|full
effort: str = "quick"  # one of preview|quick|standard|thorough
device: str = "cpu"  # where both arms run
checkpoints: str = ""  # folder of checkpoints, for scale full
random_weights: bool = False  # scale full without a checkpoint
seed: int = 0  # of data and block order
bits: int = 6  # significant bits kept of each weight, in [1, 23]"""


@dataclass(frozen=True)
class Addition:
    """The files and lines of the addition, and the answers of the extended copy."""

    files_added: list[str]
    files_changed: list[str]
    lines: int
    parts: list[str]
    order: list[str]
    state: str
    reason: str | None
    listed: bool

    @property
    def touched(self) -> int:
        return len(self.files_added) + len(self.files_changed)


def notebook() -> dict:
    """Return the template of the added optimization, as a notebook's JSON."""
    prose = {"cell_type": "markdown", "metadata": {}, "source": "# Weight rounding"}
    code: dict[str, object] = {
        "cell_type": "code",
        "metadata": {"tags": ["parameters"]},
        "outputs": [],
        "execution_count": None,
    }
    cells = [prose, code | {"source": PARAMETERS}, code | {"metadata": {"tags": ["record"]}, "source": CELL}]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}


def copy_of_project(place: Path) -> Path:
    """Copy the files that a build needs to the new folder `place` and return it."""
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("lib", "notebooks", "parameters"):
        shutil.copytree(ROOT / name, place / name, ignore=leave)
    for name in ("build.py", "requirements.txt"):
        shutil.copy(ROOT / name, place / name)
    return place


def add(place: Path) -> tuple[list[str], list[str], int]:
    """Add the optimization to the copy at `place`; return files added, files changed, and lines written."""
    before = _fingerprints(place)
    (place / "lib" / "optimizations" / f"{STEM}.py").write_text(MODULE, encoding="utf-8")
    (place / "notebooks" / f"{STEM}.ipynb").write_text(json.dumps(notebook(), indent=1), encoding="utf-8")
    after = _fingerprints(place)
    added = [name for name in after if name not in before]
    changed = [name for name in before if after.get(name) != before[name]]
    lines = sum(len([line for line in text.splitlines() if line.strip()]) for text in (MODULE, PARAMETERS, CELL))
    return added, changed, lines


def measure(model: str) -> Addition:
    """Add the optimization to a temporary copy, run it there on the proxy model of `model`, and return the counts.

    Raises RuntimeError, with the reason, if the copy fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = copy_of_project(Path(folder) / "project")
        added, changed, lines = add(place)
        job = {"place": str(place), "model": model, "stem": STEM, "listing": LISTING, "arms": []}
        (answers,) = children.run(__name__, [job], limit_seconds=TIME_LIMIT_SECONDS)
    if "failed" in answers:
        raise RuntimeError(f"the copy with {STEM} failed: {answers['failed']}")
    return Addition(added, changed, lines, **answers)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of a copy of the project at `place`, whose code replaces this project's in a child process:
    the parts that apply to a model, their order, the outcome of the part `stem`, and whether `listing`
    ("module:function") names it.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
        del sys.modules[name]
    sys.path.insert(0, job["place"])
    import lib
    from lib.models import loading
    from lib.models.structure.beyond_files import named
    from lib.models.tasks import tasks
    from lib.optimizations.common.recipe import RecipeStep
    from lib.optimizations.modular_components import attempts
    from lib.optimizations.modular_components import method as composing

    assert str(lib.__file__).startswith(job["place"]), "the copy's code is not in use"
    loaded = loading.load(job["model"])
    sample_BT = tasks.text_windows(loaded, "search", 2, 64)
    fitting, _ = composing.applicable(loaded.model)
    steps, _ = composing.orderable([RecipeStep(optimization=stem) for stem in fitting], loaded.model)
    attempt = attempts.attempt(loaded.model, [], [RecipeStep(optimization=job["stem"])], sample_BT)
    answers: dict[str, Any] = {"parts": fitting, "order": [step.optimization for step in steps]}
    answers |= {"state": attempt.state, "reason": attempt.reason}
    return answers | {"listed": job["stem"] in named(job["listing"])()}


def _fingerprints(place: Path) -> dict[str, str]:
    files = [path for name in ("lib", "notebooks", "parameters") for path in sorted((place / name).rglob("*"))]
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


def accepted(grown: Addition) -> bool:
    """Return whether the copy lists the new part and no existing file had to be changed."""
    return not grown.files_changed and grown.listed and STEM in grown.parts
