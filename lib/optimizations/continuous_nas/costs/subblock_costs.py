"""Time each part of each block on this device, and each of its replacements, alone and interleaved.

The real model reads a prompt and decodes one token. The inputs of each part are kept, and every replacement is run on
them, all in shuffled rounds. Modules of equal shapes share their samples. Everything outside the parts (embeddings,
norms, head, Python) is timed on the model stripped of its parts, minus the attentions that must stay: as the difference
of the whole model and all its parts it would carry the errors of both.

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

SKELETON = "skeleton"  # takes the place of a slot in keys

Seconds = dict[str, dict[str, float]]  # slot → option → seconds


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one prefill and of one decode step: per option of each slot, and for the rest of the model."""

    prefill: Seconds
    decode: Seconds
    prefill_rest: float
    decode_rest: float


@dataclass
class PartInput:
    """The arguments of one call of a part; `layer` is its layer of the cache if it is an attention."""

    args: tuple
    kwargs: dict
    layer: int = 0

    @property
    def cache_name(self) -> str | None:
        """The name of the keyword argument that is a cache; None if there is none."""
        return next((name for name, value in self.kwargs.items() if hasattr(value, "get_seq_length")), None)

    def call(self, module: nn.Module, cache: object) -> object:
        """Run `module` on these arguments, with another cache."""
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
    """Time every module of `modules[slot][option]` on the inputs of its slot; `locate(slot)` is (block, part).

    `model` is the unchanged model, whose own parts are the options "whole". Every option is called once per round,
    after one uncounted call.
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
    for turn in range(len(anatomy(model).blocks)):  # as many samples as the pooled parts of one shape
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
    """Return the inputs of each part of each block during prefill, and during the decode step after it."""
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
    """Return two calls of `module`: prefill (with a new cache each time), and decoding one token after it."""
    if reading.cache_name is None:
        return lambda: reading.call(module, None), lambda: stepping.call(module, None)
    fresh = functools.partial(_empty, reading.kwargs[reading.cache_name], reading.layer)
    filled = fresh()
    reading.call(module, filled)
    return lambda: reading.call(module, fresh()), lambda: stepping.call(module, filled)


def _empty(cache: Any, index: int) -> Any:
    """Return an empty cache whose only layer has the type of layer `index` of `cache`: with a sliding window the masks
    are as wide as what such a layer returns.
    """
    empty, layer = type(cache)(), cache.layers[index]
    if layer.is_sliding:
        empty.layers = [type(layer)(layer.sliding_window)]
    return empty


def _rounds(works: Mapping[tuple, Callable[[], object]], rounds: int, seed: int) -> dict[tuple, list[float]]:
    """Return seconds per call, `rounds` samples each, in shuffled order; the preparation of a workload is not timed."""
    on_device = torch.cuda.is_initialized()  # synchronizing would initialize a GPU that a CPU run does not use
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
    """Return the tenth percentile: a part takes tens of microseconds, and disturbances only ever add to that."""
    return float(np.quantile(samples, 0.1))


def signature(module: nn.Module) -> tuple:
    """Return everything that the cost of a module depends on: its type, its shapes, the number of experts per token,
    and the window of an attention (Gemma 3's blocks with and without a window have the same shapes).
    """
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    chosen = tuple(part.top_k for part in module.modules() if hasattr(part, "top_k"))
    window = attention(module).window if hasattr(module, "o_proj") else None
    return type(module).__name__, shapes, chosen, window
