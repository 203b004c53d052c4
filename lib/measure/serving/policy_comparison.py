"""Policies against each other on the same traffic: traces by a rule, runs in simulation and in real time, measurements.

Rates are shares of the measured capacity, so that a trace means the same on every machine; which shares, lengths and
seeds is fixed here, before anything is served. The changing trace goes from half of what chats allow beyond it, to
documents beyond what they allow, and back: only beyond capacity does it matter how many are served together. A second
one stays within capacity throughout. Policies come in as functions that make a fresh one; this module knows none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import slo, step_times
from lib.measure.serving.server import MOST_ROWS, Limits, Policy, Served
from lib.measure.serving.simulator import simulate
from lib.measure.serving.slo import Objectives, Single, objectives, unattainable
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

Make = Callable[[], Policy]


@dataclass(frozen=True)
class ServingSetup:
    """What all policies share: measured step times, objectives, limits, batching, capacity per kind of request."""

    times: StepTimes
    wanted: Objectives
    single: Single
    limits: Limits
    batching: str = "iteration"

    def capacity(self, lengths: Lengths) -> tuple[float, int]:
        """Return (requests per second, batch) that requests of these lengths allow at most; (0, 0) where none do."""
        return self.times.capacity(lengths, self.wanted.token_seconds, self.limits.rows)

    def run(self, trace: Trace, policy: Policy, jitter: int = 0) -> Served:
        """Serve `trace` in simulation; the jitter follows from the trace's seed, so policies meet the same one."""
        return simulate(trace, policy, self.times, self.limits, seed=trace.seed + jitter, batching=self.batching)


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
    """Time the real model's steps and return the ground for all policies.

    `cache_share` bounds the cache: the share of what MOST_ROWS of the longest requests would take. Who cannot make the
    first-token objective any more is served after the others. Raises UserError for a share or a factor out of range.
    """
    if not 0 < cache_share <= 1:
        raise UserError(f"contest: cache_share {cache_share}; expected 0 < cache_share <= 1")
    contexts, options = _steps(loaded)
    times = step_times.measure(loaded.model, _text(loaded, seed), contexts, repeats=repeats, **options)
    single = Single.of(times, DOCUMENTS)
    wanted = objectives(single, first_token_factor, token_factor)
    longest = max(kind.longest for kind in KINDS.values())
    size = cache_share * MOST_ROWS * longest * times.bytes_per_token
    patience = max(0.0, wanted.first_token_seconds - single.prefill_seconds)
    return ServingSetup(times, wanted, single, Limits(MOST_ROWS, size, times.bytes_per_token, patience), batching)


def around(
    loaded: Loaded, ground: ServingSetup, run: Callable[[], object], seed: int = 0
) -> tuple[ServingSetup, object]:
    """Return the same ground with the step times that held around `run()`, and what that returned."""
    contexts, options = _steps(loaded)
    repeats = 2 if loaded.scale == "proxy" else 1
    times, result = step_times.around(loaded.model, _text(loaded, seed), contexts, run, repeats=repeats, **options)
    return replace(ground, times=times), result


def _steps(loaded: Loaded) -> tuple[tuple[int, ...], dict[str, object]]:
    """Return the contexts at which steps are timed, and which steps."""
    return (CONTEXTS, {}) if loaded.scale == "proxy" else (CONTEXTS_AT_REAL_SIZE, AT_REAL_SIZE)


def _text(loaded: Loaded, seed: int) -> torch.Tensor:
    """Return the text [T] on which steps are timed."""
    return tasks.text_windows(loaded, "final", 4, CONTEXTS[-1], seed).flatten()


def facts(ground: ServingSetup) -> list[dict[str, object]]:
    """Return a row per kind of request: what it takes alone, what capacity allows, whether objectives can be met."""
    rows = []
    for name, lengths in KINDS.items():
        alone, (rate, batch) = Single.of(ground.times, lengths), ground.capacity(lengths)
        why = unattainable(ground.times, ground.wanted, lengths)
        row = {"requests": name, "tokens in, out": f"{lengths.prompt_tokens}, {lengths.new_tokens}"}
        row |= {"prefill alone, ms": 1000 * alone.prefill_seconds, "step alone, ms": 1000 * alone.step_seconds}
        row |= {"capacity, requests/s": rate, "at batch": batch}
        rows.append(row | {"objectives": why or ("can be met" if rate else "missed once requests join")})
    return rows


def traffic(ground: ServingSetup, name: str, requests: int, seed: int) -> Trace:
    """Return one of the traces `NAMES`, about `requests` requests in each phase. Rates follow from the capacity."""
    chat, documents = ground.capacity(CHAT)[0], ground.capacity(DOCUMENTS)[0]
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


def several(ground: ServingSetup, name: str, requests: int, seeds: Sequence[int]) -> list[Trace]:
    """Return a trace per seed."""
    return [traffic(ground, name, requests, seed) for seed in seeds]


CONSTANT = (*(f"constant {share:g}" for share in CONSTANT_SHARES), "constant documents")
NAMES = (*CONSTANT, "bursty", "load step", "change of lengths", "changing", "changing, within capacity")


def _plan(shares: Sequence[float], chat: float, documents: float) -> list[tuple[float, Lengths]]:
    kinds = ((chat, CHAT), (chat, CHAT), (documents, DOCUMENTS), (chat, CHAT))
    return [(share * rate, lengths) for share, (rate, lengths) in zip(shares, kinds)]


def compare(ground: ServingSetup, traces: Sequence[Trace], policies: dict[str, Make]) -> list[dict[str, object]]:
    """Serve every trace with a fresh policy of every kind; return a row per policy: means over the traces."""
    rows = []
    for name, fresh in policies.items():
        runs = [ground.run(trace, fresh()) for trace in traces]
        found = [slo.summary(run, ground.wanted) for run in runs]
        keys = ("goodput", "goodput share", "first token late", "tokens late", "latency p95", "batch", "unfinished")
        row: dict[str, object] = {"trace": traces[0].name, "policy": name}
        for key in keys:
            values = [one[key] for one in found if one[key] is not None]
            row[key] = float(np.mean(values)) if values else None
        rows.append(row | {"saturated": sum(run.saturated for run in runs), "cache bytes": max(_peaks(runs))})
    return rows


def _peaks(runs: Sequence[Served]) -> list[float]:
    return [run.peak_bytes for run in runs]


def goodput(
    ground: ServingSetup, traces: Sequence[Trace], baseline: Make, optimized: Make, workload: str
) -> Measurement:
    """Return the goodput of two policies on the same traces, trace by trace, simulated. The floor is the baseline on
    the same traces with other jitter. Raises nothing where nobody was served: then it is said.
    """
    arms = [[slo.goodput(ground.run(t, fresh()), ground.wanted) for t in traces] for fresh in (baseline, optimized)]
    again = [slo.goodput(ground.run(trace, baseline(), NEW_JITTER), ground.wanted) for trace in traces]
    samples = ground.times.samples
    source = f"simulated: {len(traces)} seeds of one trace, step times from {samples} timed calls of this run"
    return judged_goodput(workload, arms, again, source)


def judged_goodput(workload: str, arms: Sequence[Sequence[float]], again: Sequence[float], source: str) -> Measurement:
    """Return the simulated goodput of two arms, trace by trace; `again` is the baseline's with other jitter, the floor.

    Informative only where an arm served nobody within the objectives: then there is no ratio.
    """
    metric = "goodput_requests_per_second"
    if min(map(min, (*arms, again))) <= 0:
        means = [float(np.mean(values)) for values in arms]
        return measurement.informative(metric, workload, *means, source, "estimated", n=len(again))
    floor = paired_stats.noise_floor(paired_stats.differences(arms[0], again))
    floor = floor if math.isfinite(floor) else None  # two traces give no interval
    return measurement.from_samples(metric, workload, *arms, source=source, floor=floor, provenance="estimated")


def latencies(ground: ServingSetup, traces: Sequence[Trace], baseline: Make, optimized: Make) -> list[Measurement]:
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
    arms = [[slo.summary(ground.run(t, fresh()), ground.wanted) for t in traces] for fresh in (baseline, optimized)]
    source = f"simulated: mean of {len(traces)} seeds; finished requests, the late included"
    found = []
    for metric, (key, scale) in names.items():
        values = [[one[key] for one in arm if one[key] is not None] for arm in arms]
        if all(values):
            means = [scale * float(np.mean(value)) for value in values]
            found.append(measurement.informative(metric, "serve", *means, source, "estimated", n=len(traces)))
        else:
            found.append(measurement.unavailable(metric, "serve", "too few requests finished", source))
    return found


def settling(ground: ServingSetup, traces: Sequence[Trace], baseline: Make, optimized: Make) -> Measurement:
    """Return the seconds from the load step until requests are served well for good; means of the seeds that settle."""
    arms, unsettled = [], []
    for fresh in (baseline, optimized):
        times = [settled(ground, ground.run(trace, fresh())) for trace in traces]
        arms.append([one for one in times if one is not None])
        unsettled.append(len(times) - len(arms[-1]))
    source = (
        f"simulated: {len(traces)} seeds of the load step; never settled: {unsettled[0]} and {unsettled[1]} of them"
    )
    means = [float(np.mean(arm)) if arm else None for arm in arms]
    if means == [None, None]:
        return measurement.unavailable("settling_seconds", "serve, load step", "no run settled", source)
    reason = "one arm never settled" if None in means else None
    fields = {"ratio": None} if not means[0] else {}
    return measurement.informative(
        "settling_seconds", "serve, load step", *means, source, "estimated", n=len(traces), reason=reason, **fields
    )


def settled(ground: ServingSetup, served: Served) -> float | None:
    """Return the settling time of a run after its second phase began."""
    starts = [*served.trace.starts, served.trace.seconds]
    return slo.settling_seconds(served, ground.wanted, starts[1], starts[2])
