"""Fresh processes for arms that lie in saved files: what an arm is, and how the processes that load and run it are
started. Knows nothing of what they measure; `lib.measure.timing.child` is the other side.

Children are forked, one after another, from a server: a process that has imported the libraries and done nothing else,
since importing takes longer than most measurements. It serves further calls of the same program as long as this process
lives. On CUDA, and where processes cannot fork, each child is started anew.
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
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 1800.0  # of one child
VARIABLE = "WORKBENCH_CHILDREN"
STARTING_SECONDS = 120.0


@dataclass(frozen=True)
class Arm:
    """What a child process loads and runs.

    `folder`: a checkpoint folder; or `load`: keyword arguments of `lib.models.loading.load`. `transform`:
    "module:function", called with the loaded model and `arguments`, returns the model to measure. `opener`:
    "module:function", called with the folder and `arguments`, returns the model, which is then not loaded whole.
    `workload`: prefill, decode or generate, of `batch` random prompts; or "module:function", called with the model and
    `workload_arguments`, returns the `Workload`. A timing child gets its workloads from its job instead.
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


def left_out() -> str | None:
    """Return why no process is to be started (the variable WORKBENCH_CHILDREN is "none": on a device that is lent for
    minutes, starting them takes longer than the rest of a run), or None.
    """
    return f"no processes of their own: {VARIABLE}=none" if os.environ.get(VARIABLE) == "none" else None


def run(
    program: str,
    jobs: Sequence[Mapping[str, Any]],
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> list[dict[str, Any]]:
    """Return the answer of a fresh process to each job, in order; all run on the cores and threads of this one.

    `program` is a module that calls `child.serve`. A job is plain JSON; its entry "arms" lists its arms as
    dictionaries. `environment` adds variables. A process that fails or runs past `limit_seconds` answers
    {"failed": the reason}.
    """
    on_gpu = any(arm["device"].startswith("cuda") for job in jobs for arm in job["arms"])
    if on_gpu and (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that this process's allocator holds back is not free for a child
    if hasattr(os, "fork") and not on_gpu:
        return _server(program, environment or {}).answers(jobs, limit_seconds, fork=True)
    answers = []
    for job in jobs:
        server = Server(program, _surroundings(environment or {}))
        try:
            answers += server.answers([job], limit_seconds, fork=False)
        finally:
            server.end()
    return answers


def _surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a child: this process's, its threads, and where the project's code lies."""
    torch = sys.modules.get("torch")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if torch else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **threads, **environment, "PYTHONPATH": path}


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """A process that runs `program`; it answers requests, one line of JSON for each job, until `end`."""

    def __init__(self, program: str, surroundings: Mapping[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=dict(surroundings),
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def answers(self, jobs: Sequence[Mapping[str, Any]], limit_seconds: float, *, fork: bool) -> list[dict[str, Any]]:
        """Return the answer to each job, from a process forked for it or else from the server itself. A server that
        ends, or does not answer in time, is gone afterwards, and with it what it forked; so is one whose answers were
        not awaited, since whoever asked next would take them for theirs.
        """
        try:
            return self._answers(jobs, limit_seconds, fork)
        except BaseException:
            self.end()
            raise

    def _answers(self, jobs: Sequence[Mapping[str, Any]], limit_seconds: float, fork: bool) -> list[dict[str, Any]]:
        request = {"jobs": jobs, "fork": fork, "limit_seconds": limit_seconds}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its lines will say
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        latest = time.monotonic() + limit_seconds * len(jobs) + STARTING_SECONDS
        answers: list[dict[str, Any]] = []
        while len(answers) < len(jobs):
            try:
                line = self.lines.get(timeout=max(0.0, latest - time.monotonic()))
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
        """End the server, where it still runs, and the children that it has forked."""
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


_SERVERS: dict[str, tuple[object, Server]] = {}  # of each program the latest, and what it was started for


def _server(program: str, environment: Mapping[str, str]) -> Server:
    """Return the server of a program under these variables, on the cores of this process; start it where there is
    none. One that was started for others ends: each holds the libraries in memory.
    """
    surroundings = _surroundings(environment)
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    key = (os.getpid(), cores, surroundings)
    started_for, server = _SERVERS.get(program, (None, None))
    if server is None or started_for != key or not server.alive:
        if server is not None and isinstance(started_for, tuple) and started_for[0] == os.getpid():
            server.end()
        server = Server(program, surroundings)
        _SERVERS[program] = key, server
    return server


@atexit.register
def end_all() -> None:
    """End the servers of this process; those of a process that it was forked from go on."""
    for started_for, server in _SERVERS.values():
        if isinstance(started_for, tuple) and started_for[0] == os.getpid():
            server.end()
    _SERVERS.clear()
