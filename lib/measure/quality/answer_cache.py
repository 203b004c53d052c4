"""What an unchanged model answered before, kept on this machine: the same questions are not asked it again.

Every template asks the same baseline the same questions. Its answers are kept under a key of everything they follow
from: its effective weights, how it computes (class, attention, dtype, device, threads), the code of this workbench that
asks, the evaluation data, the versions of Python, torch and transformers, and the questions. A model that an
optimization made is never looked up nor kept: only the very object that `lib.models.loading.load` returned, with no
method replaced since. What is found says when it was answered, and so do the measurements made of it. A file that
cannot be read is as good as none.

Shapes: N items, L labels.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lib.measure.roofline.ceilings import cache_folder
from lib.models.checkpoints import io
from lib.models.loading import Loaded
from lib.models.structure import architecture
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import corpus

LIB = Path(__file__).resolve().parents[2]
ASKING = ("models", "measure")  # folders of `lib` whose code an answer may follow from

Arrays = dict[str, np.ndarray]


def known_or(loaded: Loaded, question: dict[str, object], ask: Callable[[], Arrays]) -> tuple[Arrays, str | None]:
    """Return the answers to `question` and the day on which they were given before; None where `ask` was called now."""
    if not is_as_loaded(loaded):
        return ask(), None
    path = cache_folder() / "answers" / f"{_key(loaded, question)}.npz"
    if found := _read(path):
        return found
    answered = ask()
    _write(path, answered)
    return answered, None


def is_as_loaded(loaded: Loaded) -> bool:
    """Return whether `loaded.model` is the object that was loaded, with no method replaced and no hook of others."""
    if loaded.original is None or loaded.original() is not loaded.model:
        return False
    return all(
        "forward" not in vars(module) and not module._forward_hooks and not _foreign(module)
        for module in loaded.model.modules()
    )


def _foreign(module: torch.nn.Module) -> list:
    return [hook for hook in module._forward_pre_hooks.values() if hook is not architecture.own]


def _key(loaded: Loaded, question: dict[str, object]) -> str:
    config = anatomy(loaded.model).config
    parts = {
        "question": question,
        "weights": io.weights_hash(loaded.model),
        "model": [type(loaded.model).__name__, loaded.name, loaded.scale, str(loaded.folder)],
        "how": [config._attn_implementation, getattr(config, "_experts_implementation", None)],
        "config": json.loads(config.to_json_string(use_diff=False)),
        "where": [loaded.device, str(loaded.dtype), torch.get_num_threads(), platform.node(), platform.machine()],
        "code": _code(),
        "data": corpus.data_hash(),
        "versions": [platform.python_version(), *map(version, ("torch", "transformers", "numpy"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a hash of all code that an answer may follow from."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ASKING for path in (LIB / folder).rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, str] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return found, str(found.pop("day"))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # a damaged archive raises what its format raises
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise


def _write(path: Path, answered: Arrays) -> None:
    """Keep answers; a folder that cannot be written to is no error here."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, day=np.array(datetime.now(timezone.utc).date().isoformat()), **answered)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
