"""Processes that are forked and not started by `subprocess`: what both sides need. Knows nothing of what they do."""

import atexit
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

POLL_SECONDS = 0.02


class ForkedProcess:
    """A child of this process, with what callers use of a `subprocess.Popen`. `stdin` and `stdout` are files, where
    there is a pipe to it; `returncode` is None as long as it runs, and minus the signal's number where one ended it.
    """

    def __init__(self, pid: int, stdin: Any = None, stdout: Any = None) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended, else None."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once the process has ended. Raises TimeoutError after `timeout` seconds."""
        latest = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if latest is not None and time.monotonic() > latest:
                raise TimeoutError(f"process {self.pid} still runs")
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that still runs. Raises ProcessLookupError where it ended in this moment."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


# --- the forked process -----------------------------------------------------------------------------------------------


def change_environment(environment: Mapping[str, str]) -> None:
    """Put `environment` in the place of this process's variables, and forget what followed from these."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None


def run_to_end(program: Callable[[], None]) -> None:
    """Run the program of a forked process, and end the process as Python would: it must not return to what its parent
    was doing.
    """
    code = 1
    try:
        program()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
