"""The protocol of the adaptive batch size: every policy on the same simulated traffic, what it costs, what was reached.

The functions take a `TrafficStudy` and return plain data (rows, measurements, frames); nothing is displayed and no
policy is tuned here. The replays in real time are in `real_time`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib.measure.compare import speed
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.serving import policy_comparison, replay
from lib.measure.serving.policy_comparison import PolicyFactory, ServingSetup
from lib.measure.serving.traffic import Trace
from lib.measure.trackers import energy
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes.method import Adaptive, FixedSize, best_schedule
from lib.optimizations.adaptive_batch_sizes.real_time import MOST_SIMULATION_ERROR, RealTimeTrial
from lib.optimizations.adaptive_batch_sizes.study import TrafficStudy

CLAIMS = (
    "At a constant rate the policy serves fewer requests in time than the best fixed size, by more than a twentieth.",
    "On the changing traffic its goodput stays within the noise of the same trace with other jitter, or below.",
    "The simulation strays from the real server by more than a tenth.",
)
# What carries the word of each dimension: one measurement, declared before any is taken.
PRIMARIES = {
    "performance": ("goodput_requests_per_second", "serve"),
    "accuracy": ("f1_macro", "classify"),
    "resources": ("peak_tensor_bytes", "serve"),
    "efficiency": ("energy_joules_per_token", "serve"),
}
LEAST_AT_CONSTANT_RATE, LEAST_AT_CHANGING_RATE = 0.95, 1.15
SIZES_DRAWN = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # also those of which an oracle schedule is made
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)

Row = dict[str, Any]


def conditions(setup: ServingSetup) -> str:
    """Return the objectives, the cache's bound and the number of timed calls as one line."""
    first, token = 1000 * setup.objective.first_token_seconds, 1000 * setup.objective.token_seconds
    text = f"Objectives: {first:.0f} ms to the first token, {token:.1f} ms per token. "
    bound = setup.limits.cache_bytes
    text += f"Cache at most {bound / 2**20:.1f} MiB. " if bound is not None else ""
    return text + f"{setup.times.samples} timed calls."


def step_curves(setup: ServingSetup, learned: Adaptive) -> pd.DataFrame:
    """Return ms per decode step over rows for each kind of request: measured, and what the policy has learned."""
    points = []
    for name, lengths in policy_comparison.KINDS.items():
        context = lengths.prompt_tokens + lengths.new_tokens // 2
        for arm, step in ((f"{name}, measured", setup.times.decode), (f"{name}, learned", learned.step_seconds)):
            points += [{"strength": rows, "value": 1000 * step(rows, context), "arm": arm} for rows in ROWS_DRAWN]
    return pd.DataFrame(points)


# --- the changing traffic ---------------------------------------------------------------------------------------------


def oracle_goodput(traffic: TrafficStudy, size: int) -> float:
    """Return the goodput of a schedule of sizes found in hindsight from `size`, mean of the first two seeds."""
    setup = traffic.setup
    schedules = [
        best_schedule(trace, setup.objective, setup.run, SIZES_DRAWN, size, 1) for trace in traffic.changing[:2]
    ]
    return sum(value for _, value in schedules) / len(schedules)


def changing_rows(traffic: TrafficStudy, size: int) -> list[Row]:
    """Return a row per policy on the changing traces, the smallest and the largest fixed size last."""
    extremes = {"fixed 1": lambda: FixedSize(1), "fixed 32": lambda: FixedSize(32)}
    return policy_comparison.compare(traffic.setup, traffic.changing, traffic.rivals(size) | extremes)


def over_sizes(traffic: TrafficStudy, size: int, oracle: float) -> pd.DataFrame:
    """Return goodput over the fixed sizes on the first two seeds; policies without a size are levels (`arm`)."""
    setup, traces = traffic.setup, traffic.changing[:2]
    levels = {name: _mean(setup.goodputs(traces, make)) for name, make in list(traffic.rivals(size).items())[1:]}
    levels["oracle"] = oracle
    points = []
    for rows in SIZES_DRAWN:
        value = _mean(setup.goodputs(traces, partial(FixedSize, rows)))
        points.append({"strength": rows, "value": value, "arm": "fixed size"})
    for name, value in levels.items():
        points += [{"strength": rows, "value": value, "arm": name} for rows in (1, SIZES_DRAWN[-1])]
    return pd.DataFrame(points)


def read_sizes(frame: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences on how to read `over_sizes`."""
    fixed = frame[frame.arm == "fixed size"]
    peak = fixed.loc[fixed.value.idxmax()]
    levels = frame[frame.arm != "fixed size"].groupby("arm").value.first()
    if not peak.value > 0:
        return "No fixed size serves a request in time.", "Where goodput is zero there is nothing to choose."
    near = fixed[fixed.value >= 0.95 * peak.value].strength
    first = (
        f"Of the sizes drawn {peak.strength:.0f} serves the most in time, {peak.value:.3g} requests/s, and "
        f"{near.min():.0f} to {near.max():.0f} come within a twentieth of it."
    )
    second = (
        f"The adaptive policy reaches {levels['adaptive'] / peak.value:.2f} of that peak and the oracle schedule "
        f"{levels['oracle'] / peak.value:.2f}, which is what the choice of a size could give."
    )
    return first, second


def comparison(traffic: TrafficStudy, size: int) -> list[Measurement]:
    """Return the judged goodput (first), latencies, settling time, and the goodput within capacity.

    The baseline is the fixed `size`; within capacity it is the best fixed size of that traffic.
    """
    setup, arms = traffic.setup, (lambda: FixedSize(size), traffic.adaptive)
    stepping = policy_comparison.traces(setup, "load step", traffic.requests, traffic.seeds)
    within = policy_comparison.traces(setup, "changing, within capacity", traffic.requests, traffic.seeds)
    own, _ = traffic.best_fixed(within)
    return [
        policy_comparison.goodput(setup, traffic.changing, *arms, "serve"),
        *policy_comparison.latencies(setup, traffic.changing, *arms),
        policy_comparison.settling(setup, stepping, *arms),
        policy_comparison.goodput(setup, within, lambda: FixedSize(own), traffic.adaptive, "serve, within capacity"),
    ]


def controls(traffic: TrafficStudy, size: int) -> list[tuple[str, str, list[Measurement]]]:
    """Return (name, purpose, measurements): the best fixed size against itself, and two other policies."""
    policies = traffic.rivals(size)
    baseline = policies[f"fixed {size}"]
    arms = {"A/A": ("the best fixed size against itself", baseline)}
    arms |= {name: ("another policy on the same traces", policies[name]) for name in ("time-out", "AIMD")}
    return [
        (name, purpose, [policy_comparison.goodput(traffic.setup, traffic.changing, baseline, make, "serve")])
        for name, (purpose, make) in arms.items()
    ]


# --- every traffic ----------------------------------------------------------------------------------------------------


def every_traffic(traffic: TrafficStudy, size: int) -> list[Row]:
    """Return a row per kind of traffic: goodput of each policy against the best fixed size of that traffic."""
    rows = []
    for name in policy_comparison.NAMES:
        changing = name == "changing"
        traces = traffic.changing if changing else _two(traffic, name)
        own = size if changing else traffic.best_fixed(traces)[0]
        results = policy_comparison.compare(traffic.setup, traces, traffic.rivals(own))
        goodputs = {str(row["policy"]): row["goodput"] for row in results}
        fixed, ours = goodputs.pop(f"fixed {own}"), goodputs["adaptive"]
        offered = sum(len(trace.requests) / trace.seconds for trace in traces) / len(traces)
        row: Row = {"traffic": name, "offered/s": offered, "best size": own, "best fixed": fixed} | goodputs
        rows.append(row | {"adaptive ÷ best": ours / fixed if fixed else None, "saturated": results[-1]["saturated"]})
    return rows


def _two(traffic: TrafficStudy, name: str) -> list[Trace]:
    first = traffic.seeds[0]
    return policy_comparison.traces(traffic.setup, name, traffic.requests, (first, first + 1))


def constant_interval(traffic: TrafficStudy, rows: Sequence[Row]) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of goodput, adaptive ÷ best fixed size, over the constant traffics and their seeds.

    (None, None) where a run served no request in time, or where there are too few for an interval.
    """
    fixed, ours = [], []
    for row in rows:
        if row["traffic"] in policy_comparison.CONSTANT:
            traces, size = _two(traffic, str(row["traffic"])), int(str(row["best size"]))
            fixed += traffic.setup.goodputs(traces, partial(FixedSize, size))
            ours += traffic.setup.goodputs(traces, traffic.adaptive)
    if min(*fixed, *ours) <= 0 or len(fixed) < paired_stats.MINIMUM_BLOCKS:
        return None, None
    low, high = np.exp(paired_stats.median_interval(paired_stats.differences(fixed, ours)))
    return float(low), float(high)


def other_batching(traffic: TrafficStudy) -> tuple[list[Row], str]:
    """Return the rows of the changing trace with the other kind of batching, two seeds, and a caption."""
    setup = traffic.setup
    setup = replace(setup, batching="request" if setup.batching == "iteration" else "iteration")
    traces = traffic.changing[:2]
    size, _ = traffic.best_fixed(traces, setup)
    caption = f"The changing trace with {setup.batching}-level batching; best fixed size there: {size}"
    return policy_comparison.compare(setup, traces, traffic.rivals(size)), caption


# --- cost, targets, answers -------------------------------------------------------------------------------------------


def costs(
    loaded: Loaded, traffic: TrafficStudy, trial: RealTimeTrial, size: int, learned: Adaptive, effort: Effort,
    calibration_seconds: float,
) -> list[Measurement]:  # fmt: skip
    """Return weights, cache, true peaks, the seconds of the calibration, and the energy of one burst per policy.

    Raises AssertionError where the cache does not hold what the formula gives.
    """
    model = loaded.model
    results = [item for item in speed.resources(model, model, tokens=effort.prompt_tokens) if "weights" in item.metric]
    per_token = cost_model.kv_cache_bytes_per_token(model)
    assert abs(per_token - traffic.setup.times.bytes_per_token) < 1, "the cache does not hold what the formula gives"
    by = "by formula from the cache's shapes"
    results.append(measurement.counted("kv_cache_bytes_per_token", "decode", per_token, per_token, by))
    results += replay.peaks(loaded, *trial.replays)
    by = "perf_counter, once; the policy itself needs no such table"
    results.append(measurement.informative("apply_seconds", "calibrate", 0.0, calibration_seconds, by, ratio=None))
    if trial.trace.requests:
        short: dict[str, int] = {} if loaded.scale == "proxy" else {"each": 2, "new_tokens": 4}
        policies: tuple[PolicyFactory, ...] = (lambda: FixedSize(size), lambda: copy.deepcopy(learned))
        baseline, optimized = (
            replay.Burst(model, trial.trace, make, traffic.setup.limits, trial.prompt_of, **short) for make in policies
        )
        options: dict[str, Any] = {"blocks": effort.blocks, "device": loaded.device, "seed": traffic.seeds[0]}
        results += energy.per_token(baseline, optimized, workload="serve", **options)
    return results


def targets(rows: Sequence[Row], headline: Measurement, trial: RealTimeTrial) -> list[Row]:
    """Return a row per figure to reach: what was measured, and whether it was reached."""
    constant = [row["adaptive ÷ best"] for row in rows if row["traffic"] in policy_comparison.CONSTANT]
    least = min((value for value in constant if value is not None), default=None)
    goals = (
        ("constant rates: least ÷ best fixed", least, "at least", LEAST_AT_CONSTANT_RATE),
        ("changing trace ÷ best fixed", headline.ratio, "at least", LEAST_AT_CHANGING_RATE),
        ("simulation error, adaptive", trial.error.optimized, "at most", MOST_SIMULATION_ERROR),
        ("the same with the times of the beginning", trial.earlier.optimized, "at most", MOST_SIMULATION_ERROR),
    )
    return [
        {"figure": name, "measured": value, "to reach": f"{how} {goal}", "reached": _reached(value, how, goal)}
        for name, value, how, goal in goals
    ]


def _reached(value: float | None, how: str, goal: float) -> bool | str:
    if value is None:
        return "unknown"
    return value >= goal if how == "at least" else value <= goal


def details(
    traffic: TrafficStudy, trial: RealTimeTrial, by_size: Mapping[int, float], oracle: float, rows: Sequence[Row],
    reached: Sequence[Row],
) -> dict[str, tuple[Any, str, str]]:  # fmt: skip
    """Return the record's details: name → (value, provenance, source)."""
    times = traffic.setup.times
    by = simulated_by(traffic.setup)
    columns = "rows, columns, median of perf_counter on the real model"
    return {
        "traces": ([trace.describe() for trace in (*traffic.changing, trial.trace)], "derived", "seeds and phases"),
        "step_seconds": ([list(point) for point in times.measured], "measured", columns),
        "goodput_by_size": ({str(rows): value for rows, value in by_size.items()}, "estimated", by),
        "oracle_goodput": (oracle, "estimated", f"{by}; schedule in hindsight, two seeds"),
        "traffic": (list(rows), "estimated", by),
        "simulation": (trial.rows, "measured", "against one replay in real time"),
        "figures": (list(reached), "estimated", by),
    }


def simulated_by(setup: ServingSetup) -> str:
    """Return the source of a simulated number."""
    return f"simulation on {setup.times.samples} timed calls"


def size_curve(by_size: Mapping[int, float]) -> list[Row]:
    """Return the points of the record's impact curve: goodput over the fixed sizes."""
    return [{"arm": "one fixed size", "strength": rows, "value": value} for rows, value in by_size.items()]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
