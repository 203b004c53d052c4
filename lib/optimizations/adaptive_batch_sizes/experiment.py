"""The protocol of adaptive batch sizes: the notebook's results, from the calibration to the answers.

The functions take a `TrafficStudy` and return plain data (rows, measurements, frames); nothing is displayed and no
policy is tuned here. Simulations of the policies are in `simulated`, replays on the real model in `real_model`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib.measure.compare import saved
from lib.measure.compare.costs import resources
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.serving import policy_comparison, slo
from lib.measure.serving.policy_comparison import ServingSetup
from lib.measure.serving.protocol import Served
from lib.measure.serving.slo import Objectives
from lib.measure.serving.validation import MOST_ERROR, SimulationError
from lib.measure.trackers import memory
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes import prefix_caching, real_model, schedule, simulated
from lib.optimizations.adaptive_batch_sizes.method import Adaptive
from lib.optimizations.adaptive_batch_sizes.prefix_caching import PrefixStudy
from lib.optimizations.adaptive_batch_sizes.real_model import RealModelTrial
from lib.optimizations.adaptive_batch_sizes.rivals import FixedSize
from lib.optimizations.adaptive_batch_sizes.study import ADAPTIVE, CHOOSING, TrafficStudy
from lib.optimizations.common.evidence.targets import is_reached

CLAIMS = (
    "At a constant rate the policy serves fewer requests in time than the best fixed size, by more than a twentieth.",
    "On the changing traffic, served by the real model, its goodput is no higher than that of the best fixed size.",
    "The simulation strays from the real server by more than a tenth.",
)
LEAST_AT_CONSTANT_RATE, LEAST_AT_CHANGING_RATE = 0.95, 1.15
ONE_SCHEDULE = "one trace's schedule, which other step times would make another"
SERVED = f"{schedule.__name__}:workload"  # what the memory children do
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)

Row = dict[str, Any]


def primaries(size: int) -> dict[str, tuple[str, str]]:
    """Return the primary measurement of each dimension, declared before anything is served.

    Performance and efficiency come from the replays against the fixed `size`, which was chosen on other traffic;
    resources are the weights, which no policy changes.
    """
    workload = real_model.workload(size)
    return {
        "performance": ("goodput_requests_per_second", workload),
        "accuracy": ("f1_macro", "classify"),
        "resources": ("weights_bytes", "load"),
        "efficiency": ("energy_joules_per_token", workload),
    }


def conditions(setup: ServingSetup) -> str:
    """Return the objectives, the cache's bound and the number of timed calls as one line."""
    first, token = 1000 * setup.objective.first_token_seconds, 1000 * setup.objective.token_seconds
    text = f"Objectives: {first:.0f} ms to the first token, {token:.1f} ms per token. "
    bound = setup.limits.cache_bytes
    text += f"Cache at most {bound / 2**20:.1f} MiB. " if bound is not None else ""
    return text + f"At most {setup.limits.rows} rows. {setup.times.samples} timed calls."


def finding(what: str, served: Served, objective: Objectives) -> str:
    """Return the finding of a timeline as one line: the share of counted requests within both objectives."""
    return f"{what}; within both objectives: {percent(slo.goodput_share(served, objective) or 0)}."


def step_curves(setup: ServingSetup, learned: Adaptive) -> pd.DataFrame:
    """Return ms per decode step by rows for each kind of request: as measured, and as learned by the policy."""
    points = []
    for name, lengths in setup.kinds.items():
        context = lengths.prompt_tokens + lengths.new_tokens // 2
        for arm, step in ((f"{name}, measured", setup.times.decode), (f"{name}, learned", learned.step_seconds)):
            points += [{"strength": rows, "value": 1000 * step(rows, context), "arm": arm} for rows in ROWS_DRAWN]
    return pd.DataFrame(points)


def controls(
    study: TrafficStudy, trial: RealModelTrial, prefixes: PrefixStudy
) -> list[tuple[str, str, list[Measurement]]]:
    """Return (name, purpose, measurements): the best fixed size against itself, the other policies, and
    prefix caching in both arms.
    """
    own = ("A/A", "the best fixed size replayed a second time in every round", [real_model.control(study, trial)])
    others = [*simulated.controls(study, trial.size, trial.carried), *trial.rivals.controls()]
    return [own, *others, prefixes.control(trial.carried)]


def at_constant_rates(study: TrafficStudy, rows: Sequence[Row], strays: SimulationError) -> tuple[bool | None, str]:
    """Return whether the policy falls short of the best fixed size at a constant rate, and the evidence.

    The evidence is an interval of goodput ÷ best fixed size for each such traffic, over its seeds and with the
    simulation error; different traffics are not pooled. The answer is True if any interval lies below
    LEAST_AT_CONSTANT_RATE, False if none reaches below it, and otherwise, or if simulations are not judged, None.
    """
    ends: dict[str, tuple[float, float] | None] = {}
    for row in rows:
        if (name := str(row["traffic"])) in policy_comparison.CONSTANT:
            size = int(row["best size"])
            fixed = study.goodputs(name, f"fixed {size}", partial(FixedSize, size))
            ends[name] = _interval(fixed, study.goodputs(name, ADAPTIVE, study.adaptive), strays)
    shown = [f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in _known(ends)]
    shown += [f"{name} no interval" for name, interval in ends.items() if interval is None]
    evidence = f"goodput ÷ best fixed size, simulated: {'; '.join(shown)}; limit {LEAST_AT_CONSTANT_RATE:g}"
    if strays.forbids:
        return None, f"not judged: {strays.forbids}; {evidence}"
    if any(high < LEAST_AT_CONSTANT_RATE for _, (_, high) in _known(ends)):
        return True, evidence
    upheld = ends and all(interval and interval[0] >= LEAST_AT_CONSTANT_RATE for interval in ends.values())
    return False if upheld else None, evidence


def _known(ends: Mapping[str, tuple[float, float] | None]) -> list[tuple[str, tuple[float, float]]]:
    return [(name, interval) for name, interval in ends.items() if interval is not None]


def _interval(fixed: Sequence[float], ours: Sequence[float], strays: SimulationError) -> tuple[float, float] | None:
    """Return the interval of ours ÷ fixed; None if a run served no request in time, or if there are too few runs."""
    if min(*fixed, *ours) <= 0 or len(fixed) < paired_stats.MINIMUM_BLOCKS:
        return None
    ratios = paired_stats.differences(fixed, ours)
    low, high = np.exp(strays.widened(float(np.median(ratios)), *paired_stats.median_interval(ratios)))
    return float(low), float(high)


# --- cost, targets, answers -------------------------------------------------------------------------------------------


def costs(
    loaded: Loaded, study: TrafficStudy, trial: RealModelTrial, calibration_seconds: float, effort: Effort
) -> list[Measurement]:
    """Return weights, cache per token, peak memory, and the seconds of the calibration.

    Raises AssertionError if the bytes of the cache differ from the formula.
    """
    model = loaded.model
    results = [item for item in resources(model, model, tokens=effort.prompt_tokens) if "weights" in item.metric]
    per_token = cost_model.kv_cache_bytes_per_token(model)
    assert abs(per_token - study.setup.times.bytes_per_token) < 1, "the cache does not hold what the formula gives"
    by = "by formula from the cache's shapes"
    results.append(measurement.counted("kv_cache_bytes_per_token", "decode", per_token, per_token, by))
    results += peaks(loaded, study, trial)
    by = "perf_counter, once; the policy itself needs no such table"
    return [*results, measurement.informative("apply_seconds", "calibrate", 0.0, calibration_seconds, by, ratio=None)]


def peaks(loaded: Loaded, study: TrafficStudy, trial: RealModelTrial) -> list[Measurement]:
    """Return the peak memory of fresh child processes that repeat each policy's schedule.

    The schedule is that of the replayed trace on which the policy's cache grows largest, the same in every child. Not
    judged: another run measures other step times and so gets another schedule.
    """
    weight = next(loaded.model.parameters())
    where = {"folder": str(loaded.folder)} if loaded.folder else {}
    named = {"name": loaded.name, "scale": loaded.scale, "random_weights": loaded.random_weights}
    arms = []
    for make in (lambda: FixedSize(trial.size), study.adaptive):
        calls, _ = schedule.largest(study.setup, trial.traces, make)
        arm: dict[str, Any] = {"workload": SERVED, "workload_arguments": {"calls": calls}, **where}
        arm |= {} if where else {"load": named}
        arm |= {"dtype": str(weight.dtype).removeprefix("torch."), "device": loaded.device}
        arm |= {"transform": saved.transform(loaded.model)}
        arms.append(memory.Arm(**arm))
    read = memory.measurements(*memory.peaks(*arms, turns=1, watched=False), workload=trial.workload)
    # Loading follows no schedule: its measurements carry their own reason for not being judged.
    served = [item for item in read if item.workload == trial.workload and item.verdict != "unavailable"]
    return [measurement.unjudged(item, ONE_SCHEDULE) if item in served else item for item in read]


def targets(rows: Sequence[Row], trial: RealModelTrial) -> list[Row]:
    """Return a row per target: the measured value, and whether it reaches the target."""
    constant = [row["adaptive ÷ best fixed"] for row in rows if row["traffic"] in policy_comparison.CONSTANT]
    least = min((value for value in constant if value is not None), default=None)
    changing = next((row["adaptive ÷ best rival"] for row in rows if row["traffic"] == "changing"), None)
    goals = (
        ("changing trace, real model: adaptive ÷ best fixed", trial.headline.ratio, "at least", LEAST_AT_CHANGING_RATE),
        *_real_rivals(trial),
        ("changing trace, simulated: adaptive ÷ best rival", changing, "at least", LEAST_AT_CHANGING_RATE),
        ("constant rates, simulated: least adaptive ÷ best fixed", least, "at least", LEAST_AT_CONSTANT_RATE),
        ("simulation error", trial.strays.share, "at most", MOST_ERROR),
    )
    forbidden = f"not judged: {trial.strays.forbids}" if trial.strays.forbids else None
    reached: list[Row] = [
        {"figure": name, "measured": value, "to reach": f"{how} {goal}"}
        | {"reached": (forbidden if ", simulated:" in name else None) or is_reached(value, how, goal)}
        for name, value, how, goal in goals
    ]
    reached[0]["reached"] = _reached(trial.headline)
    if trial.rivals.rounds:
        reached[1]["reached"] = trial.rivals.reaches(LEAST_AT_CHANGING_RATE)
    return reached


def _reached(headline: Measurement) -> bool | str:
    """Return whether the interval of the headline reaches its target; not judged if the headline has no verdict."""
    if headline.verdict not in ("better", "worse", "equivalent") or headline.ratio is None:
        return f"not judged: {headline.reason or headline.verdict}"
    low, high = headline.ci or (headline.ratio, headline.ratio)
    return "cannot tell" if low < LEAST_AT_CHANGING_RATE <= high else low >= LEAST_AT_CHANGING_RATE


def _real_rivals(trial: RealModelTrial) -> list[tuple[str, float | None, str, float]]:
    """Return the target against the best rival on the real model, if the rivals were replayed."""
    if not trial.rivals.rounds:
        return []
    name = "changing trace, real model: adaptive ÷ best rival"
    return [(name, trial.rivals.gain, "at least", LEAST_AT_CHANGING_RATE)]


def details(
    study: TrafficStudy, trial: RealModelTrial, by_size: Mapping[int, float], oracle: float, rows: Sequence[Row],
    attained: Mapping[str, float | None], reached: Sequence[Row],
) -> dict[str, tuple[Any, str, str]]:  # fmt: skip
    """Return the record's details: name → (value, provenance, source)."""
    times = study.setup.times
    by = simulated_by(study.setup)
    columns = "rows, columns, mean of perf_counter on the real model"
    hindsight = f"{by}; a schedule in hindsight for each of {len(CHOOSING)} seeds, the mean"
    traces = [trace.describe() for trace in (*study.traces("changing"), *trial.traces)]
    return {
        "traces": (traces, "derived", "seeds and phases"),
        "step_seconds": ([list(point) for point in times.measured], "measured", columns),
        "goodput_by_size": ({str(rows): value for rows, value in by_size.items()}, "estimated", by),
        "oracle_goodput": (oracle, "estimated", hindsight),
        "traffic": (list(rows), "estimated", by),
        "rate_attained": (dict(attained), "estimated", by),
        "simulation": (trial.rows, "measured", "against the replays on the real model"),
        "rivals": (trial.rivals.rows(), "measured", trial.rivals.caption),
        "figures": (list(reached), "estimated", by),
    }


def simulated_by(setup: ServingSetup) -> str:
    """Return the source of a simulated number."""
    return f"simulation on {setup.times.samples} timed calls"


def beside_prefix_caching(loaded: Loaded, study: TrafficStudy, size: int, share: float) -> PrefixStudy:
    """Return the policies without and with cached document prefixes; see `prefix_caching.compare`."""
    return prefix_caching.compare(loaded, study, size, share)


def size_curve(by_size: Mapping[int, float]) -> list[Row]:
    """Return the points of the record's impact curve: goodput by fixed size."""
    return [{"arm": "one fixed size", "strength": rows, "value": value} for rows, value in by_size.items()]
