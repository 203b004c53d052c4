"""The result folder: the paths of a run's files, the state of a run, and how files are put into place atomically.

A run is finished when its record (the JSON) has the job's key, and the notebook exists. Everything is written in
`.running/` and renamed, the record last. Reads records as plain JSON, because a listing must be quick; their meaning is
defined in `lib.report.records.record`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import hash_of, json_object, visible, write_atomically
from lib.report.text import commands
from lib.suite.plan import cache_key as keys
from lib.suite.plan.plan import ROOT

FINISHED = ("ok", "not_applicable")


@dataclass(frozen=True)
class Folder:
    """`executed/<scale>`, or another folder. Model names contain dots: suffixes are appended, never replaced."""

    path: Path

    def of(self, stem: str, ending: str) -> Path:
        """Return the path of a run's `.ipynb`, `.html`, `.md` or `.json`."""
        return self.path / f"{stem}{ending}"

    def failed(self, stem: str) -> Path:
        """Return the path of a failed run's notebook."""
        return self.path / "failed" / f"{stem}.ipynb"

    def log(self, stem: str) -> Path:
        """Return the path of a run's log."""
        return self.path / "logs" / f"{stem}.log"

    def parts(self, stem: str) -> Path:
        """Return the path of the parts of a finished run's key, used to explain what changed; the record decides."""
        return self.path / ".cache" / f"{stem}.json"

    @property
    def hashes(self) -> Path:
        """Where the hashes of unchanged files are kept."""
        return self.path / ".cache" / "files" / "hashes.json"

    @property
    def stacks(self) -> Path:
        """The folder of the recipes of stacks chosen by searches, `<model>.yaml`, which later runs read."""
        return self.path / "stacks"

    @property
    def running(self) -> Path:
        """Where runs write until they are finished; anything here when a build starts is a leftover."""
        return self.path / ".running"

    @property
    def lock(self) -> Path:
        """The file that a build locks."""
        return self.path / ".lock"


@dataclass(frozen=True)
class State:
    """The state of a job before it runs: `kind` is finished, unrendered, missing, failed, stale or damaged; `effort`
    is that of the existing record.
    """

    kind: str
    why: str = ""
    seconds: float | None = None
    status: str = ""
    effort: str = ""

    @property
    def must_run(self) -> bool:
        """Whether the notebook has to be executed."""
        return self.kind not in ("finished", "unrendered")


def open_folder(path: Path) -> Folder:
    """Return the result folder, created if necessary. Raises UserError if it is not writable."""
    folder = Folder(path)
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        _forget(probe)
        raise UserError(f"{path}: cannot be written to ({error.strerror}); give another folder with --out") from None
    return folder


def require_place(path: Path) -> None:
    """Raise UserError where `path` cannot become a writable folder, as far as can be told without writing. For commands
    that fetch files before they write.
    """
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        reason = "no permission" if there.is_dir() else "Not a directory"
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{path}: cannot be written to ({reason}); give another folder with --out")


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # its parent is not a folder


def state(folder: Folder, stem: str, parts: Mapping[str, Mapping[str, str]]) -> State:
    """Return the state of the run `stem`, whose job has the key parts `parts`."""
    path = folder.of(stem, ".json")
    if path.exists() and not path.is_file():  # reading a pipe would block
        return State("damaged", f"{path.name} is not a regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State("missing", "never run")
    except (OSError, ValueError):
        return State("damaged", f"{path.name} is not JSON")
    if not isinstance(content, dict) or "status" not in content or "key" not in content:
        return State("damaged", f"{path.name} is not a record")
    status, about = content["status"], (content.get("seconds"), content["status"], str(content.get("effort") or ""))
    if status not in FINISHED:
        return State("failed", str(content.get("reason") or "no reason given"), *about)
    if content["key"] != keys.of(parts):
        return State("stale", _difference(folder, stem, parts), *about)
    if changed := _changed_inputs(folder, content):
        return State("stale", changed, *about)
    if not folder.of(stem, ".ipynb").is_file():
        return State("stale", f"{stem}.ipynb is gone", *about)
    written = path.stat().st_mtime_ns
    for ending in (".html", ".md"):
        page = folder.of(stem, ending)
        if not page.is_file() or page.stat().st_mtime_ns < written:
            return State("unrendered", f"{page.name} is missing or older than its record", *about)
    return State("finished", "", *about)


def _changed_inputs(folder: Folder, content: Mapping[str, Any]) -> str:
    """Return which file that the run read, written by an earlier run, has changed since; empty where none has.

    The record has their hashes (`details["inputs"]`, empty for a missing file) by path within the results; records of
    earlier versions use paths within the project, in `executed`.
    """
    details = content.get("details")
    inputs = details.get("inputs") if isinstance(details, dict) else None
    hashes = inputs.get("value") if isinstance(inputs, dict) else None
    for name, value in (hashes if isinstance(hashes, dict) else {}).items():
        now = hash_of((ROOT if name.startswith("executed/") else folder.path) / name)
        if now != value:
            return f"{name}: {'changed' if now and value else 'new' if now else 'gone'}"
    return ""


def changed_inputs(folder: Folder, stem: str) -> str:
    """Return which file a finished run read that another run has written since; empty where there is none."""
    content = json_object(folder.of(stem, ".json"))
    return _changed_inputs(folder, content) if content.get("status") in FINISHED else ""


def _difference(folder: Folder, stem: str, parts: Mapping[str, Mapping[str, str]]) -> str:
    try:
        before = json.loads(folder.parts(stem).read_text(encoding="utf-8"))
        return keys.difference(before, parts) or "its cache key differs"
    except (OSError, ValueError, AttributeError):
        return "its cache key differs (its earlier inputs are no longer known)"


def keep_parts(folder: Folder, stem: str, parts: Mapping[str, Mapping[str, str]]) -> None:
    """Store the parts of a run's key, so that later changes can be explained."""
    write_atomically(folder.parts(stem), json.dumps(parts, indent=1) + "\n")


def place(source: Path, target: Path) -> None:
    """Move a finished file into place: flushed to disk, then renamed. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def adopt(folder: Folder, stem: str, files: Mapping[str, bytes]) -> None:
    """Copy a run's files from another result folder into this one, atomically, the record before its pages.

    `files` maps a path in that folder to its content; files other than the run's own and the stacks that it chose are
    ignored. Raises OSError.
    """
    part = folder.running / stem / "part"
    part.parent.mkdir(parents=True, exist_ok=True)

    def put(name: str, target: Path) -> None:
        if name in files:
            part.write_bytes(files[name])
            place(part, target)

    folder.failed(stem).unlink(missing_ok=True)
    if f"{stem}.ipynb" not in files:
        discard_pages(folder, stem)
    put(f"failed/{stem}.ipynb", folder.failed(stem))
    put(f"logs/{stem}.log", folder.log(stem))
    for name in files:
        if name.startswith(f"{folder.stacks.name}/"):
            put(name, folder.stacks / Path(name).name)
    put(f"{stem}.ipynb", folder.of(stem, ".ipynb"))
    put(f".cache/{stem}.json", folder.parts(stem))
    put(f"{stem}.json", folder.of(stem, ".json"))
    pictures = folder.path / f"{stem}_files"
    shutil.rmtree(pictures, ignore_errors=True)
    for name in files:
        if name.startswith(f"{stem}_files/"):
            put(name, pictures / Path(name).name)
    for ending in (".html", ".md"):
        put(f"{stem}{ending}", folder.of(stem, ending))
    shutil.rmtree(part.parent, ignore_errors=True)


def discard_pages(folder: Folder, stem: str) -> None:
    """Remove the notebook and pages of a failed run: they belong to an earlier record."""
    for ending in (".ipynb", ".html", ".md"):
        folder.of(stem, ending).unlink(missing_ok=True)
    shutil.rmtree(folder.path / f"{stem}_files", ignore_errors=True)


def require_records(path: Path) -> Folder:
    """Return the result folder at `path`. Raises UserError, with the command that builds it, where it has no record."""
    folder = Folder(path)
    if not present(folder):
        command = "python build.py" if path.name == "proxy" else f"python build.py run --model M --scale {path.name}"
        raise UserError(f"{path}: holds no record; build first: {commands.at(command, path)}")
    return folder


def present(folder: Folder) -> list[tuple[str, str]]:
    """Return the (optimization, model) pairs with a record in the folder."""
    stems = (path.name.removesuffix(".json") for path in visible(folder.path, "*--*.json"))
    return [(optimization, model) for optimization, _, model in (stem.partition("--") for stem in stems)]


def stacks(folder: Folder) -> dict[str, str]:
    """Return file name → content of the stacks stored by searches, for a run on another machine."""
    paths = sorted(folder.stacks.glob("*.yaml"))
    return {path.name: path.read_bytes().decode("utf-8", "replace") for path in paths if path.is_file()}


def lay_out(folder: Folder, contents: Mapping[str, str]) -> None:
    """Write stacks returned by `stacks` into the folder, where its runs read them. Raises OSError."""
    folder.stacks.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder.stacks / name).write_bytes(content.encode())
