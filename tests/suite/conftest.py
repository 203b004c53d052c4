"""One small build, shared by the tests that only inspect its output."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import workbench


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return a copy of the project after a build with one working template and others that fail in different ways."""
    root = workbench.project(tmp_path_factory.mktemp("built") / "project")
    folder = root / "notebooks"
    workbench.notebook(folder / "well.ipynb", [("Set-up", "x = ratio"), ("Record", workbench.RECORD)])
    workbench.notebook(folder / "raises.ipynb", [("Fine", "x = 1"), ("Sums", "# a comment\ny = x / 0\nprint(y)")])
    workbench.notebook(folder / "hangs.ipynb", [("Endless", "import time\nwhile True:\n    time.sleep(0.1)")])
    workbench.notebook(folder / "killed.ipynb", [("Gone", "import os\nos.kill(os.getpid(), 9)")])
    workbench.notebook(folder / "silent.ipynb", [("Nothing", "x = 1")])
    refused = "from lib.errors import NotApplicable\n\nraise NotApplicable('this model has no experts')"
    workbench.notebook(folder / "absent.ipynb", [("Model", refused), ("Record", workbench.RECORD)])
    ended = workbench.build(root, "run", "--model", "alpha-1.5", WORKBENCH_CELL_SECONDS="8", **workbench.FORKED)
    return root, ended


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project with one working template."""
    root = workbench.project(tmp_path / "project")
    workbench.notebook(root / "notebooks" / "well.ipynb", [("Set-up", "x = ratio"), ("Record", workbench.RECORD)])
    return root
