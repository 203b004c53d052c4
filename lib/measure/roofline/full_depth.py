"""Scales the numbers of a slice to the whole model: blocks count as often as in the whole model, embeddings, norms and
head once.

A few separate calls with a clock around every block show how many times as long a call would take at full depth: each
block counts for the number of blocks that it represents (`lib.models.structure.slice_depth`), everything else once. The
judged times, taken without such clocks, are multiplied by this factor. The results are derived and never judged, since
caches, memory traffic and routing of a deep model may differ from a slice's. Knows nothing about particular
optimizations.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_samples
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import cost_model
from lib.measure.timing.workloads import Workload
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy

LOOKS = 2  # calls of each arm with clocks around its blocks, of which the median is used
LONG_SECONDS = 1.0  # for calls this long one is enough: the cost of the clocks is then negligible
METRIC_OF = {
    "prefill": "full_depth_prefill_tokens_per_second",
    "decode": "full_depth_decode_tokens_per_second",
    "batch_decode": "full_depth_batch_decode_tokens_per_second",
}
SIZES: dict[str, Callable[[nn.Module], float]] = {
    "full_depth_parameters": cost_model.parameters,
    "full_depth_weights_bytes": cost_model.weights_bytes,
}
CACHE = "full_depth_kv_cache_bytes_per_token"


def speed(
    name: str,
    works: tuple[Workload, Workload],
    models: tuple[nn.Module, nn.Module],
    seconds: tuple[Sequence[float], Sequence[float]],
    looks: int = LOOKS,
    process: Sequence[int] | None = None,
) -> list[Measurement]:
    """Return the rate of workload `name` at full depth, for both arms; empty if the baseline is not a slice.

    `works` are the warm workloads (baseline, optimized) of `models`, `seconds` the judged times of their calls, pair by
    pair. `process` numbers the process of each pair, if there are several: the interval then is over processes.
    """
    if slice_depth.whole(models[0]) is None or name not in METRIC_OF:
        return []
    counts = _counts(models)
    if isinstance(counts, str):
        return [measurement.unavailable(METRIC_OF[name], name, counts)]
    looks = looks if np.median(seconds[0]) < LONG_SECONDS else 1
    factors: tuple[list[float], list[float]] = ([], [])
    steps = [len(work.step_seconds) for work in works]
    for turn in range(looks):
        for arm in (0, 1) if turn % 2 else (1, 0):
            factors[arm].append(times_longer(works[arm], models[arm], counts))
    for work, count in zip(works, steps):
        del work.step_seconds[count:]  # steps of the calls with clocks around their blocks
    base, opt = (
        [work.tokens / (time_ * float(np.median(factor))) for time_ in times]
        for work, times, factor in zip(works, seconds, factors)
    )
    source = f"the judged times; blocks' share of them from {looks} calls with clocks around each; {_source(models[0])}"
    if alone := slice_depth.alone(models[1]):
        source += f"; {len(alone)} of these blocks count once, since no other block is treated like them"
    options: dict[str, Any] = {"provenance": "derived", "samples": False, "process": process}
    return [paired_samples.from_samples(METRIC_OF[name], name, base, opt, source=source, floor=None, **options)]


def times_longer(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> float:
    """Run `work` once; return how many times as long it would take with block i repeated `counts[i]` times."""
    whole, deep = both_seconds(work, model, counts)
    return deep / whole


def whole_seconds(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> float:
    """Run `work` once; return the seconds that it would take with block i repeated `counts[i]` times."""
    return both_seconds(work, model, counts)[1]


def both_seconds(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> tuple[float, float]:
    """Run `work` once; return the seconds that it took, and would take with block i repeated `counts[i]` times."""
    if prepare := getattr(work, "prepare", None):
        prepare()
    with clocks([block.module for block in anatomy(model).blocks]) as spent:
        start = time.perf_counter()
        work()
        _synchronize()
        whole = time.perf_counter() - start
    return whole, whole + sum(seconds * (count - 1) for seconds, count in zip(spent, counts))


@contextmanager
def clocks(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Yield a list of the seconds that each module takes inside the context."""
    spent, began = [0.0] * len(modules), [0.0] * len(modules)

    def starts(index: int):
        def hook(*_) -> None:
            _synchronize()
            began[index] = time.perf_counter()

        return hook

    def ends(index: int):
        def hook(*_) -> None:
            _synchronize()
            spent[index] += time.perf_counter() - began[index]

        return hook

    hooks = []
    for index, module in enumerate(modules):
        hooks.append(module.register_forward_pre_hook(starts(index), prepend=True))
        hooks.append(module.register_forward_hook(ends(index)))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _synchronize() -> None:
    """Wait for the GPU if it is in use. A run on a CPU must not initialize it, or its records would name the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sizes(models: tuple[nn.Module, nn.Module]) -> list[Measurement]:
    """Return parameters, weight bytes and cache bytes per token at full depth; empty if the baseline is not a slice."""
    if slice_depth.whole(models[0]) is None:
        return []
    counts = _counts(models)
    if isinstance(counts, str):
        return [measurement.unavailable(name, "load", counts) for name in (*SIZES, CACHE)]
    weights = [
        _derived(name, "load", [size(m) + _missing(m, size, counts) for m in models], models[0])
        for name, size in SIZES.items()
    ]
    return [*weights, _derived(CACHE, "decode", [_cache_bytes(m, counts) for m in models], models[0])]


def _missing(model: nn.Module, size: Callable[[nn.Module], float], counts: Sequence[float]) -> float:
    """Return the size of the blocks that the slice lacks."""
    return sum(size(block.module) * (count - 1) for block, count in zip(anatomy(model).blocks, counts))


def _cache_bytes(model: nn.Module, counts: Sequence[float]) -> float:
    elements = (block.attention.cache_elements_per_token for block in anatomy(model).blocks)
    return next(model.parameters()).element_size() * sum(n * count for n, count in zip(elements, counts))


def _derived(name: str, workload: str, values: Sequence[float], baseline: nn.Module) -> Measurement:
    base, opt = values
    return measurement.informative(name, workload, base, opt, _source(baseline), "derived")


def _source(baseline: nn.Module) -> str:
    held, whole = len(anatomy(baseline).blocks), len(slice_depth.whole(baseline) or ())
    kinds = f"each of the slice's {held} blocks counts as often as its kind among the whole model's {whole}"
    return f"{kinds}, everything else once"


def _counts(models: Sequence[nn.Module]) -> list[float] | str:
    """Return how many blocks each block represents, in both arms, or the reason why that is unknown."""
    counts = slice_depth.stands_for(models[0], slice_depth.alone(models[1]))
    if isinstance(counts, str):
        return counts
    if any(getattr(model, "weights_in_memory_bytes", None) is not None for model in models):
        return "weights are streamed: what is held and read depends on the allowance, not on the depth alone"
    if len(anatomy(models[1]).blocks) != len(counts):
        return f"the optimized slice has {len(anatomy(models[1]).blocks)} blocks, the baseline {len(counts)}"
    return counts
