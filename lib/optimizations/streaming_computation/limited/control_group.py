"""A memory control group of Linux for one process: a limit that holds for its page cache as well.

Both versions of control groups are tried, at the group of this process and at those above it; where none can be made,
the reason says so, and what would help. Knows nothing of what runs inside.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.memory_limits import GROUPS, OWN_GROUPS, lines_of

HOW = "run it in a group that may be divided: systemd-run --user --scope -p Delegate=yes python build.py …"
NAME = "workbench"


@dataclass(frozen=True)
class Version:
    """Names of files of one version of control groups, and the entries of `memory.stat` that are page cache.

    `swap`: the file in which 0 keeps a group's own memory out of the swap space.
    """

    limit: str
    usage: str
    cached: tuple[str, ...]
    swap: str


TWO = Version("memory.max", "memory.current", ("file",), "memory.swap.max")
ONE = Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("cache",), "memory.swappiness")


@dataclass(frozen=True)
class ControlGroup:
    """A group of its own: `members` takes the id of a process."""

    folder: Path
    version: Version

    @property
    def members(self) -> Path:
        return self.folder / "cgroup.procs"

    def private_bytes(self) -> int:
        """Return what the group holds besides page cache, in bytes."""
        stat = dict(line.split(" ", 1) for line in (self.folder / "memory.stat").read_text().splitlines())
        used = int((self.folder / self.version.usage).read_text())
        return used - sum(int(stat[name]) for name in self.version.cached)

    def cached_bytes(self) -> int:
        """Return the page cache that the group holds, in bytes."""
        return int((self.folder / self.version.usage).read_text()) - self.private_bytes()

    def limit(self, nbytes: int) -> None:
        """Let the group hold at most `nbytes`; page cache beyond it is given back now. Raises UserError.

        Swapping ends first: what a limit drives out must not come to lie there, where the group would still have it.
        """
        try:
            if (self.folder / self.version.swap).exists():
                (self.folder / self.version.swap).write_text("0")
            (self.folder / self.version.limit).write_text(str(nbytes))
        except OSError as error:
            raise UserError(f"control group: a limit of {nbytes} bytes cannot be set ({error.strerror})") from None


def candidates() -> list[tuple[Path, Version]]:
    """Return the folders in which a group might be made: this process's own groups with memory, then those above."""
    places: list[tuple[Path, Version]] = []
    for line in lines_of(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        top, version = (GROUPS / "memory", ONE) if "memory" in controllers.split(",") else (GROUPS, TWO)
        if controllers and "memory" not in controllers.split(","):
            continue
        own = top / path.lstrip("/")
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(top) and folder.is_dir()]
        places += [(folder, version) for folder in folders]
    return places


def make(name: str = NAME) -> ControlGroup:
    """Make a new, empty group. Raises UserError with the reason where none can be made, and how one could."""
    reasons = []
    for parent, version in candidates():
        folder = parent / f"{name}-{os.getpid()}-{len(list(parent.glob(f'{name}-{os.getpid()}-*')))}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if not (folder / version.limit).exists():  # the parent does not pass the memory controller on
            with suppress(OSError):
                (parent / "cgroup.subtree_control").write_text("+memory")
        if (folder / version.limit).exists():
            return ControlGroup(folder, version)
        folder.rmdir()
        reasons.append(f"{parent}: its groups have no limit of memory")
    reason = reasons[0] if reasons else "this system has no control groups with memory"
    raise UserError(f"no memory control group can be made ({reason}); {HOW}")


@contextmanager
def group(name: str = NAME) -> Iterator[ControlGroup]:
    """Yield a new group and remove it afterwards; its processes must have ended by then. Raises UserError."""
    created = make(name)
    try:
        yield created
    finally:
        with suppress(OSError):
            created.folder.rmdir()
