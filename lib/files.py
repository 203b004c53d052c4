"""Files shared with other processes: atomic writes, locks, free names for files that must not be lost, and paths on
machines where the user may have no home. Independent of what the files contain.
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
    """Write `text` to `path` through a temporary file, flushed to disk and renamed into place: a reader sees the old
    file or the new one, never a part. Returns `path`; raises OSError.
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
    """Return the paths in `folder` that match `pattern`, sorted, without names that begin with a dot: editors and macOS
    leave such files (`.#x.yaml`, `._x.yaml`), and their content is not what their suffix says.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty dict where the file is unreadable or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file's whole content in hex; empty where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def cache_folder() -> Path:
    """Return the folder for files fetched or measured once per machine: WORKBENCH_CACHE, else `~/.cache/workbench`,
    else (a user without a home) this user's folder in the temporary directory. Raises UserError where WORKBENCH_CACHE
    starts with a home folder that does not exist.
    """
    if chosen := os.environ.get("WORKBENCH_CACHE"):
        return expanded(chosen)
    try:
        return Path.home() / ".cache" / "workbench"
    except RuntimeError:
        who = os.getuid() if hasattr(os, "getuid") else "unknown"
        return Path(tempfile.gettempdir()) / f"workbench-cache-{who}"


def results_folder(scale: str) -> Path:
    """Return the results folder of a scale, where a run stores what other runs read, such as the stack that a search
    chose: DIR/<scale> where WORKBENCH_RESULTS is DIR (a build sets it), else `executed/<scale>`.
    """
    return Path(os.environ.get(RESULTS) or Path(__file__).resolve().parents[1] / "executed") / scale


def expanded(path: str | Path) -> Path:
    """Return `path` absolute, with `~` as the user's home. Raises UserError where there is no such home."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder of that name here; give a path without ~") from None


def seen_from_here(path: Path) -> str:
    """Return `path` relative to the working directory; unchanged where it lies on another drive or the directory is
    gone.
    """
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):
        return str(path)


def aside(path: Path) -> Path:
    """Return a free name next to `path`, to set aside a file that cannot be used and must not be lost."""
    number = 1
    while (free := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return free


class Held(Exception):
    """Another process holds a lock. The text names it: "process 17, since 2026-01-31 12:00:00"."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block. Raises Held where another process holds it, OSError where the file
    cannot be written.

    The operating system releases the lock when its holder dies, so a lock is never stale. The file remains; unlocked,
    it means nothing. `<name>.holder` next to it names the process that holds it.
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
