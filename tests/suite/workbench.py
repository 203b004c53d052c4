"""A temporary copy of the project with tiny templates that need no torch, which the suite tests build.

The copy has its own `lib`, parameter files and proxy models (safetensors files without a tensor), so that a test may
change anything in it.
"""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("alpha-1.5", "beta-2")
COMMON = """model: str = "alpha-1.5"  # the model
scale: str = "proxy"  # one of proxy|slice|full
effort: str = "quick"  # one of preview|quick|standard|thorough
device: str = "cpu"  # one of cpu|cuda
checkpoints: str = ""  # folder of checkpoints
random_weights: bool = False  # whether the weights are random
seed: int = 0  # the seed
ratio: float = 0.25  # share of channels removed, in [0, 1)"""
# The output of lib.report.records.record.glue, without the seconds of importing scrapbook.
RECORD = """from IPython.display import display
from lib.errors import UserError

found = dict(schema=1, optimization=NAME, model=model, scale=scale, effort=effort)
found |= dict(status="not_applicable", reason="tiny")
scrap = dict(name="record", data=found, encoder="json", version=1)
display(
    {"application/scrapbook.scrap.json+json": scrap},
    metadata={"scrapbook": dict(name="record", data=True, display=False)},
    raw=True,
)"""


def notebook(path: Path, cells: list[tuple[str, str]], parameters: str | None = COMMON) -> Path:
    """Write a template: `parameters` in a tagged cell, then `cells` as (heading, code)."""
    stored_cells = [_cell("markdown", f"# {path.stem}")]
    if parameters is not None:
        stored_cells.append(_cell("code", parameters, "parameters"))
    for heading, code in cells:
        stored_cells += [_cell("markdown", f"## {heading}"), _cell("code", code.replace("NAME", repr(path.stem)))]
    content = {
        "cells": stored_cells,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def _cell(kind: str, source: str, *tags: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {"tags": list(tags)}, "source": source}
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def checkpoint(folder: Path, architecture: str = "qwen3") -> Path:
    """Write a complete checkpoint folder without a tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": architecture}), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def model_file(root: Path, name: str, optimizations: str = "{}") -> Path:
    """Write a parameter file and its proxy model."""
    path = root / "parameters" / f"{name}.yaml"
    path.write_text(
        f"name: {name}\ncheckpoint: somebody/{name}\narchitecture: qwen3\nfull: {{num_hidden_layers: 4}}\n"
        "slice: {layers: 2}\nproxy:\n  config: {num_hidden_layers: 2}\n  training: {steps: 1}\n"
        f"tasks: [retrieval]\noptimizations: {optimizations}\n",
        encoding="utf-8",
    )
    if not (root / "parameters" / "proxies" / name).exists():
        checkpoint(root / "parameters" / "proxies" / name)
    return path


def project(root: Path) -> Path:
    """Copy the project to `root` without its templates and models; return the copy."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "lib", root / "lib")  # with its compiled files, which stay valid
    for name in ("build.py", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    _import_little(root / STARTS_SERVER)
    for name in ("notebooks", "parameters"):
        (root / name).mkdir()
    for name in MODELS:
        model_file(root, name)
    return root


def _import_little(path: Path) -> None:
    """Make a copy's fork server import what its templates need, which is neither torch nor a model: a build of a few
    runs is then faster with the server than without.
    """
    text = path.read_text(encoding="utf-8")
    before = re.search(r"^    modules = \[\*LIBRARIES, .*\]$", text, re.MULTILINE)
    assert before, "the server is started in another way now"
    path.write_text(text.replace(before[0], f"    modules = {list(NEEDED)}"), encoding="utf-8")


def import_all(root: Path) -> None:
    """Make a copy's fork server import what the project's does."""
    shutil.copy2(ROOT / STARTS_SERVER, root / STARTS_SERVER)


STARTS_SERVER = Path("lib", "suite", "run", "kernel_process.py")
NEEDED = ("papermill", "papermill.engines", "nbclient", "nbconvert", "ipykernel.kernelapp", "ipykernel.ipkernel")
FORKED = {"WORKBENCH_FORK_SERVER": ""}
NOT_FORKED = {"WORKBENCH_FORK_SERVER": "none"}


def surroundings(**more: str) -> dict[str, str]:
    """Return the environment of a build, with none of our variables but the cache of compiled files."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WORKBENCH_", "PYTEST_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | FORKED | more


def build(root: Path, *arguments: str, timeout: float = 180, **more: str) -> subprocess.CompletedProcess:
    """Run a copy's `build.py` with this interpreter; return the completed process."""
    return run(root, str(root / "build.py"), *arguments, timeout=timeout, **more)


def run(root: Path, *arguments: str, timeout: float = 180, **more: str) -> subprocess.CompletedProcess:
    """Run this interpreter in a copy; return the completed process."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=surroundings(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def begin(root: Path, *arguments: str, **more: str) -> subprocess.Popen:
    """Start a copy's `build.py` in the background."""
    return subprocess.Popen(
        [sys.executable, str(root / "build.py"), *arguments],
        cwd=root,
        env=surroundings(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_ctrl_c if os.name == "posix" else None,
    )


def heed_ctrl_c() -> None:
    """Restore Ctrl-C in a child: it is ignored when the tests run in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Any, seconds: float = 180) -> Any:
    """Return the result of `condition()` once it is true. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing within {seconds} s")


def running(root: Path) -> list[int]:
    """Return the processes whose command line or working directory belongs to this copy."""
    import psutil

    pids = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (
                process.cwd().startswith(str(root)) or any(str(root) in word for word in process.cmdline())
            ):
                pids.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return pids


def kill(process: subprocess.Popen, how: int = signal.SIGKILL) -> None:
    """Send a signal to a build and wait for its end."""
    process.send_signal(how)
    process.wait(timeout=30)


def record(root: Path, stem: str, out: str = "executed/proxy") -> dict[str, Any]:
    """Return a record as plain JSON."""
    return json.loads((root / out / f"{stem}.json").read_text(encoding="utf-8"))
