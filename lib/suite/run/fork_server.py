"""Forks the child process of each run from a process that has imported the libraries of all notebooks once: importing
them again for papermill, for the kernel and for the measured processes takes longer than a preview's measurements.
`python -m lib.suite.run.fork_server` is that process; `ForkServer` is the build's side of it.

It imports only libraries, not this project's modules that use them, so that a run executes the code as it is when it
starts. Forking needs Linux; elsewhere, and if WORKBENCH_FORK_SERVER is "none", each child is a new process.
"""

import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any

from lib.forked_process import ForkedProcess, change_environment, run_to_end
from lib.report.records import grammars
from lib.suite.plan.plan import ROOT

VARIABLE = "WORKBENCH_FORK_SERVER"
READY_SECONDS = 120.0
MOST_BYTES = 2**17  # of a message
LIBRARIES = (
    "papermill",
    "papermill.engines",
    "nbclient",
    "nbconvert",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "safetensors.torch",
    "scipy.stats",
    "pandas",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "seaborn",
    "scrapbook",
    "optuna",
)


def possible() -> bool:
    """Return whether children can be forked here, and the user has not disabled it."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and os.environ.get(VARIABLE) != "none"


class ForkServer:
    """The build's side: starts the server with `environment`; it imports `modules`."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = dict(environment) | {"PYTHONHASHSEED": "0"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lib.suite.run.fork_server", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                env=self.environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.ready = self.lost = False
        self.requests = 0
        self.codes: dict[int, int] = {}

    def fork(self, request: Mapping[str, Any], log: IO[bytes]) -> "ServedProcess | None":
        """Return a process that runs `lib.suite.run.execute` in its own session, with the request's "environment" and
        on its "cores"; None where the server is lost, or the request is longer than a message (environment modules
        can set that many variables). Its errors go to `log`.
        """
        self.requests += 1
        number = self.requests  # a reply that comes too late must not be taken for that of a later request
        data = json.dumps({**request, "number": number}).encode()
        if len(data) > MOST_BYTES or (not self.ready and not self._receive(READY_SECONDS, lambda _: self.ready)):
            return None
        to_it, from_it = os.pipe(), os.pipe()
        with suppress(OSError):
            socket.send_fds(self.socket, [data], [to_it[0], from_it[1], log.fileno()])
        for fd in (to_it[0], from_it[1]):
            os.close(fd)
        reply = self._receive(READY_SECONDS, lambda message: message.get("number") == number)
        if reply is None:
            for fd in (to_it[1], from_it[0]):
                os.close(fd)
            return None
        return ServedProcess(self, reply["forked"], os.fdopen(to_it[1], "wb"), os.fdopen(from_it[0], "rb"))

    def _receive(self, seconds: float, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Read messages until one is `wanted`, and return it; None where none arrives in time. Stores exit codes."""
        while not self.lost and select.select([self.socket], [], [], seconds)[0]:
            try:
                data = self.socket.recv(MOST_BYTES)
            except OSError:
                data = b""
            if not data:
                self.lost = True
                break
            message = json.loads(data)
            self.ready = True
            if "ended" in message:
                self.codes[message["ended"]] = message["code"]
            if wanted(message):
                return message
        return None

    def code(self, pid: int) -> int | None:
        """Return the exit code of a process that has ended, else None; -9 (unknown) if the server is lost."""
        while pid not in self.codes and self._receive(0.0, lambda message: message.get("ended") == pid):
            continue
        return self.codes.get(pid, -9 if self.lost else None)

    def end(self) -> None:
        """End the server; the processes that it has forked continue."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


class ServedProcess(ForkedProcess):
    """A process forked by the server; only the server can wait for it."""

    def __init__(self, server: ForkServer, pid: int, stdin: Any, stdout: Any) -> None:
        super().__init__(pid, stdin, stdout)
        self.server = server

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended, else None."""
        if self.returncode is None:
            self.returncode = self.server.code(self.pid)
        return self.returncode


# --- the server ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Import the modules, report that, and fork a child for each request until the build closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    grammars.refuse()
    for name in sys.argv[2:]:
        with suppress(Exception):  # reported by the code that needs the module
            importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()  # a child's garbage collection must not visit, and so copy, the imported objects
    control.send(b'{"ready": true}')
    running: dict[int, int] = {}  # by the file descriptor that becomes readable when the process ends
    while True:
        readable = select.select([control.fileno(), *running], [], [])[0]
        for pidfd in running.keys() & set(readable):
            pid = running.pop(pidfd)
            os.close(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            control.send(json.dumps({"ended": pid, "code": code}).encode())
        if control.fileno() in readable:
            data, pipes, *_ = socket.recv_fds(control, MOST_BYTES, 3)
            if not data:
                return
            request = json.loads(data)
            pid = os.fork()
            if pid == 0:
                run_to_end(partial(_child, request, pipes, [control.detach(), *running]))
            for fd in pipes:
                os.close(fd)
            running[os.pidfd_open(pid)] = pid
            control.send(json.dumps({"forked": pid, "number": request["number"]}).encode())


def _child(request: Mapping[str, Any], pipes: Sequence[int], others: Sequence[int]) -> None:
    os.setsid()
    from lib.suite.run import execute, prepared_kernel

    for fd in others:
        os.close(fd)
    for number, fd in enumerate(pipes):
        os.dup2(fd, number)
        os.close(fd)
    change_environment(request["environment"])
    execute.pin(request["cores"])
    prepared_kernel.prepare()
    execute.main()


if __name__ == "__main__":
    main()
