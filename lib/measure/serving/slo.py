"""Service-level objectives: what a request may take, whether a request met that, and goodput.

Both objectives (time to first token, time per output token) are stated in milliseconds or as multiples of what one
request takes alone, and fixed before anything is served. Goodput counts the requests that meet both (Zhong et al. 2024,
DistServe, OSDI, section 2): a mean would hide the tail. Requests of the warm-up are not counted. One that was refused
or never finished does not count as good; in percentiles its latency is infinite, it enters no mean, and it is counted
as `unfinished`. Knows no policy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import UserError
from lib.measure.metrics import paired_stats
from lib.measure.serving.protocol import RequestOutcome, Served
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths

FACTORS = (1.0, 100.0)  # of the objectives over the times of a request alone
MILLISECONDS = (0.0, 1e6)  # of an objective that is stated; 0: by its factor
SETTLED_SHARE, SETTLED_REQUESTS = 0.9, 10
ATTAINED = 0.9  # share of the requests within both objectives at which a rate counts as served

Summary = dict[str, float | None]

# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objectives:
    """Most seconds to the first token (queueing included), and most seconds per output token after it (mean)."""

    first_token_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        for name in ("first_token_seconds", "token_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"objectives: {name} {getattr(self, name)}; expected more than 0 s")


@dataclass(frozen=True)
class Single:
    """One request alone: seconds of its prefill and of a decode step, and its prompt's length."""

    prefill_seconds: float
    step_seconds: float
    prompt_tokens: int

    @classmethod
    def of(cls, times: StepTimes, lengths: Lengths) -> "Single":
        """Return the measured times of a request of these mean lengths."""
        step = times.decode(1, lengths.prompt_tokens + lengths.new_tokens / 2)
        return cls(times.prefill(1, lengths.prompt_tokens), step, lengths.prompt_tokens)


def objectives(
    single: Single,
    first_token_factor: float,
    token_factor: float,
    first_token_ms: float = 0.0,
    token_ms: float = 0.0,
) -> Objectives:
    """Return the objectives: those stated in milliseconds, else multiples of what a request takes alone.

    Raises UserError where a factor is below 1 (not even an idle server meets that) or a time is out of range.
    """
    for name, value in (("first_token_ms", first_token_ms), ("token_ms", token_ms)):
        if not MILLISECONDS[0] <= value <= MILLISECONDS[1]:
            raise UserError(f"objectives: {name} {value}; expected 0 (by its factor) to {MILLISECONDS[1]:g} ms")
    for name, value in (("first_token_factor", first_token_factor), ("token_factor", token_factor)):
        if not FACTORS[0] <= value <= FACTORS[1]:
            raise UserError(f"objectives: {name} {value}; expected a value in [{FACTORS[0]:g}, {FACTORS[1]:g}]")
    first = first_token_ms / 1000 or single.prefill_seconds * first_token_factor
    return Objectives(first, token_ms / 1000 or single.step_seconds * token_factor)


def patience_seconds(objective: Objectives, single: Single) -> float:
    """Return how long a request may wait in the queue and still meet the first-token objective."""
    return max(0.0, objective.first_token_seconds - single.prefill_seconds)


def unattainable(times: StepTimes, objective: Objectives, lengths: Lengths) -> str | None:
    """Return why no batch size can meet the objectives for requests of these lengths, or None where size 1 does."""
    alone = Single.of(times, lengths)
    pairs = (
        ("a prompt", alone.prefill_seconds, objective.first_token_seconds),
        ("a token", alone.step_seconds, objective.token_seconds),
    )
    for what, seconds, most in pairs:
        if seconds > most:
            return f"no size can meet the objective: {what} alone takes {1000 * seconds:.3g} ms of {1000 * most:.3g} ms"
    return None


# --- how a run kept them ---------------------------------------------------------------------------------------------


def met(outcome: RequestOutcome, objective: Objectives) -> bool:
    """Return whether a request met both objectives."""
    first, token = outcome.first_token_seconds, outcome.token_seconds
    if first is None or token is None:
        return False
    return first <= objective.first_token_seconds and token <= objective.token_seconds


def goodput(served: Served, objective: Objectives) -> float:
    """Return the requests per second after the warm-up that met both objectives."""
    return sum(met(outcome, objective) for outcome in served.counted) / served.trace.counted_seconds


def goodput_share(served: Served, objective: Objectives) -> float | None:
    """Return the share of the counted requests that met both objectives; None where there are none."""
    counted = served.counted
    return sum(met(outcome, objective) for outcome in counted) / len(counted) if counted else None


def summary(served: Served, objective: Objectives) -> Summary:
    """Return counts, goodput and latencies of a run (seconds); None for a quantity without enough requests.

    Latencies and times to the first token are of all requests, infinite where a request did not get so far: a server
    that drops its slow requests is no faster for it. `unfinished` holds the refused too, and `time per output token` is
    of the finished. `late` are shares of the requests whose time was known when the run ended: those that got so far,
    and those that waited longer than the objective without getting there.
    """
    counted = served.counted
    finished = [outcome for outcome in counted if outcome.finished is not None]
    token_times = [outcome.token_seconds for outcome in finished if outcome.token_seconds is not None]
    whole = percentiles([outcome.latency_seconds for outcome in counted])
    first = percentiles([outcome.first_token_seconds for outcome in counted])
    between = paired_stats.percentiles(served.gaps) if served.gaps else {}
    # A finished row that keeps its place is stepped on with the others; nobody receives these tokens.
    tokens = sum(min(outcome.produced, outcome.request.new_tokens) for outcome in served.outcomes)
    decoding = [step for step in served.steps if step.kind in ("decode", "shared") and step.batch]
    return {
        "requests": len(counted),
        "unfinished": len(counted) - len(finished),
        "refused": len(served.refused),
        "saturated": served.saturated,
        "goodput": goodput(served, objective),
        "goodput share": goodput_share(served, objective),
        "first token late": _late(served, "first_token_seconds", objective.first_token_seconds),
        "tokens late": _late(served, "token_seconds", objective.token_seconds),
        **{f"latency {name}": whole.get(name) for name in ("p50", "p95", "p99")},
        **{f"first token {name}": first.get(name) for name in ("p50", "p95", "p99")},
        "time per output token": float(np.mean(token_times)) if finished else None,
        "between tokens p99": between.get("p99"),
        "output tokens/s": tokens / served.end if served.end else None,
        "batch": float(np.mean([step.batch for step in decoding])) if decoding else None,
        "largest batch": max((step.batch for step in decoding), default=0),
        "cache bytes": served.peak_bytes,
    }


def percentiles(seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Return p50, p95 and p99 of times of which None is infinite; None for a percentile that is infinite itself, and
    where there are too few.
    """
    known = [value for value in seconds if value is not None]
    if not known:
        return {}
    stood_in_for = [max(known)] * (len(seconds) - len(known))  # which no finite percentile reaches
    found = paired_stats.percentiles([*known, *stood_in_for])
    ranks = {name: math.ceil((len(seconds) - 1) * int(name[1:]) / 100) for name in found}
    return {name: value if ranks[name] < len(known) else None for name, value in found.items()}


def _late(served: Served, name: str, most: float) -> float | None:
    """Return the share of requests that missed one objective, of those of which it is known; None without any."""
    missed = []
    for outcome in served.counted:
        value = getattr(outcome, name)
        if value is not None:
            missed.append(value > most)
        elif name == "first_token_seconds" and served.end - outcome.request.arrival > most:
            missed.append(True)
    return sum(missed) / len(missed) if missed else None


def attained_rate(offered: Sequence[float], shares: Sequence[float | None], least: float = ATTAINED) -> float | None:
    """Return the highest rate, requests/s, at which a share of `least` is still within the objectives.

    `offered` ascends; between two of them the share is taken as linear, and what lies after the first rate that falls
    short does not count. None where not even the lowest rate is attained; the highest one where all are.
    """
    attained, before = None, None
    for rate, share in zip(offered, shares):
        if share is None:
            continue
        if share < least:
            if before is not None:
                attained = before[0] + (rate - before[0]) * (before[1] - least) / (before[1] - share)
            break
        attained, before = rate, (rate, share)
    return attained


def settling_seconds(served: Served, objective: Objectives, since: float, until: float | None = None) -> float | None:
    """Return how long after second `since` requests began to be served well for good; None where they never did.

    Settled is the first arrival after which every ten consecutive requests (arriving before `until`) hold nine good
    ones. 0 means that nothing was disturbed at all.
    """
    until = served.trace.seconds if until is None else until
    inside = [outcome for outcome in served.counted if since <= outcome.request.arrival < until]
    good = np.array([met(outcome, objective) for outcome in inside], dtype=float)
    if len(good) < SETTLED_REQUESTS:
        return None
    shares = np.convolve(good, np.ones(SETTLED_REQUESTS), "valid") / SETTLED_REQUESTS
    bad = np.flatnonzero(shares < SETTLED_SHARE - 1e-9)
    if not len(bad):
        return 0.0
    if bad[-1] == len(shares) - 1:
        return None
    return inside[int(bad[-1]) + SETTLED_REQUESTS - 1].request.arrival - since
