"""Signals that end a command early: Ctrl-C, SIGTERM and a closed terminal become an exception, so that child processes
end too and finished results are kept.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class BuildStopped(BaseException):
    """The build was told to end: by Ctrl-C, SIGTERM or a closed terminal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first terminating signal into `BuildStopped`; ignore further ones during clean-up. Signals that were
    already ignored stay ignored: a closed terminal under `nohup`, Ctrl-C in a script's background job.
    """
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    names = [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]

    def stop(number: int, _: Any) -> None:
        for name in names:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise BuildStopped(number)

    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
