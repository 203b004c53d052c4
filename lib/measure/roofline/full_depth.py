"""From a slice to the whole model: blocks as often as the whole model has them, embeddings, norms and head once.

How much longer a call would take at full depth is read from a few calls of its own, with a clock around every block:
every block counts for as many as it stands for (`lib.models.structure.slice_depth`), all else once. The judged times,
taken without such clocks, are multiplied by that. The numbers are derived and never judged: caches, memory traffic and
routing of a deep model may differ from a slice's. Knows no optimization.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import cost_model
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy

LOOKS = 2  # calls of each arm with clocks around its blocks; their median counts
LONG_SECONDS = 1.0  # of a call that is looked at once: clocks around its blocks are nothing beside it
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
    works: tuple,
    models: tuple[nn.Module, nn.Module],
    seconds: tuple[Sequence[float], Sequence[float]],
    looks: int = LOOKS,
) -> list[Measurement]:
    """Return the rate of workload `name` at full depth, of both arms; empty where the baseline is no slice.

    `works` are the workloads (baseline, optimized) of `models`, warm already; `seconds` the judged times of their
    calls, pair by pair.
    """
    if slice_depth.whole(models[0]) is None or name not in METRIC_OF:
        return []
    counts = _counts(models)
    if isinstance(counts, str):
        return [measurement.unavailable(METRIC_OF[name], name, counts)]
    looks = looks if np.median(seconds[0]) < LONG_SECONDS else 1
    longer: tuple[list[float], list[float]] = ([], [])
    kept = [len(work.step_seconds) for work in works]
    for turn in range(looks):
        for arm in (0, 1) if turn % 2 else (1, 0):
            longer[arm].append(times_longer(works[arm], models[arm], counts))
    for work, steps in zip(works, kept):
        del work.step_seconds[steps:]  # the clocks around blocks belong to no step
    rates = [[work.tokens / (one * np.median(by)) for one in arm] for work, arm, by in zip(works, seconds, longer)]
    source = f"the judged times; blocks' share of them from {looks} calls with clocks around each; {_said(models[0])}"
    found = measurement.from_samples(
        METRIC_OF[name], name, *rates, source=source, floor=None, provenance="derived", samples=False
    )
    return [found]


def times_longer(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> float:
    """Run `work` once and return how many times as long it would take with block i as often as `counts[i]`."""
    whole, deep = both_seconds(work, model, counts)
    return deep / whole


def whole_seconds(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> float:
    """Run `work` once and return the seconds that it would take with block i as often as `counts[i]`."""
    return both_seconds(work, model, counts)[1]


def both_seconds(work: Callable[[], object], model: nn.Module, counts: Sequence[float]) -> tuple[float, float]:
    """Run `work` once and return the seconds that it took, and those with block i as often as `counts[i]`."""
    if prepare := getattr(work, "prepare", None):
        prepare()
    with clocks([block.module for block in anatomy(model).blocks]) as spent:
        start = time.perf_counter()
        work()
        _synchronize()
        whole = time.perf_counter() - start
    return whole, whole + sum(seconds * (count - 1) for seconds, count in zip(spent, counts))


@contextmanager
def clocks(modules: Sequence[nn.Module]):
    """Yield a list with the seconds that each module has taken."""
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
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sizes(models: tuple[nn.Module, nn.Module]) -> list[Measurement]:
    """Return parameters, bytes of weights and cache per token at full depth; empty where the baseline is no slice."""
    if slice_depth.whole(models[0]) is None:
        return []
    counts = _counts(models)
    if isinstance(counts, str):
        return [measurement.unavailable(name, "load", counts) for name in (*SIZES, CACHE)]
    found = [
        _derived(name, "load", [size(m) + _more(m, size, counts) for m in models], models[0])
        for name, size in SIZES.items()
    ]
    return [*found, _derived(CACHE, "decode", [_cache_bytes(m, counts) for m in models], models[0])]


def _more(model: nn.Module, size: Callable[[nn.Module], float], counts: Sequence[float]) -> float:
    """What the blocks that the slice lacks would add."""
    return sum(size(block.module) * (count - 1) for block, count in zip(anatomy(model).blocks, counts))


def _cache_bytes(model: nn.Module, counts: Sequence[float]) -> float:
    elements = (block.attention.cache_elements_per_token for block in anatomy(model).blocks)
    return next(model.parameters()).element_size() * sum(n * count for n, count in zip(elements, counts))


def _derived(name: str, workload: str, values: Sequence[float], baseline: nn.Module) -> Measurement:
    return measurement.informative(name, workload, *values, _said(baseline), "derived")


def _said(baseline: nn.Module) -> str:
    held, whole = len(anatomy(baseline).blocks), len(slice_depth.whole(baseline))
    return f"each block of the slice's {held} as often as its kind among the whole model's {whole}, all else once"


def _counts(models: Sequence[nn.Module]) -> list[float] | str:
    """Return how many blocks each block stands for, in both arms, or why that cannot be told."""
    counts = slice_depth.stands_for(models[0])
    if isinstance(counts, str):
        return counts
    if any(getattr(model, "weights_in_memory_bytes", None) is not None for model in models):
        return "weights are streamed: what is held and read depends on the allowance, not on the depth alone"
    if len(anatomy(models[1]).blocks) != len(counts):
        return f"the optimized slice has {len(anatomy(models[1]).blocks)} blocks, the baseline {len(counts)}"
    return counts
