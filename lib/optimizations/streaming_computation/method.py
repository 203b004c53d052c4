"""Streaming computation: a model larger than its memory, a text longer than its cache, tokens as they are generated.

Six variants, each of which can be used alone:

- weights: blocks, head and embeddings are read from safetensors just in time, the next one while this one computes, or
  are used in the page cache without a copy; only the experts that tokens are routed to are read, and some are cached
  (`lib.models.offload`; FlexGen, Sheng et al. 2023; LLM in a flash, Alizadeh et al. 2024);
- prompts in chunks: bounded memory for activations (`lib.models.decoding.chunked`);
- logits in chunks (`chunked.losses`);
- absorbed latent attention: no expansion of the cache at every token (DeepSeek-V2, 2024;
  `lib.models.decoding.mla_absorption`);
- sinks and a window: endless text in constant memory, forgetting tokens outside the window (`sink_window`;
  StreamingLLM, 2024);
- tokens one by one (`chunked.tokens`).

`apply` combines the first four, none of which changes an answer beyond rounding. The window does, so it is not part of
`apply` but a cache that the caller passes. Independent of measurement.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.models.checkpoints import io
from lib.models.decoding import chunked, mla_absorption
from lib.models.offload import streamer
from lib.models.structure import beyond_files
from lib.optimizations.common.compression import options

WHERE = "streaming_computation"
SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "memory_ratio": {
        "type": "float",
        "range": (0.05, 1.0),
        "default": 0.35,
        "levels": (0.35, 0.6, 1.0),  # with 1.0, only absorbed decoding and chunks remain
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
    # Afterwards the weights are in a file: no step that reads or changes them can follow.
    "invalidates": ("whole channels", "stacked experts", "whole matrices", "dense matrices", "statistics"),
    "trial": {"memory_ratio": 1.0},  # in memory: reading weights from a file at every step is slow
    # At 1.0 the weights stay in memory, and any step may precede or follow.
    "at": ({"knobs": {"memory_ratio": 1.0}, "needs": (), "invalidates": ()},),
}


def applies_to(model: nn.Module) -> str | None:
    """Return None if the weights of `model` can be streamed, else the reason."""
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

    The weights are written to `folder` and read from there; the default is a temporary folder, removed together with
    the returned model. With `memory_ratio` 1.0 nothing is written, and the other options apply to a copy in memory.
    `calibration` is not used. Raises UserError for a value out of range, or for less memory than the model needs to run
    (the message names the minimum).
    """
    _check(memory_ratio, prefill_chunk, page_cache)
    options.applies(WHERE, model, applies_to)
    if memory_ratio == 1.0:
        return attach(copy.deepcopy(model), prefill_chunk=prefill_chunk, absorbed=absorbed)
    temporary = None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="streamed-")
        folder = temporary.name
    io.save(model, folder)
    device = str(next(model.parameters()).device)
    opening: dict[str, Any] = {"memory_ratio": memory_ratio, "page_cache": page_cache, "device": device}
    streamed = open_folder(folder, prefill_chunk=prefill_chunk, absorbed=absorbed, **opening)
    streamed.__dict__["temporary_folder"] = temporary  # removed together with the model
    return streamed


def open_folder(folder: Path | str, *, prefill_chunk: int = 256, absorbed: bool = True, **opening: Any) -> nn.Module:
    """Return the model that `apply` makes of the checkpoint in `folder`, without ever loading it whole.

    `opening` are the arguments of `lib.models.offload.streamer.open_streamed`.
    """
    model = attach(streamer.open_streamed(folder, **opening), prefill_chunk=prefill_chunk, absorbed=absorbed)
    arguments = {"prefill_chunk": prefill_chunk, "absorbed": absorbed, **opening}
    return beyond_files.note_opening(model, beyond_files.Opening(str(folder), f"{__name__}:open_folder", arguments))


def attach(model: nn.Module, *, prefill_chunk: int | None = None, absorbed: bool = False) -> nn.Module:
    """Make `model` read prompts in chunks and decode latents absorbed, in place; return the model."""
    if prefill_chunk is not None:
        chunked.chunk_prefill(model, prefill_chunk)
    return mla_absorption.absorb(model) if absorbed else model


def revert(model: nn.Module) -> nn.Module:
    """Return the original model, whole in memory and bit-identical; a streamed `model` cannot run afterwards."""
    stream = streamer.streamer(model)
    if stream is None:
        return mla_absorption.expand(chunked.whole_prefill(copy.deepcopy(model)))
    whole = io.load_folder(stream.file.folder, device=str(stream.device))
    stream.close()
    return whole


def _check(memory_ratio: float, prefill_chunk: int, page_cache: str) -> None:
    options.in_range(WHERE, "memory_ratio", memory_ratio, *SEARCH_SPACE["memory_ratio"]["range"])
    options.at_least(WHERE, "prefill_chunk", prefill_chunk, 1)
    options.one_of(WHERE, "page_cache", page_cache, streamer.PAGE_CACHE)
