"""What a session imports on a bare machine is what is carried along or named as needed: everything else is refused here
while the notebooks' own imports run.
"""

import json
import subprocess
import sys

from tests.device import schedule
from tests.device.carrying import wheels
from tests.device.processes import ROOT

# Packages of requirements.txt that a bare machine does not have and that are not carried.
ABSENT = (
    "papermill", "nbconvert", "nbformat", "nbclient", "ipykernel", "ipywidgets", "scrapbook", "optuna", "distributed",
    "nbval", "jupyterlab", "playwright",
)  # fmt: skip


def test_the_notebooks_of_a_session_import_nothing_that_is_not_carried():
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
