"""Simulate the policies on every kind of traffic: rows for tables, frames for figures, measurements.

Each seed draws its step times anew; measurements carry the simulation error that the replays on the real model have
shown (`lib.measure.serving.validation`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import policy_comparison, slo
from lib.measure.serving.policy_comparison import CONSTANT, CONSTANT_SHARES, PolicyFactory, averaged
from lib.measure.serving.protocol import Served
from lib.optimizations.adaptive_batch_sizes.rivals import MARGIN, FixedSize, best_schedule
from lib.optimizations.adaptive_batch_sizes.study import ADAPTIVE, BLIND, CHOOSING, VARIANTS, TrafficStudy, mean_goodput

ORACLE_SIZES = (1, 2, 4, 8, 16, 32)
TAIL = "latency p95"
SHOWN = (
    "goodput", "goodput share", "first token late", "tokens late", TAIL, "between tokens p99", "batch", "unfinished",
)  # fmt: skip
FEW = 3  # seeds for kinds of traffic that get no verdict

Row = dict[str, Any]
Carry = Callable[[Measurement], Measurement]


def compare(study: TrafficStudy, traffic: str, policies: Mapping[str, PolicyFactory], **options: Any) -> list[Row]:
    """Return a row per policy on one kind of traffic: means over its traces."""
    rows = []
    for name, make in policies.items():
        runs = study.served(traffic, name, make, **options)
        row: Row = {"trace": traffic, "policy": name}
        summaries = [slo.summary(run, study.setup.objective) for run in runs]
        row |= averaged(summaries, SHOWN) | {TAIL: policy_comparison.in_every(summaries, TAIL)}
        rows.append(row | {"saturated": sum(run.saturated for run in runs)})
    return rows


def changing_rows(study: TrafficStudy, size: int) -> list[Row]:
    """Return a row per policy on the changing traces: the rivals, the variants of the adaptive policy, and itself."""
    policies = study.policies(size)
    ours = {ADAPTIVE: policies.pop(ADAPTIVE)}
    return compare(study, "changing", policies | study.variants() | ours)


def read_changing(rows: Sequence[Row]) -> tuple[str, str]:
    """Return two sentences on how to read `changing_rows`: the policy against its best variant and its best rival."""
    goodputs = {str(row["policy"]): float(row["goodput"] or 0.0) for row in rows}
    ours = goodputs.pop(ADAPTIVE)
    goodputs.pop(BLIND)
    if not ours > 0:
        return "The policy serves no request in time.", "There is nothing to compare the rivals with."
    variant, rival = (
        max(sorted(names), key=lambda name: goodputs[name]) for names in (set(VARIANTS), set(goodputs) - set(VARIANTS))
    )
    more = goodputs[variant] / ours
    first = f"No variant comes near the policy itself; the best, {variant}, serves {more:.2f} times as much in time."
    if more > 1 + MARGIN:
        first = f"A variant serves more in time than the policy itself: {variant}, {more:.2f} times as much."
    elif more >= 1 - MARGIN:
        first = f"A variant serves about as much in time as the policy itself: {variant}, {more:.2f} times as much."
    if not goodputs[rival] > 0:
        return first, "No rival serves a request in time."
    return first, f"The policy serves {ours / goodputs[rival]:.2f} times what the best rival does, {rival}."


def oracle_goodput(study: TrafficStudy, by_size: Mapping[int, float]) -> float:
    """Return the mean goodput of hindsight schedules of sizes, one per trace on which the fixed size was chosen.

    It is a mean like the values of `by_size`. The search starts from the best of these, so it is never worse.
    """
    peak = max(by_size, key=lambda size: by_size[size])
    sizes = [candidate for candidate in ORACLE_SIZES if candidate <= study.setup.limits.rows]
    traces, setup = _choosing(study), study.setup
    return sum(best_schedule(trace, setup.objective, setup.run, sizes, peak, 1)[1] for trace in traces) / len(traces)


def _choosing(study: TrafficStudy) -> list:
    seeds = [study.seeds[0] + more for more in CHOOSING]
    return policy_comparison.traces(study.setup, "changing", study.requests, seeds)


def over_sizes(study: TrafficStudy, size: int, by_size: Mapping[int, float], oracle: float) -> pd.DataFrame:
    """Return goodput by fixed size, on the traces on which the size was chosen.

    Policies without a fixed size are constant levels (column `arm`) on the same traces.
    """
    traces = _choosing(study)
    shown = {name: make for name, make in study.policies(size).items() if name not in (f"fixed {size}", "time-out")}
    levels = {name: mean_goodput(study, traces, make) for name, make in shown.items()} | {"oracle": oracle}
    points = [{"strength": rows, "value": value, "arm": "fixed size"} for rows, value in by_size.items()]
    ends = (min(by_size), max(by_size))
    points += [{"strength": rows, "value": value, "arm": name} for name, value in levels.items() for rows in ends]
    return pd.DataFrame(points)


def others(frame: pd.DataFrame) -> list[str]:
    """Return the arms of a frame other than the fixed size and the adaptive policy: figures draw them dashed."""
    return [arm for arm in frame.arm.unique() if arm not in ("fixed size", ADAPTIVE)]


def read_sizes(frame: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences on how to read `over_sizes`."""
    fixed = frame[frame.arm == "fixed size"]
    peak = fixed.loc[fixed.value.idxmax()]
    levels = frame[frame.arm != "fixed size"].groupby("arm").value.first()
    if not peak.value > 0:
        return "No fixed size serves a request in time.", "All goodputs are zero, so there is nothing to choose."
    near = fixed[fixed.value >= 0.95 * peak.value].strength
    first = (
        f"Of the sizes shown, {peak.strength:.0f} serves the most in time, {peak.value:.3g} requests/s; "
        f"{near.min():.0f} to {near.max():.0f} come within a twentieth of it."
    )
    second = (
        f"In simulation the adaptive policy reaches {levels[ADAPTIVE] / peak.value:.2f} of that peak, blind "
        f"{levels[BLIND] / peak.value:.2f}, and the oracle schedule of each trace {levels['oracle'] / peak.value:.2f}."
    )
    return first, second


# --- every kind of traffic --------------------------------------------------------------------------------------------


def every_traffic(study: TrafficStudy, size: int) -> list[Row]:
    """Return a row per kind of traffic: the goodput of each policy and of the fixed size chosen for that traffic."""
    rows = []
    for name in policy_comparison.NAMES:
        changing = name == "changing"
        own = size if changing else study.choose(name)[0]
        goodputs, count = {}, None if changing else FEW
        for policy, make in study.policies(own).items():
            goodputs[policy] = float(np.mean(study.goodputs(name, policy, make, count=count)))
        fixed, ours = goodputs.pop(f"fixed {own}"), goodputs[ADAPTIVE]
        traces = study.traces(name, count)
        offered = sum(sum(r.arrival >= t.warm_up for r in t.requests) / t.counted_seconds for t in traces) / len(traces)
        row: Row = {"traffic": name, "offered/s": offered, "best size": own, "best fixed": fixed} | goodputs
        best = max(fixed, *(value for policy, value in goodputs.items() if policy not in (ADAPTIVE, BLIND)))
        row |= {"adaptive ÷ best fixed": ours / fixed if fixed else None}
        rows.append(row | {"adaptive ÷ best rival": ours / best if best else None})
    return rows


def over_rates(study: TrafficStudy, rows: Sequence[Row]) -> tuple[pd.DataFrame, dict[str, float | None]]:
    """Return goodput by offered rate of chats for each policy, and the highest rate that each policy attains.

    A rate is attained if nine in ten requests meet both objectives. The fixed size is the one chosen at 0.9 of
    capacity.
    """
    named = f"constant {CONSTANT_SHARES[-2]:g}"
    size = next(int(row["best size"]) for row in rows if row["traffic"] == named)
    points, attained = [], {}
    names = [name for name in CONSTANT if name != "constant documents"]
    for policy, make in study.policies(size).items():
        arm = "fixed size" if policy == f"fixed {size}" else policy
        offered, shares = [], []
        for name in names:
            runs = study.served(name, policy, make, count=FEW)
            offered.append(float(np.mean([len(run.counted) / run.trace.counted_seconds for run in runs])))
            shares.append(_mean_share(study, runs))
            value = float(np.mean([slo.goodput(run, study.setup.objective) for run in runs]))
            points.append({"strength": offered[-1], "value": value, "arm": arm})
        attained[arm] = slo.attained_rate(offered, shares)
    return pd.DataFrame(points), attained


def _mean_share(study: TrafficStudy, runs: Sequence[Served]) -> float | None:
    shares = [slo.goodput_share(run, study.setup.objective) for run in runs]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def read_rates(attained: Mapping[str, float | None]) -> tuple[str, str]:
    """Return two sentences on how to read `over_rates`."""
    known = {name: rate for name, rate in attained.items() if rate}
    if "fixed size" not in known or ADAPTIVE not in known:
        first = "At no rate do the fixed size and the adaptive policy both serve nine in ten requests in time."
        return first, "So there are no highest rates to compare."
    highest = max(known.values())
    best = "; ".join(name for name, rate in known.items() if rate == highest)  # all that keep up with the last rate tie
    first = (
        f"With nine in ten requests in time the fixed size serves {known['fixed size']:.3g} requests/s, the adaptive "
        f"policy {known[ADAPTIVE]:.3g}."
    )
    return first, f"The highest such rate, {highest:.3g} requests/s, is that of: {best}."


def other_batching(study: TrafficStudy) -> tuple[list[Row], str]:
    """Return the rows of the changing trace with the other kind of batching, for two seeds, and a caption."""
    other = study.other_batching()
    size, _ = other.choose("changing", count=1)
    caption = f"The changing trace with {other.setup.batching}-level batching; best fixed size there: {size}"
    return compare(other, "changing", other.policies(size), count=2), caption


# --- measurements -----------------------------------------------------------------------------------------------------


def goodput(
    study: TrafficStudy, traffic: str, size: int, policy: str, make: PolicyFactory, workload: str
) -> Measurement:
    """Return the simulated goodput of a policy against the fixed `size` on one kind of traffic, seed by seed."""
    arms: dict[str, tuple[str, PolicyFactory]] = {
        "baseline": (f"fixed {size}", partial(FixedSize, size)),
        "optimized": (policy, make),
    }

    def goodputs(arm: str, jitter: int) -> list[float]:
        return study.goodputs(traffic, *arms[arm], again=bool(jitter))

    source = (
        f"simulated: {len(study.seeds)} seeds of one trace, step times drawn again for each from "
        f"{study.setup.times.samples} timed calls of this run"
    )
    return policy_comparison.goodput_of(goodputs, "baseline", "optimized", workload, source)


def comparison(study: TrafficStudy, size: int, attained: Mapping[str, float | None], carry: Carry) -> list[Measurement]:
    """Return goodput on the changing trace and within capacity, tail latency, settling time, and the highest rate
    attained; `carry` adds the simulation error.

    The baseline is the fixed `size`, or, within capacity, the size chosen for that traffic.
    """
    within = "changing, within capacity"
    own, _ = study.choose(within)
    arms = (ADAPTIVE, study.adaptive)
    results = [
        carry(goodput(study, "changing", size, *arms, f"serve, simulated, fixed {size}")),
        carry(goodput(study, within, own, *arms, f"serve, simulated, within capacity, fixed {own}")),
        *_tails(study, size),
        _settling(study, size),
    ]
    source = f"simulated on {study.setup.times.samples} timed calls; nine in ten requests within both objectives"
    rates = attained.get("fixed size"), attained.get(ADAPTIVE)
    missing = None if all(rates) else "an arm does not serve nine in ten requests in time even at the lowest rate"
    metric, workload = "requests_per_second", "serve, nine in ten in time"
    if rates == (None, None):
        return [*results, measurement.unavailable(metric, workload, str(missing), source)]
    return [*results, measurement.informative(metric, workload, *rates, source, "estimated", reason=missing)]


def _tails(study: TrafficStudy, size: int) -> list[Measurement]:
    """Return tail latencies of both arms on the changing traces, without a verdict.

    An arm whose latency is infinite on any trace has no value.
    """
    names = {
        "latency_p95_ms": TAIL,
        "latency_p99_ms": "latency p99",
        "time_between_tokens_p99_ms": "between tokens p99",
    }
    policies = ((f"fixed {size}", partial(FixedSize, size)), (ADAPTIVE, study.adaptive))
    runs = [study.served("changing", *policy) for policy in policies]
    arms = [[slo.summary(run, study.setup.objective) for run in each] for each in runs]
    unfinished = [int(sum(row["unfinished"] or 0 for row in arm)) for arm in arms]
    source = f"simulated: mean of {len(study.seeds)} seeds; unfinished, and of infinite latency: {unfinished[0]} and "
    source += f"{unfinished[1]} requests"
    workload = f"serve, simulated, fixed {size}"
    return [
        policy_comparison.mean_measurement(
            metric,
            workload,
            [[_milliseconds(policy_comparison.in_every(arm, key))] for arm in arms],
            source,
            ("too few requests finished", "too few requests of one arm finished"),
            n=len(study.seeds),
        )
        for metric, key in names.items()
    ]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _settling(study: TrafficStudy, size: int) -> Measurement:
    """Return the seconds from the load step until requests stay within their objectives: medians over the seeds.

    A seed that never settles counts as infinite.
    """
    policies = ((f"fixed {size}", partial(FixedSize, size)), (ADAPTIVE, study.adaptive))
    arms = [[_settled(study, run) for run in study.served("load step", *policy)] for policy in policies]
    unsettled = [sum(value is None for value in arm) for arm in arms]
    count, medians = len(study.seeds), [[slo.percentiles(arm).get("p50")] for arm in arms]
    source = f"simulated: median of {count} seeds of the load step; never settled: {unsettled[0]} and {unsettled[1]} "
    source += "of them, which count as infinite"
    reasons = "no arm settled in half of the seeds", "one arm did not settle in half of the seeds"
    return policy_comparison.mean_measurement("settling_seconds", "serve, load step", medians, source, reasons, n=count)


def _settled(study: TrafficStudy, served: Served) -> float | None:
    """Return the settling time of a run after the load step, which follows the warm-up and a calm phase."""
    starts = served.trace.starts
    return slo.settling_seconds(served, study.setup.objective, starts[2], starts[3])


def controls(study: TrafficStudy, size: int, carry: Carry) -> list[tuple[str, str, list[Measurement]]]:
    """Return (name, purpose, measurements) for each other policy on the same simulated traces."""
    policies = {name: make for name, make in study.policies(size).items() if name not in (f"fixed {size}", ADAPTIVE)}
    policies |= study.variants()
    workload = f"serve, simulated, fixed {size}"
    return [
        (
            name,
            "another policy on the same simulated traces",
            [carry(goodput(study, "changing", size, name, make, workload))],
        )
        for name, make in policies.items()
    ]
