"""Checks, without torch and before anything runs, that a folder is a complete checkpoint of a model.

Reads the configuration, the index and the headers of the safetensors files, but no weights: it detects a file that is
shorter than its header says, but no flipped bit.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import expanded
from lib.models import parameters
from lib.models.sources.reference import missing, require_no_adapter

MANIFEST = "workbench.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS = {  # per element, by safetensors dtype; tensors of other dtypes are not checked for their length
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
ALIGNMENT = 64  # bytes: a cache line, and the alignment of torch's own tensors on a CPU


def folder_of(name: str, checkpoints: str | Path) -> Path:
    """Return the folder of model `name` under `checkpoints`: `<checkpoints>/<name>`."""
    return expanded(checkpoints) / name


def check_checkpoint(name: str, folder: str | Path) -> Path:
    """Return `folder` if it is a complete checkpoint of model `name`; else raise UserError naming the faulty file."""
    folder = expanded(folder)
    try:
        return _checked(name, folder)
    except OSError as error:  # for example without permission
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _checked(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        itself = (folder.parent / "config.json").is_file()
        hint = f"; {folder.parent} is a checkpoint itself: give it as --model" if itself else ""
        raise UserError(
            f"{folder}: no checkpoint folder for {name}; expected config.json and *.safetensors there{hint}"
        )
    require_no_adapter(folder)
    config = _json(folder / "config.json")
    expected, actual = parameters.read(name).architecture, config.get("model_type")
    if not isinstance(actual, str) or not actual:
        raise UserError(f'{folder}/config.json: names no architecture; expected the key "model_type"')
    if expected and actual != expected:
        raise UserError(
            f'{folder}/config.json: architecture "{actual}", but {name} is "{expected}"; give a checkpoint of {name}'
        )
    if (folder / MANIFEST).is_file() and not isinstance(_json(folder / MANIFEST).get("blocks", []), list):
        raise UserError(f'{folder / MANIFEST}: key "blocks": expected a list, as "build.py apply" writes it')
    _require_chosen(folder, config)
    _require_places(folder)
    return folder


def _require_chosen(folder: Path, config: dict) -> None:
    """Raise UserError if the configuration names other weight files than those that are read here.

    Transformers follows the configuration, so a model loaded whole would differ from the same model streamed.
    """
    used = WEIGHTS if (folder / WEIGHTS).is_file() else INDEX
    if (chosen := config.get("transformers_weights")) not in (None, used):
        raise UserError(
            f'{folder}/config.json: key "transformers_weights": expected {used}, which is read here, got {chosen!r}; '
            f"remove the key and rename the weights that it names to {used}"
        )


def _require_places(folder: Path) -> None:
    """Raise UserError unless every tensor in the index lies in the file that it names, and in no other.

    With two copies, the order of the files would decide which is read.
    """
    shards = _shards(folder)
    by_tensor = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    for file, tensors in shards.items():
        stored = set(_header(folder / file))
        if missing := sorted(set(tensors) - stored):
            raise UserError(f"{folder / file}: the index names {missing[0]} here, but the file does not hold it")
        if misplaced := sorted(name for name in stored if by_tensor.get(name, file) != file):
            raise UserError(
                f"{folder / file}: holds {misplaced[0]}, which the index places in {by_tensor[misplaced[0]]}; remove "
                "one of the two, or copy the checkpoint into an empty folder"
            )


def _json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: {missing(path)}; a checkpoint folder holds config.json and *.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return the weight files of `folder`, each with the tensors that the index expects there (none without index).

    Chosen as in transformers: a single `model.safetensors` takes precedence over an index; shards need an index.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: []}
    if (folder / WEIGHTS).is_symlink():
        raise UserError(f"{folder / WEIGHTS}: {missing(folder / WEIGHTS)}")
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: holds {_instead(folder)}; expected {WEIGHTS}, or shards with {INDEX}")
    content = _json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: names no tensor")
    shards: dict[str, list[str]] = {}
    for tensor, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise UserError(f"{index}: {tensor} lies in {file!r}; expected the name of a file in the same folder")
        shards.setdefault(file, []).append(tensor)
    if not isinstance(content.get("metadata"), dict):  # transformers cannot read it without
        raise UserError(f'{index}: key "metadata": expected an object, got {_shown(content)}; write "metadata": {{}}')
    return shards


def _shown(content: dict) -> str:
    return repr(content["metadata"])[:40] if "metadata" in content else "nothing"


def _instead(folder: Path) -> str:
    """Return a phrase on the weights in a folder that cannot be used."""
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt"):
        if others := sorted(folder.glob(pattern)):
            return f"{others[0].name} and no {WEIGHTS}"
    return "no *.safetensors file"


def _header(path: Path) -> dict:
    """Return the header of a safetensors file: tensor name → dtype, shape, offsets. Raises UserError if damaged."""
    if not path.is_file():
        raise UserError(f"{path}: {missing(path)}, though the index names it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(f"{path}: a git-lfs pointer, not the weights; fetch them with git lfs pull")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= size - 8:
                raise UserError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: the header is not readable; the file is damaged") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        valid = all(
            isinstance(entry["dtype"], str) and _is_counts(entry["shape"]) and _is_counts(entry["data_offsets"])
            and len(entry["data_offsets"]) == 2
            for entry in header.values()
        )  # fmt: skip
    except (AttributeError, KeyError, IndexError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path}: the header describes no tensors; the file is damaged")
    if end != size:
        raise UserError(f"{path}: truncated: {size} bytes, but its header describes {end}; copy it again")
    places = sorted(entry["data_offsets"] for entry in header.values())
    if any(last < first for first, last in places) or any(a[1] != b[0] for a, b in zip([[0, 0], *places], places)):
        raise UserError(f"{path}: its header describes tensors that overlap or leave gaps; the file is damaged")
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        described = math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0) // 8
        if described and last - first != described:
            raise UserError(
                f"{path}: {name} has {last - first} bytes in the header, but its shape and {entry['dtype']} take "
                f"{described}; the file is damaged"
            )
    return header


def _is_counts(values: Any) -> bool:
    """Return whether `values` is a list of non-negative integers, as shapes and offsets are."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def weight_files(folder: str | Path) -> list[Path]:
    """Return the weight files of `folder` that are read, without shards left over from an earlier checkpoint."""
    folder = Path(folder)
    return [folder / file for file in _shards(folder)]


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
