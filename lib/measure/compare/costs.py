"""What an optimization costs and saves besides time: counted resources, peak memory, and the break-even of applying it.

Every notebook that changes a model needs all of them. Knows nothing about particular optimizations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lib.measure.compare.footprint import footprint
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model, full_depth


def costs(
    baseline: nn.Module,
    optimized: nn.Module,
    effort: Effort,
    compared: Compared,
    apply_seconds: float | None = None,
    rate: str = "prefill_tokens_per_second",
) -> list[Measurement]:
    """Return counted resources, peak memory from child processes, and, given `apply_seconds`, the break-even.

    The break-even is derived from the first measurement of `rate` in `compared`. The measurements of `compared` itself
    are not returned again.
    """
    measurements = [
        *resources(baseline, optimized, tokens=effort.prompt_tokens),
        *footprint(baseline, optimized, effort),
    ]
    if apply_seconds is None:
        return measurements
    gain = next(timed for timed in compared.measurements if timed.metric == rate)
    return [*measurements, *break_even(apply_seconds, gain)]


def resources(
    baseline: nn.Module,
    optimized: nn.Module,
    *,
    tokens: int,
    costs: Mapping[str, Any] | None = None,
    baseline_costs: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Return counted and derived resources: parameters, weights, cache, and FLOPs and bytes per token at a context of
    `tokens` tokens.

    `costs` holds the cost-model options of the optimized model (absorbed, overhead, skip_zeros, density, stride,
    attended), `baseline_costs` the baseline's.
    """

    arms = ((baseline, baseline_costs or {}), (optimized, costs or {}))

    def of(formula: Callable[..., float], *arguments: int, options: Sequence[str] = ()) -> tuple[float, float]:
        names = ("skip_zeros", *options)
        base, opt = (
            formula(model, *arguments, **{n: chosen[n] for n in names if n in chosen}) for model, chosen in arms
        )
        return base, opt

    def plain(count: Callable[[nn.Module], float]) -> tuple[float, float]:
        return count(baseline), count(optimized)

    prefill = of(functools.partial(cost_model.prefill_flops, logits=1), tokens, options=("density", "stride"))
    rows = {
        "parameters": ("load", plain(cost_model.parameters), "counted, tied parameters once"),
        "active_parameters": (
            "decode",
            of(cost_model.active_parameters),
            "matrix elements that one token of text uses, uniform routing",
        ),
        "weights_bytes": ("load", plain(cost_model.weights_bytes), "parameters and buffers as stored"),
        "kv_cache_bytes_per_token": (
            "decode",
            plain(lambda model: cost_model.kv_cache_bytes_per_token(model, tokens)),
            "by formula from the cache's shapes",
        ),
        "prefill_flops_per_token": (
            "prefill",
            (prefill[0] / tokens, prefill[1] / tokens),
            f"formula, prompt of {tokens} tokens, head for the last token only, as timed",
        ),
        "decode_flops_per_token": (
            "decode",
            of(cost_model.decode_flops, tokens, options=("absorbed", "attended")),
            f"formula, context of {tokens} tokens",
        ),
        "decode_bytes_per_token": (
            "decode",
            of(cost_model.step_bytes, 1, tokens, options=("overhead", "attended")),
            f"formula, one sequence, context of {tokens} tokens, uniform routing",
        ),
    }
    counted = [measurement.counted(metric, work, *values, source) for metric, (work, values, source) in rows.items()]
    return counted + full_depth.sizes((baseline, optimized))


def break_even(apply_seconds: float, rate: Measurement, workload: str = "apply") -> list[Measurement]:
    """Return the time spent applying an optimization, and the number of tokens after which it has been saved again.

    `rate` is a measurement in tokens per second. Unless its verdict is better, the number of tokens is unavailable.
    """
    applied = measurement.informative("apply_seconds", workload, 0.0, apply_seconds, "perf_counter, once", ratio=None)
    if rate.verdict != "better" or not rate.baseline or not rate.ratio:
        reason = f"no gain in {rate.metric} was shown ({rate.verdict})"
        return [applied, measurement.unavailable("break_even_tokens", workload, reason)]
    saved = (1 - 1 / rate.ratio) / rate.baseline  # the judged ratio differs slightly from that of the medians
    source = f"time to apply over seconds saved per token of {rate.metric}"
    tokens = measurement.informative(
        "break_even_tokens", workload, None, apply_seconds / saved, source, "derived", reason="the baseline needs none"
    )
    return [applied, tokens]
