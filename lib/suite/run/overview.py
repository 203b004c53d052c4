"""The overview notebook: executed last, over all records of a folder, into `overview.ipynb`, `.html` and `.md`.

It is not an optimization, has no record, and runs again only if a record or the code it uses has changed.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.files import write_atomically
from lib.models.parameters import SCALES
from lib.suite.plan import cache_key, dependencies
from lib.suite.plan import template as templates
from lib.suite.plan.plan import OVERVIEW
from lib.suite.run.fork_server import ForkServer
from lib.suite.store import result_folder
from lib.suite.store.result_folder import Folder

if TYPE_CHECKING:
    from lib.suite.run.kernel_process import Worker

EFFORT = "quick"  # sets its time limits
POLL_SECONDS = 0.1
RENDER_SECONDS = 120.0


def up_to_date(folder: Folder, path: Path) -> bool:
    """Return whether the overview in the folder was computed from the present records by the present code."""
    pages = [folder.of(OVERVIEW, ending) for ending in (".ipynb", ".html", ".md")]
    if not all(page.is_file() for page in pages):
        return False
    try:
        return json.loads(folder.parts(OVERVIEW).read_text(encoding="utf-8")) == {"key": _key(folder, path)}
    except (OSError, ValueError):
        return False


def _key(folder: Folder, path: Path) -> str:
    hashes = cache_key.Hashes()
    template = templates.read(path)
    reached = {str(module): hashes.of(module) for module in dependencies.reached(template)}
    # The overview also shows the records of the other scales, whose folders are next to this one.
    paths = {path for scale in SCALES for path in (folder.path.parent / scale).glob("*--*.json")}
    paths |= set(folder.path.glob("*--*.json"))
    existing = (path for path in sorted(paths) if path.is_file())  # reading a pipe would block, a link may be broken
    records = {f"{path.parent.name}/{path.name}": hashes.of(path) for path in existing}
    return cache_key.digest([template.cells, reached, records])


def execute(
    folder: Folder, path: Path, cores: Sequence[int], temporary: Path, server: ForkServer | None = None
) -> str | None:
    """Execute the overview, in a process forked by `server` if there is one, and render it; return None, or the fault
    in one line.
    """
    from lib.suite.run import kernel_process, settle  # they load numpy, which is slow and often not needed

    template = templates.read(path)
    made_from = _key(folder, path)
    declared = {"results": str(folder.path), "folder": str(folder.path), "scale": folder.path.name}
    task = kernel_process.Task(
        name=path.name,
        notebook=path,
        parameters={name: value for name, value in declared.items() if name in template.parameters},
        folder=folder.running / OVERVIEW,
        temporary=temporary / OVERVIEW,
        cores=tuple(cores),
        jobs=1,
        effort=EFFORT,
        glued=False,
    )
    worker = kernel_process.start(task, server)
    try:
        while (outcome := kernel_process.poll(worker)) is None:
            time.sleep(POLL_SECONDS)
        if outcome.error:
            if task.output.is_file():
                result_folder.place(task.output, folder.failed(OVERVIEW))
            return f"{OVERVIEW}: {settle.fault(template, outcome, outcome.error)} (notebook: {folder.failed(OVERVIEW)})"
        result_folder.place(task.output, folder.of(OVERVIEW, ".ipynb"))
        fault = _render(folder, worker)
    finally:
        kernel_process.finish(worker)
        result_folder.place(task.log, folder.log(OVERVIEW))
    if not fault:
        write_atomically(folder.parts(OVERVIEW), json.dumps({"key": made_from}) + "\n")
    return fault


def _render(folder: Folder, worker: "Worker") -> str | None:
    """Render the pages in the child, which has the libraries loaded; return None, or the fault in one line."""
    from lib.suite.run import kernel_process
    from lib.suite.store import render

    pairs = result_folder.present(folder)
    sent = time.monotonic()
    if kernel_process.send(worker, {"render": OVERVIEW, "folder": str(folder.path), "neighbours": pairs}):
        while worker.rendered is None and not worker.closed and time.monotonic() - sent < RENDER_SECONDS:
            time.sleep(POLL_SECONDS)
            kernel_process.poll(worker)
    return worker.rendered["error"] if worker.rendered else render.render(folder.path, OVERVIEW, pairs)
