"""The setup that all policies share, and its traffic: rates are shares of the measured capacity, so that a trace means
the same on every machine. Shares and seeds are fixed here, before anything is served.

The changing trace goes from half of the capacity for chats to beyond it, then to documents beyond their capacity, and
back: only beyond capacity does it matter how many requests are served together. A second trace stays within capacity.
Every trace begins with a warm-up at the load of its first phase, which is served but not counted. Policies are passed
as functions that create them; this module knows no particular policy. `goodput_of`, `averaged` and `mean_measurement`
are shared by all comparisons.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, paired_samples, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import cost_model
from lib.measure.serving import slo, step_timing
from lib.measure.serving.protocol import MOST_ROWS, Limits, Policy, Served
from lib.measure.serving.simulator import simulate
from lib.measure.serving.slo import Objectives, Single
from lib.measure.serving.step_times import StepTimes, drawn_again
from lib.measure.serving.traffic import BURSTINESS, Lengths, Phase, Trace, make
from lib.models.loading import Loaded
from lib.models.tasks import tasks

CHAT, DOCUMENTS = Lengths(32, 48), Lengths(384, 16)
# At real dimensions a step takes up to seconds, and its time grows with the context: slowly while weights dominate the
# bytes read, then in proportion. Fewer points are timed, most of them at short contexts.
AT_REAL_SIZE: dict[str, Any] = {"rows_measured": (1, 2, 4, 8, 16, 32), "prompt_tokens": 512}
AT_A_PREVIEW: dict[str, Any] = {"rows_measured": step_timing.FEW_ROWS, "prompt_tokens": 512, "again": 0}
CONSTANT_SHARES = (0.4, 0.7, 0.9, 1.1)  # of capacity; the last is beyond it
BEYOND, WITHIN = (0.5, 1.2, 1.2, 0.5), (0.4, 0.8, 0.8, 0.4)  # shares of capacity, by phase
WARM_UP_SHARE, LEAST_WARM_UP = 0.25, 8  # requests of the warm-up: this share of a phase's, but at least this many
NEW_JITTER = 7919  # for the A/A control: the same trace with other jitter
JITTER_STEP = 10**6  # between the seeds of two jitters of a trace, so that traces never share a seed
PHASES = ("warm-up", "chats", "more chats", "documents", "chats")
PARAMETERS = {"rows": (1, 4096), "prompt tokens": (1, 131072), "new tokens": (1, 131072)}

PolicyFactory = Callable[[], Policy]
Factory = TypeVar("Factory")


@dataclass(frozen=True)
class ServingSetup:
    """What all policies share: measured step times, objectives, limits, batching, and the two kinds of requests. The
    first `kept` tokens, common to all longer prompts, need not be read (prefix caching).
    """

    times: StepTimes
    objective: Objectives
    single: Single
    limits: Limits
    batching: str = "iteration"
    chat: Lengths = CHAT
    documents: Lengths = DOCUMENTS
    kept: int = 0

    @property
    def kinds(self) -> dict[str, Lengths]:
        """Name → mean lengths of each kind of request."""
        return {"chat": self.chat, "documents": self.documents}

    @property
    def longest(self) -> int:
        """The largest context that a request can reach, in tokens."""
        return max(kind.longest for kind in self.kinds.values())

    def capacity(self, lengths: Lengths) -> tuple[float, int]:
        """Return the capacity for requests of these lengths as (requests per second, batch); (0, 0) for none."""
        return self.times.capacity(lengths, self.objective.token_seconds, self.limits.rows)

    def run(self, trace: Trace, policy: Policy, jitter: int = 0) -> Served:
        """Serve `trace` in simulation. Step times (`StepTimes.resampled`) and jitter are drawn by seed: policies on the
        same trace meet the same ones, and runs with several seeds differ by the uncertainty of the calibration.
        """
        seed = seed_of(trace, jitter)
        options: dict[str, Any] = {"seed": seed, "batching": self.batching, "kept": self.kept}
        return simulate(trace, policy, drawn_again(self.times, seed), self.limits, **options)

    def goodputs(self, traces: Sequence[Trace], make_policy: PolicyFactory, jitter: int = 0) -> list[float]:
        """Return the simulated goodput of a new policy on each trace, requests/s."""
        return [slo.goodput(self.run(trace, make_policy(), jitter), self.objective) for trace in traces]


def seed_of(trace: Trace, jitter: int) -> int:
    """Return the seed of step times and jitter for serving `trace` in simulation."""
    return trace.seed + JITTER_STEP * jitter


# --- the setup and its traffic ----------------------------------------------------------------------------------------


def prepare(
    loaded: Loaded,
    *,
    first_token_factor: float,
    token_factor: float,
    first_token_ms: float = 0.0,
    token_ms: float = 0.0,
    rows: int = MOST_ROWS,
    chat: Sequence[int] = (CHAT.prompt_tokens, CHAT.new_tokens),
    documents: Sequence[int] = (DOCUMENTS.prompt_tokens, DOCUMENTS.new_tokens),
    cache_share: float = 1.0,
    cache_mib: float = 0.0,
    batching: str = "iteration",
    repeats: int = 5,
    preview: bool = False,
    seed: int = 0,
) -> ServingSetup:
    """Time the real model's steps and return the setup that all policies share.

    `chat` and `documents` are the mean tokens of (prompt, answer). The cache is bounded by `cache_mib` or, if that is
    0, by the share `cache_share` of the cache that `rows` of the longest requests would take, but at least by that of
    one such request: with less, requests would be refused forever. Objectives are in ms or, if 0, given by factors.
    Requests that can no longer meet the first-token objective are served after the others. A `preview` times the fewest
    points, once each. Raises UserError for a value out of range, including a `cache_mib` that is too small for the
    longest request.
    """
    if not 0 < cache_share <= 1:
        raise UserError(f"serving: cache_share {cache_share}; expected 0 < cache_share <= 1")
    if not cache_mib >= 0:
        raise UserError(f"serving: cache_mib {cache_mib}; expected 0 (by cache_share) or more")
    _check("rows", rows)
    kinds = [_lengths(name, lengths) for name, lengths in (("chat", chat), ("documents", documents))]
    longest = max(kind.longest for kind in kinds)
    contexts = sorted({kinds[0].prompt_tokens, longest // 5, longest // 2, longest} - {0, 1})
    options: dict[str, Any] = AT_A_PREVIEW if preview else {} if loaded.scale == "proxy" else AT_REAL_SIZE
    contexts = sorted({*contexts[:2], contexts[-1]}) if options else contexts
    requests = max(1.0, cache_share * rows)
    _bound(cache_mib, requests, longest, cost_model.kv_cache_bytes_per_token(loaded.model))  # before anything is timed
    text_T = _text(loaded, longest, seed)
    times = step_timing.measure(loaded.model, text_T, contexts, repeats=repeats, most=rows, **options)
    single = Single.of(times, kinds[1])
    objective = slo.objectives(single, first_token_factor, token_factor, first_token_ms, token_ms)
    size = _bound(cache_mib, requests, longest, times.bytes_per_token)
    patience = slo.patience_seconds(objective, single)
    limits = Limits(rows, size, times.bytes_per_token, patience)
    return ServingSetup(times, objective, single, limits, batching, kinds[0], kinds[1])


def _bound(cache_mib: float, requests: float, longest: int, bytes_per_token: float) -> float:
    """Return the cache's bound in bytes: `cache_mib` or, if that is 0, room for `requests` of the longest requests.

    Raises UserError if not even one of them fits: it would be refused under every policy.
    """
    size = cache_mib * 2**20 or requests * longest * bytes_per_token
    if size < longest * bytes_per_token:
        least = math.ceil(100 * longest * bytes_per_token / 2**20) / 100
        raise UserError(
            f"serving: cache_mib {cache_mib:g} holds {int(size / bytes_per_token)} tokens of this model, a request may "
            f"take {longest}; expected {least:g} or more"
        )
    return size


def slowness(loaded: Loaded, setup: ServingSetup, seed: int = 0, *, preview: bool = False) -> Callable[[], float]:
    """Return a function that measures how many times slower the machine is than when the setup's step times were
    measured; near 1 on a device of constant speed. In a `preview`, and at real size, every call runs once.
    """
    text_T, most = _text(loaded, setup.longest, seed), AT_REAL_SIZE["prompt_tokens"]
    once = preview or loaded.scale != "proxy"
    options: dict[str, Any] = {"repeats": 1, "prompt_tokens": most} if once else {}
    return lambda: step_timing.slowness(loaded.model, text_T, setup.times, **options)


def _text(loaded: Loaded, longest: int, seed: int) -> torch.Tensor:
    """Return the text for timing steps, ids [T], four times as long as the longest context."""
    return tasks.text_windows(loaded, "final", 4, longest, seed).flatten()


def _lengths(name: str, lengths: Sequence[int]) -> Lengths:
    if len(lengths) != 2:
        raise UserError(f"serving: lengths of {name} {list(lengths)}; expected [prompt tokens, new tokens]")
    _check("prompt tokens", lengths[0])
    _check("new tokens", lengths[1])
    return Lengths(int(lengths[0]), int(lengths[1]))


def _check(name: str, value: int) -> None:
    low, high = PARAMETERS[name]
    if int(value) != value or not low <= value <= high:
        raise UserError(f"serving: {name} {value}; expected a whole number in [{low}, {high}]")


def facts(setup: ServingSetup) -> list[dict[str, object]]:
    """Return a row per kind of request: its times alone, the capacity, and whether the objectives can be met."""
    rows: list[dict[str, object]] = []
    for name, lengths in setup.kinds.items():
        alone, (rate, batch) = Single.of(setup.times, lengths), setup.capacity(lengths)
        reason = slo.unattainable(setup.times, setup.objective, lengths)
        row: dict[str, object] = {"requests": name, "tokens in, out": f"{lengths.prompt_tokens}, {lengths.new_tokens}"}
        row |= {"prefill alone, ms": 1000 * alone.prefill_seconds, "step alone, ms": 1000 * alone.step_seconds}
        row |= {"capacity, requests/s": rate, "at batch": batch}
        rows.append(row | {"objectives": reason or ("can be met" if rate else "missed once requests join")})
    return rows


CONSTANT = (*(f"constant {share:g}" for share in CONSTANT_SHARES), "constant documents")
NAMES = (*CONSTANT, "bursty", "load step", "change of lengths", "changing", "changing, within capacity")


def trace(setup: ServingSetup, name: str, requests: float, seed: int) -> Trace:
    """Return the trace called `name` (one of `NAMES`), with about `requests` requests in each phase after the warm-up.
    Rates follow from the capacity.
    """
    chat, documents = setup.capacity(setup.chat)[0], setup.capacity(setup.documents)[0]
    plans = {f"constant {share:g}": [(share * chat, setup.chat)] for share in CONSTANT_SHARES}
    plans |= {
        "constant documents": [(0.7 * documents, setup.documents)],
        "bursty": [(0.5 * chat, setup.chat)],
        "load step": [(share * chat, setup.chat) for share in (0.3, 0.9, 0.3)],
        "change of lengths": [(0.8 * chat, setup.chat), (0.8 * documents, setup.documents)],
        "changing": _plan(setup, BEYOND, chat, documents),
        "changing, within capacity": _plan(setup, WITHIN, chat, documents),
    }
    burst = BURSTINESS if name == "bursty" else 1.0
    phases = [Phase(requests / rate if rate else 1.0, rate, lengths, burst) for rate, lengths in plans[name]]
    rate, lengths = plans[name][0]
    lead = max(WARM_UP_SHARE * requests, min(LEAST_WARM_UP, requests)) / rate if rate else 0.25
    return make(name, [Phase(lead, rate, lengths, burst), *phases], seed, lead)


def traces(setup: ServingSetup, name: str, requests: float, seeds: Sequence[int]) -> list[Trace]:
    """Return a trace per seed."""
    return [trace(setup, name, requests, seed) for seed in seeds]


def requests_in(setup: ServingSetup, name: str, seconds: float) -> float:
    """Return how many requests each phase must have for a trace of `seconds`, including the warm-up."""
    requests = 100.0
    for _ in range(4):  # not quite proportional, since the warm-up has a least number of requests
        phases = trace(setup, name, requests, 0).phases
        if not all(phase.rate for phase in phases):
            return seconds
        requests *= seconds / sum(phase.seconds for phase in phases)
    return requests


def _plan(setup: ServingSetup, shares: Sequence[float], chat: float, documents: float) -> list[tuple[float, Lengths]]:
    kinds = ((chat, setup.chat), (chat, setup.chat), (documents, setup.documents), (chat, setup.chat))
    return [(share * rate, lengths) for share, (rate, lengths) in zip(shares, kinds)]


# --- measurements -----------------------------------------------------------------------------------------------------


def averaged(rows: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> dict[str, float | None]:
    """Return the mean of each key over the rows that have a value; None if no row has one."""
    known = {key: [value for row in rows if (value := row[key]) is not None] for key in keys}
    return {key: float(np.mean(values)) if values else None for key, values in known.items()}


def in_every(rows: Sequence[Mapping[str, float | None]], key: str) -> float | None:
    """Return the mean of a key over the rows; None if a row has no value (such as an infinite percentile), since the
    mean of the others would only cover the runs that went well.
    """
    return averaged(rows, (key,))[key] if all(row[key] is not None for row in rows) else None


def goodput_of(
    goodputs: Callable[[Factory, int], Sequence[float]],
    baseline: Factory,
    optimized: Factory,
    workload: str,
    source: str,
) -> Measurement:
    """Return the simulated goodput of two arms, paired by trace; `goodputs(arm, jitter)` serves all traces with an arm.

    The noise floor comes from the baseline on the same traces with other jitter. The result is informative if an arm
    served no request within the objectives, since there is no ratio then.
    """
    metric = "goodput_requests_per_second"
    arms = [goodputs(arm, 0) for arm in (baseline, optimized)]
    again = goodputs(baseline, NEW_JITTER)
    if min(map(min, (*arms, again))) <= 0:
        means = [float(np.mean(values)) for values in arms]
        return measurement.informative(metric, workload, means[0], means[1], source, "estimated", n=len(again))
    floor = paired_stats.noise_floor(paired_stats.differences(arms[0], again))
    return paired_samples.from_samples(
        metric,
        workload,
        arms[0],
        arms[1],
        source=source,
        floor=floor,
        provenance="estimated",
    )


def mean_measurement(
    metric: str,
    workload: str,
    arms: Sequence[Sequence[float | None]],
    source: str,
    reasons: tuple[str, str],
    n: int | None = None,
) -> Measurement:
    """Return the simulated means of two arms over the runs that have a value, not judged.

    `reasons` are the reasons why a number is missing: (in both arms, in one arm). There is no ratio to a baseline of 0.
    """
    known = [[value for value in arm if value is not None] for arm in arms]
    baseline, optimized = (float(np.mean(values)) if values else None for values in known)
    if baseline is None and optimized is None:
        return measurement.unavailable(metric, workload, reasons[0], source)
    fields: dict[str, Any] = {"n": n, "reason": reasons[1] if None in (baseline, optimized) else None}
    if not baseline or optimized is None:
        fields["ratio"] = None
    return measurement.informative(metric, workload, baseline, optimized, source, "estimated", **fields)
