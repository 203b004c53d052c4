"""The memory that this process may use: the machine's, or less where a control group allows less, as containers and
batch systems have them.

psutil knows the machine alone. Control groups are Linux's, first and second version; elsewhere there is no limit to
read. Soft limits are not looked at.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
VERSIONS = {  # by controllers, as OWN_GROUPS names them: folder, limit, use, and which of the use are files' pages
    "": (".", "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"),
    ),
}  # fmt: skip


def memory_bytes() -> int:
    """Return the memory that this process and its neighbours may use at most."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory_bytes() -> int:
    """Return the memory that this process could use now."""
    return max(0, min([psutil.virtual_memory().available, *(limit - held for limit, held in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of every control group that this process is in; files' pages are no use."""
    for line in _lines(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        for name in set(VERSIONS) & set(controllers.split(",")):
            folder, limit, use, files = VERSIONS[name]
            own = GROUPS / folder / path.lstrip("/")
            # Within a container the path may be that outside of it: then the limit stands at the top.
            for group in (own, *own.parents):
                if group.is_relative_to(GROUPS):
                    yield from _limit(group / limit, group / use, group / "memory.stat", files)


def _limit(limit: Path, use: Path, stat: Path, files: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    try:
        counts = dict(line.split(" ", 1) for line in _lines(stat))
        yield int(limit.read_text()), int(use.read_text()) - sum(int(counts[name]) for name in files)
    except (OSError, ValueError, KeyError):
        return  # "max", or a group that says nothing


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
