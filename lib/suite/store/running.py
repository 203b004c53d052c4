"""The folders in which the runs of a build write until they are finished, and the removal of leftovers."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.files import RESULTS
from lib.suite.store.result_folder import Folder


@contextlib.contextmanager
def named(folder: Folder) -> Iterator[None]:
    """Set WORKBENCH_RESULTS for the runs inside the block, so that they find the files that they share."""
    before = os.environ.get(RESULTS)
    os.environ[RESULTS] = os.path.dirname(os.path.abspath(folder.path))  # it may be a link to another disk
    try:
        yield
    finally:
        os.environ.pop(RESULTS, None)
        if before is not None:
            os.environ[RESULTS] = before


@contextlib.contextmanager
def temporary(folder: Folder) -> Iterator[Path]:
    """Create a folder for the notebooks' temporary files, and store its path, so that the next build can remove it."""
    path = Path(tempfile.mkdtemp(prefix="workbench-"))
    folder.running.mkdir(parents=True, exist_ok=True)
    (folder.running / "temporary").write_text(str(path), encoding="utf-8")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(folder.running, ignore_errors=True)


def tidy(folder: Folder) -> None:
    """Remove the leftovers of a build that was killed. Call only while holding the lock."""
    with contextlib.suppress(OSError):
        path = Path((folder.running / "temporary").read_text(encoding="utf-8"))
        if path.name.startswith("workbench-"):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder.running, ignore_errors=True)
    for part in folder.path.glob(".*.part"):
        if part.is_dir():  # the pictures of a page
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
