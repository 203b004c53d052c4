"""The child process of one run: `python -m lib.suite.run.execute`, started by `lib.suite.run.kernel_process` or forked
by `lib.suite.run.fork_server`, never started by a person.

Reads one line of JSON from standard input (what to run), executes the notebook through papermill, reports its progress
as lines of JSON on standard output, and renders the pages on request. When standard input closes, the build has died:
the kernel and all its processes are ended. All other output goes to standard error. It decides nothing: the record is
written by the process that started it.
"""

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from lib.errors import NotApplicable
from lib.report.records import grammars

KERNEL_START_SECONDS = 120
PAPERMILLS = "papermill-error-cell-tag"  # tag of the cells that papermill adds after an error


def main() -> None:
    """Run one notebook, then render its pages on request."""
    grammars.refuse()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries belongs in the log
    commands: queue.Queue = queue.Queue()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    pin(request["cores"])
    try:
        tell(event="end", **_execute(request, tell))
        command = commands.get()
        if command.get("render"):
            tell(event="rendered", **_render(command))
    except BrokenPipeError:
        _end_everything()


def _listen(commands: queue.Queue) -> None:
    """Forward the build's commands. Standard input closes when the build ends, for whatever reason."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    _end_everything()


def _end_everything() -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)


def pin(cores: list[int]) -> None:
    """Pin this process, and with it the kernel, to its own cores if the operating system supports it."""
    process = psutil.Process()
    if cores and hasattr(process, "cpu_affinity"):
        process.cpu_affinity(cores)


def _execute(request: dict, tell: Any) -> dict:
    """Execute the notebook; return `{"error": null or {...}, "record": the glued record or null}`."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    class ReportingEngine(NBClientEngine):
        """Papermill's own engine, which also reports the running cell."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
            _watch(nb_man, tell)
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("reporting", ReportingEngine)
    try:
        papermill.execute_notebook(
            _literal(request["notebook"]),
            _literal(request["output"]),
            parameters=request["parameters"],
            engine_name="reporting",
            kernel_name="python3",
            cwd=request["directory"],
            progress_bar=False,
            start_timeout=KERNEL_START_SECONDS,
            execution_timeout=request["cell_seconds"],
            iopub_timeout=60,
            autosave_cell_every=0,
        )
        error = None
    except PapermillExecutionError as failure:
        error = {"kind": failure.ename, "text": failure.evalue, "raised": True}
    except Exception as failure:  # a dead kernel, a time-out, a full disk: nbclient and papermill each raise their own
        error = {"kind": type(failure).__name__, "text": str(failure), "raised": False}
    _settle(request, error)
    outcome: dict[str, Any] = {"error": error, "record": None}
    if not error and request["glued"]:
        outcome = _glued(Path(request["output"]))
    return outcome


def _literal(path: str) -> str:
    """Return a path with braces escaped, because papermill replaces names in braces by parameters."""
    return path.replace("{", "{{").replace("}", "}}")


def _watch(nb_man: Any, tell: Any) -> None:
    """Make the notebook manager report the start and end of every code cell."""
    start, complete = nb_man.cell_start, nb_man.cell_complete
    began: dict[int | None, float] = {}

    def cell_start(cell: Any, cell_index: int | None = None, **kwargs: Any) -> None:
        if cell.cell_type == "code":
            began[cell_index] = time.monotonic()
            tell(event="cell", index=cell_index)
        start(cell, cell_index=cell_index, **kwargs)

    def cell_complete(cell: Any, cell_index: int | None = None, **kwargs: Any) -> None:
        complete(cell, cell_index=cell_index, **kwargs)
        if cell_index in began:
            tell(event="cell_end", index=cell_index, seconds=round(time.monotonic() - began.pop(cell_index), 3))

    nb_man.cell_start, nb_man.cell_complete = cell_start, cell_complete


def _settle(request: dict, error: dict | None) -> None:
    """Replace temporary paths in the notebook's metadata; for a run that is not applicable, remove the error cells that
    papermill added.
    """
    path = Path(request["output"])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if error and error["kind"] == NotApplicable.__name__:
            content["cells"] = [cell for cell in content["cells"] if PAPERMILLS not in cell["metadata"].get("tags", ())]
        metadata = content["metadata"]["papermill"]
        metadata["input_path"], metadata["output_path"] = f"notebooks/{Path(request['notebook']).name}", request["name"]
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError):
        pass  # the notebook stays as papermill wrote it, or there is none


def _glued(path: Path) -> dict:
    from lib.errors import UserError
    from lib.report.records import record

    try:
        glued = record.from_notebook(path)
    except UserError as error:
        return {"error": {"kind": "record", "text": str(error), "raised": False}, "record": None}
    return {"error": None, "record": record.to_json(glued) if glued else None}


def _render(command: dict) -> dict:
    from lib.suite.store import render, result_folder, site

    folder = Path(command["folder"])
    error = render.render(folder, command["render"], command["neighbours"])
    if command.get("refresh_seconds") is not None:
        site.refresh_index(result_folder.Folder(folder), command["refresh_seconds"])
    return {"error": error}


if __name__ == "__main__":
    main()
