"""What each part of each block costs on this device, and what its replacements would: timed by themselves, interleaved.

The real model reads a prompt and decodes one token; what enters each part then is kept, and every module that may
replace it is run on it, all of them in shuffled rounds. Modules of equal shapes share their samples. What is in no part
(embeddings, norms, head, Python) is timed on the model without its parts, less the attentions that must stay: as the
difference of the whole and all its parts it would carry the errors of both. Knows nothing of why a module is a
replacement.

Shapes: B batch, P prompt tokens.
"""

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.timing import workloads
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, attention, reset_rope_deltas
from lib.optimizations.continuous_nas.replacement_library import PARTS, must_attend, skeleton

SKELETON = "skeleton"  # in place of a slot

Seconds = dict[str, dict[str, float]]  # slot → option → seconds


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one prefill and of one decoded step: of each slot's options, and of the rest of the model."""

    prefill: Seconds
    decode: Seconds
    prefill_rest: float
    decode_rest: float


@dataclass
class PartInput:
    """What one part of a block is called with; `layer` is its layer of the cache, if it is an attention."""

    args: tuple
    kwargs: dict
    layer: int = 0

    @property
    def cache_name(self) -> str | None:
        """The name of the keyword argument that is a cache; None where there is none."""
        return next((name for name, value in self.kwargs.items() if hasattr(value, "get_seq_length")), None)

    def call(self, module: nn.Module, cache: object) -> object:
        """Run `module` on this, with another cache."""
        name = self.cache_name
        return module(*self.args, **(self.kwargs | ({name: cache} if name else {})))


@torch.inference_mode()
def measure(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, nn.Module]],
    locate: Callable[[str], tuple[int, str]],
    prompt_BP: torch.Tensor,
    *,
    rounds: int = 7,
    seed: int = 0,
) -> BlockTimes:
    """Time every module of `modules[slot][option]` where it would stand: `locate(slot)` is (block, part).

    `model` is the whole one, as it is; `modules` hold its own parts as "whole". Every option is called once per round,
    after one call that is not counted.
    """
    reading, stepping = _capture(model, prompt_BP)
    works: dict[tuple[str, str, str], Callable[[], object]] = {}
    indices: dict[nn.Module, object] = {}
    for slot, options in modules.items():
        place = locate(slot)
        for option, module in options.items():
            if hasattr(module, "layer_idx"):
                indices[module] = module.layer_idx
                setattr(module, "layer_idx", 0)  # noqa: B010
            prefill, decode = _works(module, reading[place], stepping[place])
            works[slot, option, "prefill"], works[slot, option, "decode"] = prefill, decode
    bare = skeleton(model)
    for turn in range(len(anatomy(model).blocks)):  # as many samples as parts of one shape have, which are pooled
        for kind, steps in (("prefill", 0), ("decode", 4)):
            work = workloads.decode(bare, prompt_BP, steps) if steps else workloads.prefill(bare, prompt_BP)
            works[SKELETON, str(turn), kind] = work
    try:
        samples = _rounds(works, rounds, seed)
    finally:
        for module, index in indices.items():
            setattr(module, "layer_idx", index)  # noqa: B010
    return _pooled(samples, modules, [f"{block:02d}.attention" for block in must_attend(model)])


def _capture(model: nn.Module, prompt_BP: torch.Tensor) -> tuple[dict, dict]:
    """Return what enters each part of each block while the model reads a prompt, and at the token after it."""
    entering: dict[tuple[int, str], PartInput] = {}

    def keep(place: tuple[int, str]):
        def hook(module, args, kwargs) -> None:
            entering[place] = PartInput(args, dict(kwargs), getattr(module, "layer_idx", 0))

        return hook

    parts = [(b.index, part, getattr(b, part).module) for b in anatomy(model).blocks for part in PARTS]
    hooks = [module.register_forward_pre_hook(keep((index, part)), with_kwargs=True) for index, part, module in parts]
    try:
        reset_rope_deltas(model)
        prompt_BP = prompt_BP.to(next(model.parameters()).device)
        output = model(input_ids=prompt_BP, use_cache=True, logits_to_keep=1)
        reading = dict(entering)
        model(
            input_ids=output.logits[:, -1:].argmax(-1),
            **cache_names.as_kwargs(cache_names.of(output)),
            use_cache=True,
            logits_to_keep=1,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return reading, entering


def _works(module: nn.Module, reading: PartInput, stepping: PartInput) -> tuple[Callable, Callable]:
    """Return what reads the prompt with `module` (a new cache each time), and what decodes one token after it."""
    if reading.cache_name is None:
        return lambda: reading.call(module, None), lambda: stepping.call(module, None)
    fresh = functools.partial(_empty, reading.kwargs[reading.cache_name], reading.layer)
    filled = fresh()
    reading.call(module, filled)
    return lambda: reading.call(module, fresh()), lambda: stepping.call(module, filled)


def _empty(cache: Any, index: int) -> Any:
    """Return an empty cache whose only layer is of the kind of layer `index` of `cache`: masks of a part that attends
    to a sliding window are as wide as what such a layer returns.
    """
    empty, layer = type(cache)(), cache.layers[index]
    if layer.is_sliding:
        empty.layers = [type(layer)(layer.sliding_window)]
    return empty


def _rounds(works: Mapping[tuple, Callable[[], object]], rounds: int, seed: int) -> dict[tuple, list[float]]:
    """Return seconds per call, `rounds` samples each, in shuffled order; a workload's own preparation is not timed."""
    on_device = torch.cuda.is_initialized()  # waiting would initialize a GPU that a run on a CPU leaves alone
    samples: dict[tuple, list[float]] = {key: [] for key in works}
    order, shuffle = list(works), random.Random(seed)
    for turn in range(rounds + 1):
        shuffle.shuffle(order)
        for key in order:
            work = works[key]
            if prepare := getattr(work, "prepare", None):
                prepare()
            if on_device:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_device:
                torch.cuda.synchronize()
            if turn:
                samples[key].append((time.perf_counter() - start) / getattr(work, "new_tokens", 1))
    return samples


def _pooled(
    samples: dict[tuple, list[float]], modules: Mapping[str, Mapping[str, nn.Module]], attending: Sequence[str]
) -> BlockTimes:
    signatures = {
        (slot, option): (slot.rpartition(".")[2], signature(module))
        for slot, options in modules.items()
        for option, module in options.items()
    }
    pools: dict[tuple, list[float]] = {}
    for (slot, option, kind), seconds in samples.items():
        if slot != SKELETON:
            pools.setdefault((kind, signatures[slot, option]), []).extend(seconds)
    typical = {key: _undisturbed(seconds) for key, seconds in pools.items()}
    times = {
        kind: {
            slot: {option: typical[kind, signatures[slot, option]] for option in options}
            for slot, options in modules.items()
        }
        for kind in ("prefill", "decode")
    }
    bare = {kind: [time for key in samples if key[::2] == (SKELETON, kind) for time in samples[key]] for kind in times}
    rest = {kind: _undisturbed(bare[kind]) - sum(times[kind][slot]["whole"] for slot in attending) for kind in times}
    return BlockTimes(times["prefill"], times["decode"], max(rest["prefill"], 0.0), max(rest["decode"], 0.0))


def _undisturbed(samples: list[float]) -> float:
    """Return the tenth percentile: a part takes tens of microseconds, and whatever else runs only ever adds to that."""
    return float(np.quantile(samples, 0.1))


def signature(module: nn.Module) -> tuple:
    """Return what the cost of a module depends on: its kind, its shapes, how many experts a token is sent to, and of an
    attention how many tokens it attends to (Gemma 3's blocks with and without a window have the same shapes).
    """
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    chosen = tuple(part.top_k for part in module.modules() if hasattr(part, "top_k"))
    window = attention(module).window if hasattr(module, "o_proj") else None
    return type(module).__name__, shapes, chosen, window
