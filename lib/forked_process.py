"""Processes forked without `subprocess`: the code that parent and child need, independent of what the child runs."""

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
    """A child of this process, with the part of `subprocess.Popen`'s interface that callers use. `stdin` and `stdout`
    are files where a pipe exists; `returncode` is None while it runs, and minus the signal's number if a signal ended
    it.
    """

    def __init__(self, pid: int, stdin: Any = None, stdout: Any = None) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended, else None."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # other code has already waited for it
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
        """Send a signal if the process still runs. Raises ProcessLookupError where it ends at this very moment."""
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
    """Replace this process's environment variables by `environment`; forget the temporary folder derived from them."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None


def run_to_end(program: Callable[[], None]) -> None:
    """Run `program` in a forked process and end the process as Python would: it must never return into the parent's
    code.
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
