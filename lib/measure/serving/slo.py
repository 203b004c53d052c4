"""Service-level objectives: what a request may take, whether a request met that, and goodput.

Both objectives (time to first token, time per output token) are multiples of what one request takes alone, fixed before
anything is served. Goodput counts the requests that meet both (Zhong et al. 2024, DistServe, OSDI, section 2): a mean
would hide the tail. Requests that were refused or never finished count as missed. Knows no policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import UserError
from lib.measure.metrics import paired_stats
from lib.measure.serving.server import RequestOutcome, Served
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths

FACTORS = (1.0, 100.0)  # of the objectives over the times of a request alone
SETTLED_SHARE, SETTLED_REQUESTS = 0.9, 10
COMPARED = ("goodput share", "latency p50", "latency p95", "time per output token", "output tokens/s")

Summary = dict[str, float | None]

# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objectives:
    """Most seconds to the first token (queueing included), and most seconds per output token behind it (mean)."""

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


def objectives(single: Single, first_token_factor: float, token_factor: float) -> Objectives:
    """Return the objectives as multiples of what a request takes alone.

    Raises UserError where a factor is below 1: not even an idle server meets that.
    """
    for name, value in (("first_token_factor", first_token_factor), ("token_factor", token_factor)):
        if not FACTORS[0] <= value <= FACTORS[1]:
            raise UserError(f"objectives: {name} {value}; expected a value in [{FACTORS[0]:g}, {FACTORS[1]:g}]")
    return Objectives(single.prefill_seconds * first_token_factor, single.step_seconds * token_factor)


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
    """Return the requests per second of the trace that met both objectives."""
    return sum(met(outcome, objective) for outcome in served.outcomes) / served.trace.seconds


def goodput_share(served: Served, objective: Objectives) -> float | None:
    """Return the share of all requests that met both objectives; None for a trace without requests."""
    if not served.outcomes:
        return None
    return sum(met(outcome, objective) for outcome in served.outcomes) / len(served.outcomes)


def summary(served: Served, objective: Objectives) -> Summary:
    """Return counts, goodput and latencies of a run (seconds); None for a quantity without enough requests.

    Latency percentiles are of finished requests: read them beside `unfinished`.
    """
    finished = [outcome for outcome in served.outcomes if outcome.finished is not None]
    latencies = [outcome.latency_seconds for outcome in finished if outcome.latency_seconds is not None]
    first_tokens = [outcome.first_token_seconds for outcome in finished if outcome.first_token_seconds is not None]
    token_times = [outcome.token_seconds for outcome in finished if outcome.token_seconds is not None]
    whole = paired_stats.percentiles(latencies) if finished else {}
    first = paired_stats.percentiles(first_tokens) if finished else {}
    tokens = sum(outcome.produced for outcome in served.outcomes)
    decoding = [step for step in served.steps if step.kind == "decode"]
    return {
        "requests": len(served.outcomes),
        "unfinished": len(served.outcomes) - len(finished),
        "refused": len(served.refused),
        "saturated": served.saturated,
        "goodput": goodput(served, objective),
        "goodput share": goodput_share(served, objective),
        "first token late": _late(served, "first_token_seconds", objective.first_token_seconds),
        "tokens late": _late(served, "token_seconds", objective.token_seconds),
        **{f"latency {name}": whole.get(name) for name in ("p50", "p95", "p99")},
        **{f"first token {name}": first.get(name) for name in ("p50", "p95", "p99")},
        "time per output token": float(np.mean(token_times)) if finished else None,
        "output tokens/s": tokens / served.end if served.end else None,
        "batch": float(np.mean([step.batch for step in decoding])) if decoding else None,
        "largest batch": max((step.batch for step in decoding), default=0),
        "cache bytes": served.peak_bytes,
    }


def _late(served: Served, name: str, most: float) -> float | None:
    """Return the share of requests that missed one objective or never got that far; None without requests."""
    values = [getattr(outcome, name) for outcome in served.outcomes]
    return sum(value is None or value > most for value in values) / len(values) if values else None


def settling_seconds(served: Served, objective: Objectives, since: float, until: float | None = None) -> float | None:
    """Return how long after second `since` requests began to be served well for good; None where they never did.

    Settled is the first arrival after which every ten consecutive requests (arriving before `until`) hold nine good
    ones. 0 means that nothing was disturbed at all.
    """
    until = served.trace.seconds if until is None else until
    inside = [outcome for outcome in served.outcomes if since <= outcome.request.arrival < until]
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


def errors(simulated: Sequence[Served] | Served, real: Served, objective: Objectives) -> Summary:
    """Return |simulated − real| ÷ real of the quantities `COMPARED`; several simulations are averaged first.

    None where one side has no such number.
    """
    runs = [simulated] if isinstance(simulated, Served) else list(simulated)
    summaries, measured = [summary(run, objective) for run in runs], summary(real, objective)
    relative: Summary = {}
    for name in COMPARED:
        values = [known for row in summaries if (known := row[name]) is not None]
        truth = measured[name]
        if len(values) < len(summaries) or not truth:
            relative[name] = None
        else:
            relative[name] = abs(float(np.mean(values)) - truth) / truth
    return relative
