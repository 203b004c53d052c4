"""The cache of fetched files: places of entries, receipts that mark them complete, hashes, room on the disk.

An entry is written next to its place, receipt last, and then renamed; an entry without a receipt is a leftover. Knows
nothing of where anything comes from.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.errors import UserError
from lib.files import cache_folder, write_atomically

RECEIPT = "source.json"
READ_BYTES = 2**20
# A progress callback: a description of the work, the amount done, and the total (None: unknown), in bytes or steps.
Tell = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Report no progress."""


def root() -> Path:
    """Return the folder of all fetched files."""
    return cache_folder() / "sources"


def entry(kind: str, title: str, *identity: object) -> Path:
    """Return the folder of an entry, named by its title and a hash of `identity`, which makes it unique."""
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:12]
    return root() / kind / f"{re.sub(r'[^A-Za-z0-9.+_-]+', '-', title)[:80]}-{digest}"


def receipt(folder: Path) -> dict[str, Any] | None:
    """Return the receipt of a complete entry, or None if there is none."""
    try:
        content = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def sign(folder: Path, **facts: object) -> None:
    """Write the receipt of a complete entry: `facts`, and the SHA-256 of every file."""
    files = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT
    }
    write_atomically(folder / RECEIPT, json.dumps(facts | {"files": files}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """Return None, or a message on a file of a complete entry that is missing or differs from its receipt."""
    for name, expected in (receipt(folder) or {}).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != expected:
            return f"{path} has changed since it was fetched"
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of an entry while the context is open, so that of two builds that need the same entry one waits.

    Raises UserError if the cache cannot be written to.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise unwritable(root(), error) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """Yield a new folder next to `folder`, which replaces it at the end, or is removed after an exception."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_room(needed: int, what: str) -> None:
    """Raise UserError if the disk of the cache has fewer than `needed` bytes free."""
    place = root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what}: needs {needed / 1e6:,.0f} MB in {root()}, {free / 1e6:,.0f} MB are free; make room, or set "
            "WORKBENCH_CACHE to a folder on another disk"
        )


def unwritable(place: Path, error: OSError) -> UserError:
    """Return the UserError for a folder of the cache that cannot be written to."""
    return UserError(f"{place}: cannot be written to ({error.strerror}); set WORKBENCH_CACHE to a writable folder")


def explained(error: OSError, what: str) -> UserError:
    """Return the UserError for a system error that occurred while `what` was fetched."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{what}: no room left on the disk of {root()}; nothing half-written was kept")
    return UserError(f"{what}: {error.filename or root()}: {error.strerror or error}")
