"""Checks that a folder is a complete checkpoint of a model, without torch, before anything runs.

Reads the configuration, the index and the headers of the safetensors files, not the weights themselves: a file that is
shorter than its header says is found, a flipped bit is not.
"""

import json
import struct
from pathlib import Path

from lib.errors import UserError
from lib.models import parameters

MANIFEST = "workbench.json"
ALIGNMENT = 64  # bytes: a cache line, and the alignment of torch's own tensors on a CPU


def folder_of(name: str, checkpoints: str | Path) -> Path:
    """Return the folder of model `name` under `checkpoints`: `<checkpoints>/<name>`."""
    return Path(checkpoints).expanduser() / name


def check_checkpoint(name: str, folder: str | Path) -> Path:
    """Return `folder` if it is a complete checkpoint of model `name`. Raises UserError naming the faulty file."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoint folder for {name}; expected config.json and *.safetensors there")
    expected = parameters.read(name).architecture
    actual = _json(folder / "config.json").get("model_type")
    if actual != expected:
        raise UserError(
            f'{folder}/config.json: architecture "{actual}", but {name} is "{expected}"; give a checkpoint of {name}'
        )
    for file, tensors in _shards(folder).items():
        missing = set(tensors) - set(_header(folder / file))
        if missing:
            raise UserError(
                f"{folder / file}: the index names {sorted(missing)[0]} here, but the file does not hold it"
            )
    return folder


def _json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: missing; a checkpoint folder holds config.json and *.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return the weight files of `folder`, each with the tensors that the index expects there (none without index)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards: dict[str, list[str]] = {}
        for tensor, file in _json(index).get("weight_map", {}).items():
            shards.setdefault(file, []).append(tensor)
        if not shards:
            raise UserError(f"{index}: names no tensor")
        return shards
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no *.safetensors file")
    return {file: [] for file in files}


def _header(path: Path) -> dict:
    """Return the header of a safetensors file: tensor name → dtype, shape, offsets. Raises UserError if truncated."""
    if not path.is_file():
        raise UserError(f"{path}: missing, though the index names it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise UserError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{path}: the header is not readable; the file is damaged") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise UserError(f"{path}: truncated: {size} bytes, but its header describes {end}; copy it again")
    return header


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the weight files of `folder`, by name."""
    folder = Path(folder)
    return {name: tuple(entry["shape"]) for file in _shards(folder) for name, entry in _header(folder / file).items()}


def tensor_places(folder: str | Path) -> dict[str, tuple[Path, int, int, str, tuple[int, ...]]]:
    """Return the place of every tensor: name → (file, offset in bytes, length in bytes, dtype as stored, shape).

    Raises UserError for a missing or truncated file, and for a tensor that the index names but no file holds.
    """
    folder = Path(folder)
    places = {}
    for file, expected in _shards(folder).items():
        path = folder / file
        header = _header(path)
        if missing := sorted(set(expected) - set(header)):
            raise UserError(f"{path}: the index names {missing[0]} here, but the file does not hold it")
        with path.open("rb") as opened:
            start = 8 + struct.unpack("<Q", opened.read(8))[0]
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            places[name] = (path, start + first, last - first, entry["dtype"], tuple(entry["shape"]))
    return places
