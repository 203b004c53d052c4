"""What this process holds and what it has read from a disk, as the system counts it. Loads nothing: a process that
measures itself should not be larger for it.

Linux alone has these counts; elsewhere they are missing.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")
COUNTS = {"peak": "VmHWM", "file": "RssFile", "anonymous": "RssAnon"}
KEPT = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def usage() -> dict[str, int]:
    """Return in bytes the peak of resident memory, and what is resident now: pages of files, and memory of its own.

    Empty where the system has no such counts.
    """
    lines = dict(line.split(":", 1) for line in _lines(PROCESS / "status"))
    return {name: int(lines[count].split()[0]) * 1024 for name, count in COUNTS.items() if count in lines}


def reset_peak() -> bool:
    """Let the peak begin at what is resident now; return whether the system permits it."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
        return True
    return False


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, but for blocks beyond 32 MiB, instead of giving it back and asking for
    it again: what this process holds between two calls is then what a call needs. Others' allocators stay as they are.
    """
    with suppress(OSError, AttributeError):
        for parameter, value in KEPT.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def disk_bytes() -> int | None:
    """Return the bytes that this process had read from a disk so far; None where the system has no count."""
    counts = [line.split()[1] for line in _lines(PROCESS / "io") if line.startswith("read_bytes")]
    return int(counts[0]) if counts else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
