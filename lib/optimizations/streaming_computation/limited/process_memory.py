"""What this process holds and what it has read from a disk, as the system counts it. Loads nothing: a process that
measures itself should not be larger for it.

Linux alone has these counts; elsewhere they are missing.
"""

from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")
COUNTS = {"peak": "VmHWM", "file": "RssFile", "anonymous": "RssAnon"}


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


def disk_bytes() -> int | None:
    """Return the bytes that this process had read from a disk so far; None where the system has no count."""
    counts = [line.split()[1] for line in _lines(PROCESS / "io") if line.startswith("read_bytes")]
    return int(counts[0]) if counts else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
