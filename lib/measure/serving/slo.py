"""Service-level objectives: how long a request may take, whether requests met their objectives, and goodput.

Both objectives (time to first token, time per output token) are stated in milliseconds or as multiples of the times of
a single request, and fixed before anything is served. Goodput counts the requests that meet both (Zhong et al. 2024,
DistServe, OSDI, section 2), since a mean would hide the tail. Requests of the warm-up are not counted. A request that
was refused or never finished is not good: its latency is infinite in percentiles, it is in no mean, and it is counted
as `unfinished`. Knows nothing about policies.
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

FACTORS = (1.0, 100.0)  # range of the objectives as multiples of the times of a single request
MILLISECONDS = (0.0, 1e6)  # range of stated objectives; 0: use the factor
SETTLED_SHARE, SETTLED_REQUESTS = 0.9, 10
ATTAINED = 0.9  # a rate is attained if this share of the requests meets both objectives

Summary = dict[str, float | None]

# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objectives:
    """Limits on the seconds to the first token (including queueing) and the mean seconds per later output token."""

    first_token_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        for name in ("first_token_seconds", "token_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"objectives: {name} {getattr(self, name)}; expected more than 0 s")


@dataclass(frozen=True)
class Single:
    """A single request without others: seconds of its prefill and of a decode step, and its prompt's length."""

    prefill_seconds: float
    step_seconds: float
    prompt_tokens: int

    @classmethod
    def of(cls, times: StepTimes, lengths: Lengths) -> "Single":
        """Return the times of a request of these mean lengths, from measured step times."""
        step = times.decode(1, lengths.prompt_tokens + lengths.new_tokens / 2)
        return cls(times.prefill(1, lengths.prompt_tokens), step, lengths.prompt_tokens)


def objectives(
    single: Single,
    first_token_factor: float,
    token_factor: float,
    first_token_ms: float = 0.0,
    token_ms: float = 0.0,
) -> Objectives:
    """Return the objectives: stated in milliseconds, else multiples of the times of a single request.

    Raises UserError if a factor is out of range (below 1 not even an idle server meets it), or a time is.
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
    """Return why no batch size can meet the objectives for requests of these lengths; None if size 1 does."""
    alone = Single.of(times, lengths)
    pairs = (
        ("a prompt", alone.prefill_seconds, objective.first_token_seconds),
        ("a token", alone.step_seconds, objective.token_seconds),
    )
    for what, seconds, most in pairs:
        if seconds > most:
            limit = f"{1000 * seconds:.3g} ms, the limit is {1000 * most:.3g} ms"
            return f"no size can meet the objective: {what} alone takes {limit}"
    return None


# --- how well a run met them -----------------------------------------------------------------------------------------


def met(outcome: RequestOutcome, objective: Objectives) -> bool:
    """Return whether a request met both objectives."""
    first, token = outcome.first_token_seconds, outcome.token_seconds
    if first is None or token is None:
        return False
    return first <= objective.first_token_seconds and token <= objective.token_seconds


def goodput(served: Served, objective: Objectives) -> float:
    """Return how many requests per second met both objectives, after the warm-up."""
    return sum(met(outcome, objective) for outcome in served.counted) / served.trace.counted_seconds


def goodput_share(served: Served, objective: Objectives) -> float | None:
    """Return the share of the counted requests that met both objectives; None without counted requests."""
    counted = served.counted
    return sum(met(outcome, objective) for outcome in counted) / len(counted) if counted else None


def summary(served: Served, objective: Objectives) -> Summary:
    """Return counts, goodput and latencies (in seconds) of a run; None for a quantity without enough requests.

    Latencies and times to the first token cover all requests, and are infinite for requests that did not get that far:
    a server does not become faster by dropping slow requests. `unfinished` includes refused requests. `time per output
    token` covers finished requests. `first token late` and `tokens late` are shares of the requests for which it was
    known at the end of the run whether they were late: those that got that far, and those that waited longer than the
    objective without getting there.
    """
    counted = served.counted
    finished = [outcome for outcome in counted if outcome.finished is not None]
    token_times = [outcome.token_seconds for outcome in finished if outcome.token_seconds is not None]
    whole = percentiles([outcome.latency_seconds for outcome in counted])
    first = percentiles([outcome.first_token_seconds for outcome in counted])
    between = paired_stats.percentiles(served.gaps) if served.gaps else {}
    # A finished row that keeps its place is decoded on with the others; these tokens do not count.
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
    """Return p50, p95 and p99 of times, where None means infinite; None for a percentile that is itself infinite, or if
    there are too few times.
    """
    known = [value for value in seconds if value is not None]
    if not known:
        return {}
    placeholders = [max(known)] * (len(seconds) - len(known))  # for infinite times; no finite percentile reaches them
    values = paired_stats.percentiles([*known, *placeholders])
    ranks = {name: math.ceil((len(seconds) - 1) * int(name[1:]) / 100) for name in values}
    return {name: value if ranks[name] < len(known) else None for name, value in values.items()}


def _late(served: Served, name: str, most: float) -> float | None:
    """Return the share of requests that missed one objective, among those for which it is known; None without any."""
    missed = []
    for outcome in served.counted:
        value = getattr(outcome, name)
        if value is not None:
            missed.append(value > most)
        elif name == "first_token_seconds" and served.end - outcome.request.arrival > most:
            missed.append(True)
    return sum(missed) / len(missed) if missed else None


def attained_rate(offered: Sequence[float], shares: Sequence[float | None], least: float = ATTAINED) -> float | None:
    """Return the highest rate, requests/s, at which at least the share `least` of requests meets the objectives.

    The rates `offered` ascend; the share is interpolated linearly between them, and rates after the first that falls
    short are ignored. None if not even the lowest rate is attained, the highest rate if all are.
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
    """Return how many seconds after second `since` the server settled, i.e. served requests well from then on; None if
    it never did.

    The server has settled at the first arrival after which, of every ten consecutive requests (arriving before
    `until`), at least nine are good. 0 means that it served them well all the time.
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
