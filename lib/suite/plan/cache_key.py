"""The content key of a job: a hash of everything its result depends on, part by part, so that a change can be named.

Parts: the template's cells, the resolved parameters (including the device) and the user's files that they name, the
model's dimensions, the modules of `lib` that the notebook and `lib/optimizations/<stem>.py` import, the weights with
their tokenizer, the evaluation data, and the versions of Python, torch and transformers. A hit means that the
measurement still belongs to this code. The machine is not part of the key; the record names it. Independent of records.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from lib.models import parameters as parameter_files
from lib.models.checkpoints import folder as checkpoint
from lib.models.sources import fetch as sources
from lib.models.sources import hub
from lib.suite.plan import dependencies, named_files
from lib.suite.plan.plan import ROOT, Job, proxy_folder

WHOLE_BYTES = 256 * 2**20
SAMPLES = 16
SAMPLE_BYTES = 2**20
MOST_HEADER = 10**8  # bytes, the limit of the safetensors format
TENSOR_BYTES = 2**12  # hashed at the beginning and in the middle of each tensor of a large file
# Suffixes of the checkpoint files that a loader may read, and the folder of additional chat templates.
OF_CHECKPOINT = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken")
CHAT_TEMPLATES = "additional_chat_templates"


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Hashes:
    """File hashes, stored by path, size and modification time, so that unchanged files are not read again."""

    def __init__(self, store: Path | None = None):
        self.store = store
        self.known: dict[str, list] = {}
        self.looked_up: dict[Any, Any] = {}  # results by file or folder, each computed once
        self.changed = False
        try:
            content = json.loads(store.read_text(encoding="utf-8")) if store else {}
            self.known = content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            pass  # only a cache: without it, all files are read again

    def of(self, path: Path) -> str:
        """Return the hash of a file's content; above 256 MiB, of its size, sixteen samples and, in a file of tensors,
        two pieces of each tensor, because a few retrained tensors could fall between the samples.
        """
        return self._once(path, lambda: self._of(path))

    def _of(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        known = self.known.get(str(path))
        if isinstance(known, list) and len(known) == 3 and known[:2] == mark:
            return known[2]
        self.known[str(path)] = [*mark, _content_hash(path, stat.st_size)]
        self.changed = True
        return self.known[str(path)][2]

    def of_folder(self, folder: Path) -> dict[str, str]:
        """Return relative path → hash of every file under `folder`; empty where there is none. Hidden files are left
        out: editors and macOS write them.
        """

        def find() -> dict[str, str]:
            paths = ((path.relative_to(folder), path) for path in sorted(folder.rglob("*")))
            return {
                name.as_posix(): self.of(path)
                for name, path in paths
                if not any(part.startswith(".") or part == "__pycache__" for part in name.parts) and path.is_file()
            }

        return dict(self._once(folder, find))

    def of_checkpoint(self, folder: Path) -> dict[str, str]:
        """Return relative path → hash of every file in the user's own checkpoint folder that a loader may read.

        Other files there are not part of the model, such as results, git's files, or another checkpoint.
        """

        def find() -> dict[str, str]:
            places = [folder, folder / CHAT_TEMPLATES]
            files = (path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_file())
            read = [path for path in files if path.suffix in OF_CHECKPOINT and not path.name.startswith(".")]
            return {path.relative_to(folder).as_posix(): self.of(path) for path in read}

        return dict(self._once(("checkpoint", folder), find))

    def of_model(self, name: str) -> parameter_files.ModelParameters:
        """Return the content of a model's parameter file."""
        return self._once(("model", name), lambda: parameter_files.read(name))

    def of_cells(self, cells: tuple) -> dict[str, str]:
        """Return the hash of each cell of a template."""
        return self._once(cells, lambda: {str(index): digest(cell) for index, cell in enumerate(cells)})

    def _once(self, what: Any, find: Callable[[], Any]) -> Any:
        if what not in self.looked_up:
            self.looked_up[what] = find()
        return self.looked_up[what]

    def save(self) -> None:
        """Store the hashes for the next build; an unwritable folder is not an error."""
        if not self.changed or not self.store:
            return
        part = self.store.with_name(f".{self.store.name}.{os.getpid()}.part")
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.known), encoding="utf-8")
            os.replace(part, self.store)
        except OSError:
            with contextlib.suppress(OSError):  # an unwritable folder does not allow removal either
                part.unlink(missing_ok=True)


def _content_hash(path: Path, size: int) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(SAMPLE_BYTES):
                sha.update(block)
        else:
            sha.update(f"{size} sampled".encode())
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                sha.update(file.read(SAMPLE_BYTES))
            for start, end in _tensors(file, size):
                for at in (start, (start + end) // 2):
                    file.seek(at)
                    sha.update(file.read(min(TENSOR_BYTES, end - at)))
    return sha.hexdigest()


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return the start and end offset of each tensor in a safetensors file, sorted; empty for any other file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MOST_HEADER):
        return []
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return sorted((8 + length + first, 8 + length + last) for first, last in ends)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def parts(job: Job, hashes: Hashes, reached: Mapping[str, list[Path]] | None = None) -> dict[str, dict[str, str]]:
    """Return part → name → hash or version: everything the job's result depends on.

    `reached` may map an optimization to the result of `dependencies.reached`, so that this is computed once per
    template.
    """
    modules = (reached or {}).get(job.optimization) or dependencies.reached(job.template)
    model = hashes.of_model(job.model)
    dimensions = {"dimensions": {"asked for": ", ".join(job.dimensions)}} if job.dimensions else {}
    asked = {"tasks": job.parameters.get("tasks") or model.tasks}  # tasks of the model's file may be files too
    files = _by_name((path, hashes.of(path)) for path in named_files.of({**job.parameters, **asked}))
    named = {"files": files} if files else {}
    return (
        dimensions
        | named
        | {
            "template": hashes.of_cells(job.template.cells),
            "parameters": {name: digest(value) for name, value in job.parameters.items() if name != "checkpoints"},
            "model": {
                "architecture": model.architecture,
                "config": digest(model.config(job.scale) if model.full else "that of the weights"),
                "tasks": digest(model.tasks),
            },
            "code": {path.relative_to(ROOT).as_posix(): hashes.of(path) for path in modules},
            "weights": _weights(job, model, hashes),
            "data": hashes.of_folder(parameter_files.PARAMETERS / "evaluation"),
            "versions": {
                "python": platform.python_version(),
                "torch": _version("torch"),
                "transformers": _version("transformers"),
            },
        }
    )


def _by_name(files: Iterable[tuple[Path, str]]) -> dict[str, str]:
    """Return file name → hash, without folders; a second file of the same name is called `name (2)`."""
    hashes: dict[str, str] = {}
    for path, value in files:
        names = itertools.chain([path.name], (f"{path.name} ({number})" for number in itertools.count(2)))
        hashes[next(name for name in names if name not in hashes)] = value
    return hashes


def of(parts_of_job: Mapping[str, Mapping[str, str]]) -> str:
    """Return the key of a job's parts."""
    return "sha256:" + digest(parts_of_job)


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _weights(job: Job, model: parameter_files.ModelParameters, hashes: Hashes) -> dict[str, str]:
    if job.parameters["random_weights"] or job.scale == "slice":
        return {"random": "by seed"}
    if job.scale == "proxy":
        return hashes.of_folder(proxy_folder(job.model))
    if job.parameters["checkpoints"]:
        return hashes.of_checkpoint(checkpoint.folder_of(job.model, job.parameters["checkpoints"]))
    if model.source.kind == "hub":
        return {model.checkpoint: hub.revision(model.checkpoint) or "unknown"}
    folder = sources.local(model.source)
    if folder is None:
        return {model.checkpoint: "not fetched"}
    return hashes.of_checkpoint(folder) if model.source.kind == "folder" else hashes.of_folder(folder)


def difference(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> str:
    """Return the differences between two jobs' parts: `code: lib/files.py changed`; empty if there are none."""
    changes = []
    for part in {**after, **before}:
        old, new = before.get(part, {}), after.get(part, {})
        changed = [name for name in new if name in old and old[name] != new[name]]
        added, removed = [name for name in new if name not in old], [name for name in old if name not in new]
        for names, verb in ((changed, "changed"), (added, "new"), (removed, "gone")):
            if names:
                changes.append(f"{part}: {_listed(names)} {verb}" if part != "template" else f"template: cells {verb}")
    return "; ".join(dict.fromkeys(changes))


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
