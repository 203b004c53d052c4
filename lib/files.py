"""Files that other processes read or guard at the same time: whole writes, free names for what must not be lost, and
locks; and the paths of a machine on which there may be no home. Knows nothing of what the files hold.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib.errors import UserError

RESULTS = "WORKBENCH_RESULTS"  # names the folder that holds a result folder for each scale


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` beside `path`, flush it to disk and rename it into place, so that a reader sees the old file or the
    new one, never half of one. Returns `path`; raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return what matches a pattern in a folder, sorted, but for names that begin with a dot: editors and macOS leave
    such files beside others (`.#x.yaml`, `._x.yaml`), and they hold none of what their ending says.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where the file cannot be read or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, read whole; empty where there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def cache_folder() -> Path:
    """Return the folder for what is fetched or measured once per machine: WORKBENCH_CACHE, else `.cache/workbench` at
    home, else (a user without a home) a folder of this user among the temporary files. Raises UserError where
    WORKBENCH_CACHE begins at a home that is not there.
    """
    if chosen := os.environ.get("WORKBENCH_CACHE"):
        return expanded(chosen)
    try:
        return Path.home() / ".cache" / "workbench"
    except RuntimeError:
        who = os.getuid() if hasattr(os, "getuid") else "unknown"
        return Path(tempfile.gettempdir()) / f"workbench-cache-{who}"


def results_folder(scale: str) -> Path:
    """Return the folder of a scale's results, in which a run leaves what others read, such as the stack that a search
    chose: DIR/<scale> where WORKBENCH_RESULTS names DIR, as a build does, else `executed/<scale>`.
    """
    return Path(os.environ.get(RESULTS) or Path(__file__).resolve().parents[1] / "executed") / scale


def expanded(path: str | Path) -> Path:
    """Return `path` absolute, with `~` as the user's home. Raises UserError where there is no such home."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder of that name here; give a path without ~") from None


def seen_from_here(path: Path) -> str:
    """Return a path as the working directory sees it; whole where it lies on another drive, or there is none."""
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):
        return str(path)


def aside(path: Path) -> Path:
    """Return a free name beside `path`, for a file that cannot be used and must not be lost."""
    number = 1
    while (free := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return free


class Held(Exception):
    """Another process holds a lock. The text names it: "process 17, since 2026-01-31 12:00:00"."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block; raises Held where another process has it, OSError where the file
    cannot be written.

    The operating system releases the lock when its holder dies, so a lock is never stale. The file remains; it means
    nothing unless it is locked. Beside it, `<name>.holder` says who holds it.
    """
    lock, about = FileLock(path), path.with_name(path.name + ".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:  # an OSError too
        raise Held(_holder(about)) from None
    try:
        holder = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        about.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown, since an unknown time"
