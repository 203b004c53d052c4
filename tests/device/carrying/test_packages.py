"""Packages imported on a bare machine are carried along or listed as required: all others are refused here while the
notebooks' own imports run.
"""

import json
import subprocess
import sys

from tests.device import schedule
from tests.device.carrying import wheels
from tests.device.processes import ROOT

# Packages of requirements.txt that a bare machine lacks and that are not carried along.
ABSENT = (
    "papermill", "nbconvert", "nbformat", "nbclient", "ipykernel", "ipywidgets", "scrapbook", "optuna", "distributed",
    "nbval", "jupyterlab", "playwright",
)  # fmt: skip


def test_device_notebooks_import_only_available_packages():
    assert not set(ABSENT) & set(wheels.NEEDED)
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({ABSENT!r}))  # None refuses an import"]
    for name in schedule.OPTIMIZATIONS:
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if "setup" in cell["metadata"].get("tags", ()) and cell["cell_type"] == "code":
                lines.append("".join(cell["source"]))
    lines.append("import tests.device.worker, tests.device.full_size, lib.suite.plan.plan")
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-1500:]
