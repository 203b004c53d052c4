"""Caches the answers of unchanged models on this machine, so that no baseline answers the same questions twice.

Every template asks the same baseline the same questions. Its answers are stored under a key of everything that
determines them: the effective weights, the tokenizer with its chat template, how the model computes (class, parts and
experts per token of every block, attention, absorbed or not, dtype, device, threads), the workbench's code for
evaluation, the evaluation data, the versions of Python, torch and transformers, and the questions. The cache is used
only for the very object that `lib.models.loading.load` returned, or the absorbed baseline of its weights, with no other
method replaced since, never for a model produced by an optimization. Cached answers carry their date, and so do
measurements computed from them. An unreadable file counts as missing.

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
from typing import Any

import numpy as np
import torch

from lib.files import cache_folder
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.models.loading import Loaded
from lib.models.offload import streamer
from lib.models.structure import architecture
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import no_op
from lib.models.tasks import corpus, encoding

LIB = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("models", "measure")  # of `lib`, whose code may determine an answer

Arrays = dict[str, np.ndarray]


def known_or(loaded: Loaded, question: dict[str, object], ask: Callable[[], Arrays]) -> tuple[Arrays, str | None]:
    """Return the answers to `question` and, if they come from the cache, their day; else call `ask` and return None."""
    if not is_as_loaded(loaded):
        return ask(), None
    path = cache_folder() / "answers" / f"{_key(loaded, question)}.npz"
    if cached := _read(path):
        return cached
    answers = ask()
    _write(path, answers)
    return answers, None


def is_as_loaded(loaded: Loaded) -> bool:
    """Return whether `loaded.model` is still the loaded object: no method replaced (except for absorbed decoding), no
    foreign hook, and no weights streamed from files, which cannot be hashed.
    """
    if loaded.original is None or loaded.original() is not loaded.model:
        return False
    if streamer.streamer(loaded.model) is not None:
        return False
    return all(
        _own_forward(module) and not module._forward_hooks and not _foreign(module) for module in loaded.model.modules()
    )


def _own_forward(module: torch.nn.Module) -> bool:
    return "forward" not in vars(module) or mla_absorption.decodes_absorbed(module)


def _foreign(module: torch.nn.Module) -> list[object]:
    """Return the forward pre-hooks of `module` that are not the workbench's own."""
    return [hook for hook in module._forward_pre_hooks.values() if hook is not architecture.copy_hidden]


def _key(loaded: Loaded, question: dict[str, object]) -> str:
    config = anatomy(loaded.model).config
    parts = {
        "question": question,
        "weights": io.weights_hash(loaded.model),
        "model": [type(loaded.model).__name__, loaded.name, loaded.scale, str(loaded.folder)],
        "blocks": no_op.describe(loaded.model),  # a checkpoint states this in its manifest, not its configuration
        "prompts": _prompts(loaded),
        "how": [config._attn_implementation, getattr(config, "_experts_implementation", None)],
        "absorbed": mla_absorption.is_absorbed(loaded.model),
        "config": json.loads(config.to_json_string(use_diff=False)),
        "where": [loaded.device, str(loaded.dtype), torch.get_num_threads(), platform.node(), platform.machine()],
        "code": _code(),
        "data": corpus.data_hash(),
        "versions": [platform.python_version(), *map(version, ("torch", "transformers", "numpy"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _prompts(loaded: Loaded) -> list[object]:
    """Return what shapes a prompt: vocabulary, splits, merges, special tokens, chat template, image processor."""
    tokenizer = loaded.tokenizer
    processor: Any = loaded.image_processor
    return [
        None if tokenizer is None else encoding.fingerprint(tokenizer),
        processor.to_json_string() if hasattr(processor, "to_json_string") else repr(processor),
        loaded.tasks,
    ]


@cache
def _code() -> str:
    """Return a hash of all code that may determine an answer."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE_FOLDERS for path in (LIB / folder).rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, str] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            answers = {name: file[name] for name in file.files}
        return answers, str(answers.pop("day"))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # a damaged archive raises what its format raises
        if type(error).__module__ in ("zipfile", "zlib"):
            return None
        raise


def _write(path: Path, answers: Arrays) -> None:
    """Store answers; a folder that is not writable is ignored."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    named: dict[str, Any] = {"day": np.array(datetime.now(timezone.utc).date().isoformat()), **answers}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, **named)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
