"""Streaming computation: a model larger than its memory, a context longer than its memory, tokens as they come.

Six variants, each in `lib.models` and each switched on alone:

- weights: blocks, head and embeddings read from safetensors just in time, the next one while this one computes, or
  used in the page cache without a copy; of routed experts only those that are asked for, with a cache (`streamed`,
  `filepages`, `expertcache`; FlexGen, Sheng et al. 2023; LLM in a flash, Alizadeh et al. 2024);
- prompts in chunks: bounded memory for activations (`chunked`);
- logits in chunks (`chunked.losses`);
- absorbed latent attention: no expansion of the cache at every token (`absorbed`; DeepSeek-V2, 2024);
- sinks and a window: endless text in constant memory, and no memory of what left (`windowed`; StreamingLLM, 2024);
- tokens handed out one by one (`chunked.tokens`).

`apply` puts the first four together; none of them changes an answer beyond rounding. The window does, and is therefore
never part of `apply`: it is a cache that the caller gives. Knows nothing of measuring.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.decoding import chunked
from lib.models.decoding import mla_absorption as latent
from lib.models.offload import streamer

SEARCH_SPACE = {
    "memory_ratio": {
        "type": "float",
        "range": (0.05, 1.0),
        "default": 0.35,
        "levels": (0.35, 0.6, 1.0),  # all in memory is a choice of its own: absorbed decoding and chunks alone
        "help": "share of the weights allowed in memory; 1.0 streams nothing",
    },
    "prefill_chunk": {
        "type": "int",
        "range": (1, 65536),
        "default": 256,
        "levels": (64, 256, 1024),
        "help": "tokens of a prompt read at a time",
    },
    "absorbed": {"type": "categorical", "choices": (True, False), "default": True},
    "page_cache": {"type": "categorical", "choices": streamer.PAGE_CACHE, "default": "keep"},
}

COMPOSES = {
    "touches": ("execution",),
    "needs": ("dense storage",),
    # Its weights lie in a file from then on: nothing that reads or changes them can follow.
    "invalidates": ("whole channels", "stacked experts", "whole matrices", "dense matrices", "statistics"),
    "trial": {"memory_ratio": 1.0},  # in memory: reading weights from a file at every step takes long
}


def applies_to(model: nn.Module) -> str | None:
    """Return None, or why the weights of `model` cannot be streamed."""
    if streamer.streamer(model) is not None:
        return "the weights of this model stream from a file already"
    return None


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]] = (),
    *,
    memory_ratio: float = 0.35,
    prefill_chunk: int = 256,
    absorbed: bool = True,
    page_cache: str = "keep",
    folder: Path | str | None = None,
) -> nn.Module:
    """Return a model with the same answers that holds at most `memory_ratio` of the weights in memory.

    The weights are written to `folder`, by default to a temporary one that goes when the returned model goes; they are
    read from there. With `memory_ratio` 1.0 nothing is written, and the rest applies to a copy in memory. `calibration`
    is not used. Raises UserError for a value out of range, or for less memory than the model can run in (naming the
    smallest).
    """
    _check(memory_ratio, prefill_chunk, page_cache)
    if reason := applies_to(model):
        raise UserError(f"streaming_computation: {reason}")
    if memory_ratio == 1.0:
        return attach(copy.deepcopy(model), prefill_chunk=prefill_chunk, absorbed=absorbed)
    kept = None
    if folder is None:
        kept = tempfile.TemporaryDirectory(prefix="streamed-")
        folder = kept.name
    io.save(model, folder)
    device = str(next(model.parameters()).device)
    options = {"memory_ratio": memory_ratio, "page_cache": page_cache, "device": device}
    found = open_folder(folder, prefill_chunk=prefill_chunk, absorbed=absorbed, **options)
    found.kept_folder = kept  # removed together with the model
    return found


def open_folder(folder: Path | str, *, prefill_chunk: int = 256, absorbed: bool = True, **options: object) -> nn.Module:
    """Open a checkpoint folder as `apply` would leave it, without ever loading it whole.

    `options` are those of `lib.models.offload.streamer.open_streamed`.
    """
    return attach(streamer.open_streamed(folder, **options), prefill_chunk=prefill_chunk, absorbed=absorbed)


def attach(model: nn.Module, *, prefill_chunk: int | None = None, absorbed: bool = False) -> nn.Module:
    """Let `model` read prompts in chunks and decode absorbed, in place; return the model."""
    if prefill_chunk is not None:
        chunked.chunk_prefill(model, prefill_chunk)
    return latent.absorb(model) if absorbed else model


def revert(model: nn.Module) -> nn.Module:
    """Return the model that `apply` was given, whole in memory, bit for bit; `model` cannot run any more."""
    made = streamer.streamer(model)
    if made is None:
        return latent.expand(chunked.whole_prefill(copy.deepcopy(model)))
    whole = io.load_folder(made.file.folder, device=str(made.device))
    made.close()
    return whole


def _check(memory_ratio: float, prefill_chunk: int, page_cache: str) -> None:
    low, high = SEARCH_SPACE["memory_ratio"]["range"]
    if not low <= memory_ratio <= high:
        raise UserError(f"streaming_computation: memory_ratio {memory_ratio} is out of range; expected {low} to {high}")
    if prefill_chunk < 1:
        raise UserError(f"streaming_computation: prefill_chunk {prefill_chunk}; expected at least 1 token")
    if page_cache not in streamer.PAGE_CACHE:
        known = ", ".join(streamer.PAGE_CACHE)
        raise UserError(f'streaming_computation: page_cache "{page_cache}"; expected one of {known}')
