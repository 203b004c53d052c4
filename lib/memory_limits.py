"""The memory that this process may use: the machine's, or less where a control group (containers, batch systems) sets
a limit.

psutil sees only the machine. Reads both versions of Linux control groups; other systems have no limit to read. Soft
limits are ignored.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

LEAST_KEPT, MOST_KEPT = 2**28, 2**31
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
VERSIONS = {  # controllers in OWN_GROUPS → folder, limit, usage, and the entries of memory.stat that are page cache
    "": (".", "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"),
    ),
}  # fmt: skip


def memory_bytes() -> int:
    """Return the most memory, in bytes, that this process and its control group may use."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory_bytes() -> int:
    """Return the memory, in bytes, that is free for this process now."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())]))


def room_to_keep() -> int:
    """Return how many bytes may be cached to avoid recomputation: an eighth of the free memory, between 256 MiB and
    2 GiB, whatever the model's size.
    """
    return max(LEAST_KEPT, min(MOST_KEPT, free_memory_bytes() // 8))


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and usage, in bytes, of every control group of this process; page cache does not count as usage."""
    for line in lines_of(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        for name in set(VERSIONS) & set(controllers.split(",")):
            folder, limit, use, files = VERSIONS[name]
            own_group = GROUPS / folder / path.lstrip("/")
            # Inside a container the path may be the host's; the limit is then at the top.
            for group in (own_group, *own_group.parents):
                if group.is_relative_to(GROUPS):
                    yield from _limit(group / limit, group / use, group / "memory.stat", files)


def _limit(limit: Path, use: Path, stat: Path, files: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    try:
        counts = dict(line.split(" ", 1) for line in lines_of(stat))
        yield int(limit.read_text()), int(use.read_text()) - sum(int(counts[name]) for name in files)
    except (OSError, ValueError, KeyError):
        return  # "max", or a group without these files


def lines_of(path: Path) -> list[str]:
    """Return the lines of a kernel file such as one in /proc; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
