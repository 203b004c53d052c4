"""Times two models on the three standard workloads and puts each ratio beside its noise floor and its physical bound.

The composition that every template uses: prefill of one prompt, decode of one stream, decode of a batch; for each an
A/A control of the baseline, paired blocks, and what FLOPs and bytes predict. Knows nothing of how the models differ.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lib.measure import ceilings, cost, disturbance, measurement, statistics, timing, workloads
from lib.measure.effort import Effort
from lib.measure.measurement import Measurement
from lib.measure.workloads import Workload

# What is timed: name, metric, the quantity of one call in the metric's terms.
TIMED = {
    "prefill": ("prefill_tokens_per_second", "time_to_first_token_ms"),
    "decode": ("decode_tokens_per_second", "time_per_output_token_ms"),
    "batch decode": ("batch_decode_tokens_per_second",),
}


@dataclass(frozen=True)
class Speed:
    """What timing found. `bounds` has a row per workload and arm: time and bound of one call in ms, and what limits."""

    measurements: list[Measurement] = field(default_factory=list)
    control: list[Measurement] = field(default_factory=list)
    bounds: list[dict] = field(default_factory=list)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)


def compare(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_BT: torch.Tensor,
    effort: Effort,
    *,
    names: tuple[str, ...] = tuple(TIMED),
    differ_in: tuple[str, ...] = (),
    fallback: bool = False,
    invalid: str | None = None,
    seed: int = 0,
) -> Speed:
    """Time both models on the workloads `names` and return the measurements, the A/A control and the bounds.

    `prompt_BT`: prompts of a whole batch; single streams use the first. `differ_in`: conditions that are the
    optimization itself (`workloads.assert_same_conditions`). `fallback`: a slower kernel ran than the one meant.
    `invalid`: why the optimized model's output is degenerate; then nothing is timed and every speed is invalid.
    """
    if invalid:
        metrics = [(metric, name) for name in names for metric in TIMED[name]]
        return Speed([measurement.invalid(metric, _workload(name), invalid) for metric, name in metrics])
    found = Speed()
    weight = next(baseline.parameters())
    limits = ceilings.measure(weight.device.type, weight.dtype)
    zeros = cost.zero_share(optimized)
    for name in names:
        arms = make(baseline, prompt_BT, effort, name), make(optimized, prompt_BT, effort, name)
        workloads.assert_same_conditions(*arms, except_for=differ_in)
        options = {"blocks": effort.blocks, "iterations": timing.iterations_for(arms[0]), "seed": seed}
        options |= {"disturbance": disturbance.watch}
        floor, pairs = timing.a_a(arms[0], **options), timing.paired(*arms, **options)
        costs = tuple(_cost(model, arm) for model, arm in zip((baseline, optimized), arms))
        seconds = float(np.median(pairs.baseline_seconds)), float(np.median(pairs.optimized_seconds))
        found.seconds[name] = seconds
        for metric in TIMED[name]:
            quantity = _quantity(metric, arms[0])
            one = measurement.from_pairs(metric, _workload(name), pairs, quantity, floor)
            working_set = cost.weights_bytes(optimized)
            found.measurements.append(
                ceilings.explain(
                    one,
                    costs,
                    seconds,
                    limits,
                    zero_share=zeros,
                    fallback=fallback,
                    working_set_bytes=working_set,
                )
            )
            found.control.append(measurement.from_pairs(metric, _workload(name), floor, quantity, floor))
        if name == _workload(name):
            found.measurements.extend(ceilings.utilisation(name, costs, seconds, limits))
        found.bounds.extend(_bounds(name, pairs, costs, limits))
    return found


def make(model: nn.Module, prompt_BT: torch.Tensor, effort: Effort, name: str) -> Workload:
    """Return the workload called `name` (a key of TIMED) of one model."""
    if name == "prefill":
        return workloads.prefill(model, prompt_BT[:1])
    return workloads.decode(model, prompt_BT if name == "batch decode" else prompt_BT[:1], effort.new_tokens)


def _workload(name: str) -> str:
    return "decode" if name == "batch decode" else name


def _quantity(metric: str, arm: Workload) -> float:
    """Return what one call does: tokens for a rate; for a latency, the calls or steps that the time is divided by."""
    if metric.endswith("_ms"):
        return arm.new_tokens if arm.name == "decode" else 1
    return arm.tokens


def _cost(model: nn.Module, arm: Workload) -> cost.Cost:
    """Return FLOPs and bytes of one call, with the experts that decoding steps really hit."""
    if arm.name == "prefill":
        return cost.of(model, arm)
    with cost.experts_hit(model) as hit:
        arm.prepare()
        arm()
    return cost.of(model, arm, hit=hit.mean(tokens=arm.batch))


def _bounds(
    name: str, pairs: timing.Pairs, costs: tuple[cost.Cost, cost.Cost], limits: ceilings.Ceilings
) -> list[dict]:
    rows = []
    for arm, times, one in zip(("baseline", "optimized"), (pairs.baseline_seconds, pairs.optimized_seconds), costs):
        bound = ceilings.bound(one, limits)
        low, high = statistics.median_interval(times)
        limit = "compute" if bound.limited_by == "arithmetic" else "bandwidth"
        rows.append(
            {"workload": name, "arm": arm, "time": 1000 * float(np.median(times)), "bound": 1000 * bound.seconds}
            | {"low": 1000 * low, "high": 1000 * high, "limit": limit}
        )
    return rows
