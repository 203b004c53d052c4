"""The memory of this process and the bytes it has read from a disk, as counted by the system.

Loads nothing, so that measuring itself does not enlarge the process. Only Linux has these counts.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")
COUNTS = {"peak": "VmHWM", "file": "RssFile", "anonymous": "RssAnon"}
KEPT = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def usage() -> dict[str, int]:
    """Return, in bytes, the peak of resident memory and the current resident file pages and anonymous memory.

    Empty if the system has no such counts.
    """
    lines = dict(line.split(":", 1) for line in _lines(PROCESS / "status"))
    return {name: int(lines[count].split()[0]) * 1024 for name, count in COUNTS.items() if count in lines}


def reset_peak() -> bool:
    """Reset the peak to the current resident memory; return whether the system permits it."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
        return True
    return False


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory, except blocks above 32 MiB, instead of returning it to the system.

    The process's memory between two calls is then the memory that a call needs. Other allocators are not changed.
    """
    with suppress(OSError, AttributeError):
        for parameter, value in KEPT.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def disk_bytes() -> int | None:
    """Return the bytes that this process has read from a disk so far; None if the system has no count."""
    counts = [line.split()[1] for line in _lines(PROCESS / "io") if line.startswith("read_bytes")]
    return int(counts[0]) if counts else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
