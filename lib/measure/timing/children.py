"""Starts fresh processes that load arms from saved files and run them, and defines what an arm is. Knows nothing about
what the processes measure; `lib.measure.timing.child` is the code inside them.

Children are forked, one after another, from a server: a process that has imported the libraries and done nothing else,
since importing takes longer than most measurements. It serves every program as long as this process lives. In a build
the server is forked along with the kernel, from a process that imports the libraries once for all runs. On CUDA, and
where processes cannot fork, every child is started from scratch.
"""

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from lib.forked_process import ForkedProcess

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 1800.0  # of one child
VARIABLE = "WORKBENCH_CHILDREN"
# Describes the server that was forked along with this process: the process ids of both, the server's pipes and error
# file as file descriptors, and its number of threads.
FORKED_SERVER = "WORKBENCH_MEASURING_SERVER"
SERVE = "from lib.measure.timing import child; child.serve()"
STARTING_SECONDS = 120.0


@dataclass(frozen=True)
class Arm:
    """What a child process loads and runs.

    `folder` is a checkpoint folder; alternatively, `load` holds keyword arguments of `lib.models.loading.load`.
    `transform` is a "module:function" that takes the loaded model and `arguments` and returns the model to measure.
    `opener` is a "module:function" that takes the folder and `arguments` and returns the model without loading all of
    it. `workload` is prefill, decode or generate, on `batch` random prompts, or a "module:function" that takes the
    model and `workload_arguments` and returns the `Workload`. A timing child gets its workloads from its job instead.
    """

    folder: str | None = None
    load: dict[str, Any] | None = None
    transform: str | None = None
    opener: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    workload: str = "generate"
    workload_arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 16
    dtype: str = "float32"
    device: str = "cpu"


def why_none() -> str | None:
    """Return why no process must be started, or None.

    The reason is the variable WORKBENCH_CHILDREN set to "none", meant for devices that are available for minutes only,
    where starting processes takes longer than the rest of a run.
    """
    return f"no separate processes: {VARIABLE}=none" if os.environ.get(VARIABLE) == "none" else None


def run(
    program: str, jobs: Sequence[Mapping[str, Any]], *, limit_seconds: float = LIMIT_SECONDS
) -> list[dict[str, Any]]:
    """Return the answer of a fresh process to each job, in order; all use this process's cores and number of threads.

    `program` is a module whose function `run` takes a job and returns the answer. A job is plain JSON; its entry "arms"
    lists its arms as dictionaries. A process that fails or runs past `limit_seconds` answers {"failed": the reason}.
    """
    on_gpu = any(arm["device"].startswith("cuda") for job in jobs for arm in job["arms"])
    if on_gpu and (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that this process's allocator holds back is not free for a child
    if hasattr(os, "fork") and not on_gpu:
        return _server().answers(program, jobs, limit_seconds, fork=True)
    answers = []
    for job in jobs:
        server = _start()
        try:
            answers += server.answers(program, [job], limit_seconds, fork=False)
        finally:
            server.end()
    return answers


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


def _surroundings() -> dict[str, str]:
    """Return a child's environment: this process's variables, its number of threads, and the path of the project's
    code.

    The fixed hash seed gives sets and dictionaries the same order in every child.
    """
    threads = {"OMP_NUM_THREADS": str(count)} if (count := _threads()) else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **threads, "PYTHONHASHSEED": "0", "PYTHONPATH": path}


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """A server process (`child.serve`) that runs any program: until `end`, it answers requests with one line of JSON
    for each job. `errors` is the file of its standard error.
    """

    def __init__(self, process: "subprocess.Popen[str] | ForkedProcess", errors: IO[str]) -> None:
        self.process, self.errors = process, errors
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self.process.poll() is None

    def answers(
        self, program: str, jobs: Sequence[Mapping[str, Any]], limit_seconds: float, *, fork: bool
    ) -> list[dict[str, Any]]:
        """Return the answer to each job, from a process forked for it (`fork`) or from the server itself.

        A server that ends or does not answer in time is ended together with its children. So is a server whose answers
        were not awaited, since the next caller would receive them.
        """
        try:
            return self._answers(program, jobs, limit_seconds, fork)
        except BaseException:
            self.end()
            raise

    def _answers(
        self, program: str, jobs: Sequence[Mapping[str, Any]], limit_seconds: float, fork: bool
    ) -> list[dict[str, Any]]:
        request = {"program": program, "jobs": jobs, "fork": fork, "limit_seconds": limit_seconds}
        request["environment"] = _surroundings()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the server has ended, which reading its lines will show
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        deadline = time.monotonic() + limit_seconds * len(jobs) + STARTING_SECONDS
        answers: list[dict[str, Any]] = []
        while len(answers) < len(jobs):
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.end()
                return [{"failed": f"the child process ran past {limit_seconds:g} s"}] * len(jobs)
            if line is None:
                lost = {"failed": f"the child process ended with {self.process.wait()}: {self._last_error()}"}
                self.end()
                return answers + [lost] * (len(jobs) - len(answers))
            if line.startswith("{"):
                answers.append(json.loads(line))
        return answers

    def _last_error(self) -> str:
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["no message"])[-1]

    def end(self) -> None:
        """End the server, if it is still running, and the children that it has forked."""
        if self.alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                server = psutil.Process(self.process.pid)
                for process in [*server.children(recursive=True), server]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            self.process.wait()
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.errors.close()


_SERVERS: dict[tuple, Server] = {}  # the latest server, by (process id, cores, threads)


def _start() -> Server:
    """Start a server with this process's environment, on its cores."""
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until it ends
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=ROOT,
        env=_surroundings(),
    )
    return Server(process, errors)


def _forked() -> Server | None:
    """Return the server that was forked along with this process, if there is one with the same number of threads."""
    parent, pid, stdin, stdout, errors, threads = map(int, os.environ.pop(FORKED_SERVER, "0,0,0,0,0,0").split(","))
    if parent != os.getpid():
        return None
    to_it, from_it = (os.fdopen(fd, mode, encoding="utf-8") for fd, mode in ((stdin, "w"), (stdout, "r")))
    server = Server(ForkedProcess(pid, to_it, from_it), os.fdopen(errors, "r", encoding="utf-8", errors="replace"))
    if _threads() in (threads, None):
        return server
    server.end()
    return None


def _server() -> Server:
    """Return the server for this process's cores and number of threads; start one if there is none. A server for others
    is ended first, since each holds the libraries in memory.
    """
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    key = (os.getpid(), cores, _threads())
    server = _SERVERS.get(key)
    if server is None or not server.alive:
        end_all()
        server = _SERVERS[key] = _forked() or _start()
    return server


@atexit.register
def end_all() -> None:
    """End the servers of this process; those of its parent keep running."""
    for (process, *_), server in _SERVERS.items():
        if process == os.getpid():
            server.end()
    _SERVERS.clear()
