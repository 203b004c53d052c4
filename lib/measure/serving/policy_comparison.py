"""Policies against each other on the same traffic: traces by a rule, runs in simulation and in real time, measurements.

Rates are shares of the measured capacity, so that a trace means the same on every machine; which shares, lengths and
seeds is fixed here, before anything is served. The changing trace goes from half of the capacity for chats beyond it,
to documents beyond their capacity, and back: only beyond capacity does it matter how many are served together. A second
one stays within capacity throughout. Policies come in as functions that make a new one; this module knows none.
`goodput_of`, `averaged` and `mean_measurement` serve every comparison of this kind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import slo, step_times
from lib.measure.serving.server import MOST_ROWS, Limits, Policy, Served
from lib.measure.serving.simulator import simulate
from lib.measure.serving.slo import Objectives, Single
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import BURSTINESS, Lengths, Phase, Trace, make
from lib.models.loading import Loaded
from lib.models.tasks import tasks

CHAT, DOCUMENTS = Lengths(32, 48), Lengths(384, 16)
KINDS = {"chat": CHAT, "documents": DOCUMENTS}
CONTEXTS = (32, 128, 320, DOCUMENTS.longest)  # columns at which steps are timed
# Which steps are timed at real dimensions, where one takes up to seconds and its time is linear in the context.
CONTEXTS_AT_REAL_SIZE = (CONTEXTS[0], CONTEXTS[-1])
AT_REAL_SIZE = {"rows_measured": (1, 2, 4, 8, 16, 32), "prompt_tokens": 512}
CONSTANT_SHARES = (0.4, 0.7, 0.9)
BEYOND, WITHIN = (0.5, 1.2, 1.2, 0.5), (0.4, 0.8, 0.8, 0.4)  # of capacity, phase by phase
NEW_JITTER = 7919  # added to a seed for the same trace with other jitter: the A/A control
PHASES = ("chats", "more chats", "documents", "chats")

PolicyFactory = Callable[[], Policy]
Factory = TypeVar("Factory")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServingSetup:
    """What all policies share: measured step times, objectives, limits, batching, capacity per kind of request."""

    times: StepTimes
    objective: Objectives
    single: Single
    limits: Limits
    batching: str = "iteration"

    def capacity(self, lengths: Lengths) -> tuple[float, int]:
        """Return (requests per second, batch) that requests of these lengths allow at most; (0, 0) where none do."""
        return self.times.capacity(lengths, self.objective.token_seconds, self.limits.rows)

    def run(self, trace: Trace, policy: Policy, jitter: int = 0) -> Served:
        """Serve `trace` in simulation; the jitter follows from the trace's seed, so policies meet the same one."""
        return simulate(trace, policy, self.times, self.limits, seed=trace.seed + jitter, batching=self.batching)

    def goodputs(self, traces: Sequence[Trace], make_policy: PolicyFactory, jitter: int = 0) -> list[float]:
        """Return the simulated goodput of a new policy on each trace, requests/s."""
        return [slo.goodput(self.run(trace, make_policy(), jitter), self.objective) for trace in traces]


# --- the setup and its traffic ----------------------------------------------------------------------------------------


def prepare(
    loaded: Loaded,
    *,
    first_token_factor: float,
    token_factor: float,
    cache_share: float = 1.0,
    batching: str = "iteration",
    repeats: int = 5,
    seed: int = 0,
) -> ServingSetup:
    """Time the real model's steps and return the setup that all policies share.

    `cache_share` bounds the cache: the share of what MOST_ROWS of the longest requests would take. Requests that can no
    longer meet the first-token objective are served after the others. Raises UserError for a share or factor out of
    range.
    """
    if not 0 < cache_share <= 1:
        raise UserError(f"serving: cache_share {cache_share}; expected 0 < cache_share <= 1")
    contexts, options = _steps(loaded)
    times = step_times.measure(loaded.model, _text(loaded, seed), contexts, repeats=repeats, **options)
    single = Single.of(times, DOCUMENTS)
    objective = slo.objectives(single, first_token_factor, token_factor)
    longest = max(kind.longest for kind in KINDS.values())
    size = cache_share * MOST_ROWS * longest * times.bytes_per_token
    patience = slo.patience_seconds(objective, single)
    return ServingSetup(times, objective, single, Limits(MOST_ROWS, size, times.bytes_per_token, patience), batching)


def with_bracketing_step_times(
    loaded: Loaded, setup: ServingSetup, run: Callable[[], Result], seed: int = 0
) -> tuple[ServingSetup, Result]:
    """Return the same setup with the step times measured directly before and after `run()`, and what that returned."""
    contexts, options = _steps(loaded)
    repeats = 2 if loaded.scale == "proxy" else 1
    times, result = step_times.with_bracketing_step_times(
        loaded.model, _text(loaded, seed), contexts, run, repeats=repeats, **options
    )
    return replace(setup, times=times), result


def _steps(loaded: Loaded) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the contexts at which steps are timed, and which steps."""
    return (CONTEXTS, {}) if loaded.scale == "proxy" else (CONTEXTS_AT_REAL_SIZE, AT_REAL_SIZE)


def _text(loaded: Loaded, seed: int) -> torch.Tensor:
    """Return the text [T] on which steps are timed."""
    return tasks.text_windows(loaded, "final", 4, CONTEXTS[-1], seed).flatten()


def facts(setup: ServingSetup) -> list[dict[str, object]]:
    """Return a row per kind of request: what it takes alone, what capacity allows, whether objectives can be met."""
    rows: list[dict[str, object]] = []
    for name, lengths in KINDS.items():
        alone, (rate, batch) = Single.of(setup.times, lengths), setup.capacity(lengths)
        reason = slo.unattainable(setup.times, setup.objective, lengths)
        row: dict[str, object] = {"requests": name, "tokens in, out": f"{lengths.prompt_tokens}, {lengths.new_tokens}"}
        row |= {"prefill alone, ms": 1000 * alone.prefill_seconds, "step alone, ms": 1000 * alone.step_seconds}
        row |= {"capacity, requests/s": rate, "at batch": batch}
        rows.append(row | {"objectives": reason or ("can be met" if rate else "missed once requests join")})
    return rows


def trace(setup: ServingSetup, name: str, requests: float, seed: int) -> Trace:
    """Return one of the traces `NAMES`, about `requests` requests in each phase. Rates follow from the capacity."""
    chat, documents = setup.capacity(CHAT)[0], setup.capacity(DOCUMENTS)[0]
    plans = {f"constant {share:g}": [(share * chat, CHAT)] for share in CONSTANT_SHARES}
    plans |= {
        "constant documents": [(CONSTANT_SHARES[1] * documents, DOCUMENTS)],
        "bursty": [(0.5 * chat, CHAT)],
        "load step": [(0.3 * chat, CHAT), (0.9 * chat, CHAT), (0.3 * chat, CHAT)],
        "change of lengths": [(0.8 * chat, CHAT), (0.8 * documents, DOCUMENTS)],
        "changing": _plan(BEYOND, chat, documents),
        "changing, within capacity": _plan(WITHIN, chat, documents),
    }
    burst = BURSTINESS if name == "bursty" else 1.0
    phases = [Phase(requests / rate if rate else 1.0, rate, lengths, burst) for rate, lengths in plans[name]]
    return make(name, phases, seed)


def traces(setup: ServingSetup, name: str, requests: int, seeds: Sequence[int]) -> list[Trace]:
    """Return a trace per seed."""
    return [trace(setup, name, requests, seed) for seed in seeds]


CONSTANT = (*(f"constant {share:g}" for share in CONSTANT_SHARES), "constant documents")
NAMES = (*CONSTANT, "bursty", "load step", "change of lengths", "changing", "changing, within capacity")


def _plan(shares: Sequence[float], chat: float, documents: float) -> list[tuple[float, Lengths]]:
    kinds = ((chat, CHAT), (chat, CHAT), (documents, DOCUMENTS), (chat, CHAT))
    return [(share * rate, lengths) for share, (rate, lengths) in zip(shares, kinds)]


# --- comparisons ------------------------------------------------------------------------------------------------------


def compare(
    setup: ServingSetup, traffic: Sequence[Trace], policies: Mapping[str, PolicyFactory]
) -> list[dict[str, Any]]:
    """Serve every trace with a new policy of every kind; return a row per policy: means over the traces."""
    keys = ("goodput", "goodput share", "first token late", "tokens late", "latency p95", "batch", "unfinished")
    rows = []
    for name, make_policy in policies.items():
        runs = [setup.run(trace, make_policy()) for trace in traffic]
        row: dict[str, Any] = {"trace": traffic[0].name, "policy": name}
        row |= averaged([slo.summary(run, setup.objective) for run in runs], keys)
        row |= {"saturated": sum(run.saturated for run in runs), "cache bytes": max(run.peak_bytes for run in runs)}
        rows.append(row)
    return rows


def averaged(rows: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> dict[str, float | None]:
    """Return the mean of each key over the rows that have a value; None where no row has one."""
    known = {key: [value for row in rows if (value := row[key]) is not None] for key in keys}
    return {key: float(np.mean(values)) if values else None for key, values in known.items()}


def goodput(
    setup: ServingSetup, traffic: Sequence[Trace], baseline: PolicyFactory, optimized: PolicyFactory, workload: str
) -> Measurement:
    """Return the goodput of two policies on the same traces, trace by trace, simulated (`goodput_of`)."""
    calls = setup.times.samples
    source = f"simulated: {len(traffic)} seeds of one trace, step times from {calls} timed calls of this run"
    return goodput_of(
        lambda make_policy, jitter: setup.goodputs(traffic, make_policy, jitter), baseline, optimized, workload, source
    )


def goodput_of(
    goodputs: Callable[[Factory, int], Sequence[float]],
    baseline: Factory,
    optimized: Factory,
    workload: str,
    source: str,
) -> Measurement:
    """Return the simulated goodput of two arms, trace by trace; `goodputs(arm, jitter)` serves all traces with an arm.

    The noise floor is the baseline on the same traces with other jitter. Informative only where an arm served no
    request within the objectives: then there is no ratio.
    """
    metric = "goodput_requests_per_second"
    arms = [goodputs(arm, 0) for arm in (baseline, optimized)]
    again = goodputs(baseline, NEW_JITTER)
    if min(map(min, (*arms, again))) <= 0:
        means = [float(np.mean(values)) for values in arms]
        return measurement.informative(metric, workload, means[0], means[1], source, "estimated", n=len(again))
    floor = paired_stats.noise_floor(paired_stats.differences(arms[0], again))
    return measurement.from_samples(
        metric,
        workload,
        arms[0],
        arms[1],
        source=source,
        floor=floor if math.isfinite(floor) else None,  # two traces give no interval
        provenance="estimated",
    )


def latencies(
    setup: ServingSetup, traffic: Sequence[Trace], baseline: PolicyFactory, optimized: PolicyFactory
) -> list[Measurement]:
    """Return goodput's share, latencies and mean batch of two policies on the same traces, simulated, not judged."""
    names = {
        "goodput_share": ("goodput share", 1),
        "latency_p50_ms": ("latency p50", 1000),
        "latency_p95_ms": ("latency p95", 1000),
        "latency_p99_ms": ("latency p99", 1000),
        "time_to_first_token_ms": ("first token p50", 1000),
        "time_per_output_token_ms": ("time per output token", 1000),
        "generate_tokens_per_second": ("output tokens/s", 1),
        "batch_rows": ("batch", 1),
    }
    arms = [
        [slo.summary(setup.run(trace, make_policy()), setup.objective) for trace in traffic]
        for make_policy in (baseline, optimized)
    ]
    source = f"simulated: mean of {len(traffic)} seeds; finished requests, the late included"
    keys = [key for key, _ in names.values()]
    means = [averaged(arm, keys) for arm in arms]
    measurements = []
    for metric, (key, scale) in names.items():
        first, second = (arm[key] for arm in means)
        if first is None or second is None:
            measurements.append(measurement.unavailable(metric, "serve", "too few requests finished", source))
            continue
        values = scale * first, scale * second
        measurements.append(measurement.informative(metric, "serve", *values, source, "estimated", n=len(traffic)))
    return measurements


def settling(
    setup: ServingSetup, traffic: Sequence[Trace], baseline: PolicyFactory, optimized: PolicyFactory
) -> Measurement:
    """Return the seconds from the load step until requests are served well for good; means of the seeds that settle."""
    arms = [
        [settled(setup, setup.run(trace, make_policy())) for trace in traffic] for make_policy in (baseline, optimized)
    ]
    unsettled = [sum(value is None for value in arm) for arm in arms]
    source = (
        f"simulated: {len(traffic)} seeds of the load step; never settled: {unsettled[0]} and {unsettled[1]} of them"
    )
    reasons = "no run settled", "one arm never settled"
    return mean_measurement("settling_seconds", "serve, load step", arms, source, reasons, n=len(traffic))


def mean_measurement(
    metric: str,
    workload: str,
    arms: Sequence[Sequence[float | None]],
    source: str,
    reasons: tuple[str, str],
    n: int | None = None,
) -> Measurement:
    """Return the means of two arms over the runs that have a value, simulated, not judged.

    `reasons` say why there is no number: where neither arm has one, and where one of them has none. There is no ratio
    to a baseline of 0.
    """
    known = [[value for value in arm if value is not None] for arm in arms]
    baseline, optimized = (float(np.mean(values)) if values else None for values in known)
    if baseline is None and optimized is None:
        return measurement.unavailable(metric, workload, reasons[0], source)
    fields: dict[str, Any] = {"n": n, "reason": reasons[1] if None in (baseline, optimized) else None}
    if not baseline or optimized is None:
        fields["ratio"] = None
    return measurement.informative(metric, workload, baseline, optimized, source, "estimated", **fields)


def settled(setup: ServingSetup, served: Served) -> float | None:
    """Return the settling time of a run after its second phase began."""
    starts = [*served.trace.starts, served.trace.seconds]
    return slo.settling_seconds(served, setup.objective, starts[1], starts[2])
