"""The build's side of one run: starts the child process, follows its reports, samples it, and enforces its time limits.

Knows what happened to a notebook (`ExecutionOutcome`), not what that means for its record (`lib.suite.run.settle`).
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lib.errors import UserError
from lib.files import cache_folder
from lib.forked_process import ForkedProcess
from lib.suite.bootstrap import python_path
from lib.suite.plan.plan import NOTEBOOKS, ROOT
from lib.suite.run.fork_server import LIBRARIES, ForkServer, possible
from lib.suite.run.sampling import Samples, Tree

# Time limits of a cell and of a whole run, by effort; environment variables override them.
CELL_SECONDS = {"preview": 1200, "quick": 1200, "standard": 7200, "thorough": 43200}
RUN_SECONDS = {"preview": 3600, "quick": 3600, "standard": 21600, "thorough": 172800}
GRACE_SECONDS = 20
# Variables that a build started from a notebook inherits, but must not pass on to its own notebooks.
OF_A_SESSION = ("MPLBACKEND", "JPY_SESSION_NAME")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """A notebook to execute: its path and parameters, the folders of its files, and its cores."""

    name: str
    notebook: Path
    parameters: Mapping[str, Any]
    folder: Path
    temporary: Path
    cores: tuple[int, ...]
    jobs: int
    effort: str
    glued: bool = True
    dimensions: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The executed notebook, before it is put into place."""
        return self.folder / "notebook.ipynb"

    @property
    def log(self) -> Path:
        """Log output of the child and the kernel."""
        return self.folder / "log.txt"


@dataclass
class ExecutionOutcome:
    """How an execution ended. `error` is None, or kind, text and whether a cell raised it; `cell` is the last one
    started.
    """

    error: dict[str, Any] | None
    record: dict[str, Any] | None
    cell: int | None
    cell_seconds: dict[int, float]
    seconds: float
    samples: Samples
    alive: bool

    @property
    def worth_another_try(self) -> bool:
        """Whether the notebook was not at fault: the kernel did not start, or the child was lost."""
        if self.error is None or self.error.get("limit"):
            return False
        return self.cell is None or self.error["kind"] == "WorkerLost"


def limit(kind: str, effort: str) -> float:
    """Return the seconds that a cell or a run may take (`WORKBENCH_CELL_SECONDS`, `WORKBENCH_RUN_SECONDS`).

    Raises UserError where a variable is not a number of at least 1.
    """
    return seconds_from(f"WORKBENCH_{kind.upper()}_SECONDS", {"cell": CELL_SECONDS, "run": RUN_SECONDS}[kind][effort])


def seconds_from(variable: str, default: float) -> float:
    """Return the value of an environment variable in seconds, `default` where it is unset or empty. Raises UserError
    for anything but a number of at least 1.
    """
    value = os.environ.get(variable)
    if not value:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds >= 1:
        raise UserError(f"{variable}={value}: expected a number of seconds of at least 1")
    return seconds


def write_kernel(folder: Path, extension: str | None = None) -> Path:
    """Write a description of the kernel `python3` of this environment into `folder`; return the value for JUPYTER_PATH.

    Without it, a kernel `python3` that the user installed for another environment would be used. `extension` is a
    module that the kernel loads as an IPython extension when it starts.
    """
    place = folder / "jupyter" / "kernels" / "python3"
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += [f"--ext={extension}"] if extension else []
    kernel = {"argv": command, "display_name": "Python 3 (workbench)", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    return folder / "jupyter"


def surroundings(folder: Path) -> dict[str, str]:
    """Return the environment variables of a notebook whose own files go to `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_SESSION}
    return inherited | {
        "PYTHONPATH": python_path(),
        "JUPYTER_PATH": str(write_kernel(folder)),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        # Set explicitly: the default may depend on the temporary directory, which differs in a notebook.
        "WORKBENCH_CACHE": str(cache_folder()),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


@dataclass
class Worker:
    """A child process and its state."""

    task: Task
    process: "subprocess.Popen[bytes] | ForkedProcess"
    tree: Tree
    events: queue.Queue
    began: float
    cell: int | None = None
    cell_began: float = 0.0
    cell_seconds: dict[int, float] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    rendered: dict[str, Any] | None = None
    closed: bool = False
    over: str | None = None
    over_since: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the child was started."""
        return time.monotonic() - self.began


def threads(count: int) -> dict[str, str]:
    """Return the variables that give each library `count` threads."""
    return {name: str(count) for name in THREADS}


@contextlib.contextmanager
def fork_server(cores: int, architectures: Iterable[str]) -> Iterator[ForkServer | None]:
    """Yield a server that forks the children of tasks on `cores` cores each, with the transformers modules of these
    `architectures` imported, and end it afterwards; None where processes cannot be forked.
    """
    if not possible():
        yield None
        return
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_SESSION}
    modules = [*LIBRARIES, *(f"transformers.models.{name}.modeling_{name}" for name in architectures)]
    server = ForkServer(inherited | {"PYTHONPATH": python_path()} | threads(cores), modules)
    try:
        yield server
    finally:
        server.end()


def start(task: Task, server: ForkServer | None = None) -> Worker:
    """Start the child of a task: forked by `server` if it is available and has the same number of threads, else as a
    new process. Raises OSError where its folder cannot be written.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.temporary / "tmp").mkdir(parents=True, exist_ok=True)
    environment = surroundings(task.temporary) | threads(len(task.cores))
    environment["WORKBENCH_DIMENSIONS"] = ",".join(task.dimensions)
    environment |= {"WORKBENCH_JOBS": str(task.jobs), "TMPDIR": str(task.temporary / "tmp")}
    with task.log.open("ab") as log:
        process = _forked(server, environment, task.cores, log) or subprocess.Popen(
            [sys.executable, "-m", "lib.suite.run.execute"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    worker = Worker(task, process, Tree(process.pid), queue.Queue(), time.monotonic())
    threading.Thread(target=_listen, args=(process.stdout, worker.events), daemon=True).start()
    request = {
        "notebook": str(task.notebook),
        "output": str(task.output),
        "name": task.name,
        "parameters": dict(task.parameters),
        "directory": str(NOTEBOOKS),
        "cores": list(task.cores),
        "cell_seconds": limit("cell", task.effort),
        "glued": task.glued,
    }
    send(worker, request)
    return worker


def _forked(
    server: ForkServer | None, environment: Mapping[str, str], cores: Sequence[int], log: IO[bytes]
) -> ForkedProcess | None:
    if server is None or any(server.environment.get(name) != environment[name] for name in THREADS):
        return None
    return server.fork({"environment": environment, "cores": list(cores)}, log)


def _listen(stream: Any, events: queue.Queue) -> None:
    for line in stream:
        try:
            events.put(json.loads(line))
        except ValueError:
            continue  # a child that is killed may leave half a line
    stream.close()
    events.put({"event": "closed"})


def send(worker: Worker, message: Mapping[str, Any]) -> bool:
    """Send a line to the child; return whether that succeeded."""
    stdin = worker.process.stdin
    if stdin is None:
        return False
    try:
        stdin.write(json.dumps(message).encode() + b"\n")
        stdin.flush()
    except OSError:
        return False
    return True


def poll(worker: Worker) -> ExecutionOutcome | None:
    """Process the child's events; return the outcome once it has ended, else None."""
    if worker.ended is None:
        worker.tree.sample()
    while not worker.events.empty():
        event = worker.events.get()
        kind = event.pop("event")
        if kind == "cell":
            worker.cell, worker.cell_began = event["index"], time.monotonic()
        elif kind == "cell_end":
            worker.cell_seconds[event["index"]] = event["seconds"]
        elif kind == "end":
            worker.ended = event
            return _outcome(worker, event)
        elif kind == "rendered":
            worker.rendered = event
        elif kind == "closed":
            worker.closed = True
    if worker.ended is None:
        if worker.closed:
            code = worker.process.wait()
            worker.ended = {"error": {"kind": "WorkerLost", "text": f"the process ended with {code}", "raised": False}}
            return _outcome(worker, worker.ended)
        _enforce(worker)
    return None


def _enforce(worker: Worker) -> None:
    """End the kernel of a run past its limit; if the child does not report that soon, end the child too.

    Papermill enforces the limit of a cell; here it is only a second safeguard, for a child that hangs.
    """
    now = time.monotonic()
    if worker.over is None:
        run, cell = limit("run", worker.task.effort), limit("cell", worker.task.effort)
        if worker.seconds > run:
            worker.over = f"the run exceeded its limit of {run:g} s"
        elif worker.cell not in (None, *worker.cell_seconds) and now - worker.cell_began > cell + GRACE_SECONDS:
            worker.over = f"exceeded its limit of {cell:g} s"
        if worker.over:
            worker.over_since = now
            worker.tree.end_descendants()
    elif now - worker.over_since > GRACE_SECONDS:
        worker.tree.end()


def _outcome(worker: Worker, ended: Mapping[str, Any]) -> ExecutionOutcome:
    error = ended.get("error")
    if worker.over:
        error = {"kind": "TimeLimit", "text": worker.over, "raised": False, "limit": True}
    alive = worker.process.poll() is None
    return ExecutionOutcome(
        error, ended.get("record"), worker.cell, worker.cell_seconds, worker.seconds, worker.tree.samples, alive
    )


def finish(worker: Worker) -> None:
    """Close the child's standard input, which ends a waiting child, and kill all its remaining processes."""
    if worker.process.stdin is not None:
        with contextlib.suppress(OSError):
            worker.process.stdin.close()
    worker.tree.end()
    worker.process.wait()
