"""A lock on a file, held by one process at a time and let go by the operating system when that process dies.

So a lock is never stale: a holder killed at any moment leaves none behind. Needs the standard library only. Knows
nothing of what it guards.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Held(Exception):
    """Another process holds the lock; `holder` is what it wrote about itself (may be empty)."""

    def __init__(self, holder: dict):
        super().__init__(holder)
        self.holder = holder


def _take(handle: int) -> bool:
    """Try to lock the open file; False where another process has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> dict:
    try:
        content = json.loads(path.with_name(path.name + ".holder").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def held(path: Path, wait_seconds: float = 0.0, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock on `path` inside the block. Raises Held if another process still has it after `wait_seconds`.

    `waiting` is called once before the first wait. Yields the file descriptor: a child process that is given it keeps
    the lock for as long as it lives. The file stays behind, empty; it means nothing unless it is locked.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by child processes
    try:
        deadline = time.monotonic() + wait_seconds
        if not _take(handle):
            if wait_seconds > 0:
                waiting()
            while not _take(handle):
                if time.monotonic() >= deadline:
                    raise Held(_holder(path))
                time.sleep(0.2)
        about = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        path.with_name(path.name + ".holder").write_text(json.dumps(about), encoding="utf-8")
        yield handle
    finally:
        os.close(handle)
