"""A Linux memory control group for one process: a limit that includes its page cache.

Both versions of control groups are tried, in the group of this process and in those above it; if none can be created,
the error gives the reason and a remedy. Independent of the program that runs inside.
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
    """The file names of one version of control groups, and the entries of `memory.stat` that are page cache.

    `swap`: the file in which 0 turns off swapping for a group.
    """

    limit: str
    usage: str
    cached: tuple[str, ...]
    swap: str


TWO = Version("memory.max", "memory.current", ("file",), "memory.swap.max")
ONE = Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("cache",), "memory.swappiness")


@dataclass(frozen=True)
class ControlGroup:
    """A control group for one process, whose id is written to `members`."""

    folder: Path
    version: Version

    @property
    def members(self) -> Path:
        return self.folder / "cgroup.procs"

    def private_bytes(self) -> int:
        """Return the group's memory without page cache, in bytes."""
        stat = dict(line.split(" ", 1) for line in (self.folder / "memory.stat").read_text().splitlines())
        used = int((self.folder / self.version.usage).read_text())
        return used - sum(int(stat[name]) for name in self.version.cached)

    def cached_bytes(self) -> int:
        """Return the page cache charged to the group, in bytes."""
        return int((self.folder / self.version.usage).read_text()) - self.private_bytes()

    def limit(self, nbytes: int) -> None:
        """Limit the group to `nbytes`; page cache beyond that is released at once. Raises UserError if this fails.

        Swapping is turned off first: otherwise memory evicted by the limit would move to swap and stay available.
        """
        try:
            if (self.folder / self.version.swap).exists():
                (self.folder / self.version.swap).write_text("0")
            (self.folder / self.version.limit).write_text(str(nbytes))
        except OSError as error:
            raise UserError(f"control group: a limit of {nbytes} bytes cannot be set ({error.strerror})") from None


def candidates() -> list[tuple[Path, Version]]:
    """Return folders in which a group might be created: this process's own memory groups, then those above."""
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
    """Create a new, empty group. Raises UserError with the reason and a remedy if none can be created."""
    reasons = []
    for parent, version in candidates():
        folder = parent / f"{name}-{os.getpid()}-{len(list(parent.glob(f'{name}-{os.getpid()}-*')))}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if not (folder / version.limit).exists():  # the parent does not delegate the memory controller
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
