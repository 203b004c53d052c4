"""Was a request served well? Objectives for time to first token and time per output token, goodput, settling time.

Goodput counts the requests that meet both objectives (Zhong et al. 2024, DistServe, OSDI, section 2): a mean would hide
the tail. Requests that were refused or never finished count as bad. Knows nothing of servers and policies.
"""

from collections.abc import Sequence

import numpy as np

from lib.measure.metrics import paired_stats
from lib.measure.serving.server import Outcome, Served
from lib.measure.serving.slo import Objectives

SETTLED_SHARE, SETTLED_REQUESTS = 0.9, 10
COMPARED = ("goodput share", "latency p50", "latency p95", "time per output token", "output tokens/s")


def met(outcome: Outcome, objectives: Objectives) -> bool:
    """Return whether a request kept both objectives."""
    return (
        outcome.finished is not None
        and outcome.first_token_seconds <= objectives.first_token_seconds
        and outcome.token_seconds <= objectives.token_seconds
    )


def goodput(served: Served, objectives: Objectives) -> float:
    """Return the requests per second of the trace that kept both objectives."""
    return sum(met(outcome, objectives) for outcome in served.outcomes) / served.trace.seconds


def goodput_share(served: Served, objectives: Objectives) -> float | None:
    """Return the share of all requests that kept both objectives; None where nothing was asked."""
    if not served.outcomes:
        return None
    return sum(met(outcome, objectives) for outcome in served.outcomes) / len(served.outcomes)


def summary(served: Served, objectives: Objectives) -> dict[str, float | None]:
    """Return counts, goodput and latencies of a run (seconds); None where there is nothing or too little to tell.

    Latency percentiles are of finished requests: read them beside `unfinished`.
    """
    finished = [one for one in served.outcomes if one.finished is not None]
    whole = paired_stats.percentiles([one.finished - one.request.arrival for one in finished]) if finished else {}
    first = paired_stats.percentiles([one.first_token_seconds for one in finished]) if finished else {}
    tokens = sum(one.produced for one in served.outcomes)
    decoding = [step for step in served.steps if step.kind == "decode"]
    return {
        "requests": len(served.outcomes),
        "unfinished": len(served.outcomes) - len(finished),
        "refused": len(served.refused),
        "saturated": served.saturated,
        "goodput": goodput(served, objectives),
        "goodput share": goodput_share(served, objectives),
        "first token late": _late(served, "first_token_seconds", objectives.first_token_seconds),
        "tokens late": _late(served, "token_seconds", objectives.token_seconds),
        **{f"latency {name}": whole.get(name) for name in ("p50", "p95", "p99")},
        **{f"first token {name}": first.get(name) for name in ("p50", "p95", "p99")},
        "time per output token": float(np.mean([one.token_seconds for one in finished])) if finished else None,
        "output tokens/s": tokens / served.end if served.end else None,
        "batch": float(np.mean([step.batch for step in decoding])) if decoding else None,
        "largest batch": max((step.batch for step in decoding), default=0),
        "cache bytes": served.peak_bytes,
    }


def _late(served: Served, name: str, most: float) -> float | None:
    """Share of requests that missed one objective (or never got that far)."""
    values = [getattr(one, name) for one in served.outcomes]
    return sum(value is None or value > most for value in values) / len(values) if values else None


def settling_seconds(served: Served, objectives: Objectives, since: float, until: float | None = None) -> float | None:
    """Return how long after second `since` requests began to be served well for good; None where they never did.

    Settled is the first arrival after which every ten consecutive requests (arriving before `until`) hold nine good
    ones. 0 says that nothing was disturbed at all.
    """
    until = served.trace.seconds if until is None else until
    inside = [one for one in served.outcomes if since <= one.request.arrival < until]
    good = np.array([met(one, objectives) for one in inside], dtype=float)
    if len(good) < SETTLED_REQUESTS:
        return None
    shares = np.convolve(good, np.ones(SETTLED_REQUESTS), "valid") / SETTLED_REQUESTS
    bad = np.flatnonzero(shares < SETTLED_SHARE - 1e-9)
    if not len(bad):
        return 0.0
    if bad[-1] == len(shares) - 1:
        return None
    return inside[int(bad[-1]) + SETTLED_REQUESTS - 1].request.arrival - since


def errors(simulated: Sequence[Served] | Served, real: Served, objectives: Objectives) -> dict[str, float | None]:
    """Return |simulated − real| ÷ real of the quantities `COMPARED`; several simulations are averaged first.

    None where one side has no such number.
    """
    runs = [simulated] if isinstance(simulated, Served) else list(simulated)
    made, seen = [summary(run, objectives) for run in runs], summary(real, objectives)
    found: dict[str, float | None] = {}
    for name in COMPARED:
        values = [one[name] for one in made]
        if None in values or not seen[name]:
            found[name] = None
        else:
            found[name] = abs(float(np.mean(values)) - seen[name]) / seen[name]
    return found
