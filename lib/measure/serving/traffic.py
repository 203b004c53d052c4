"""Open-loop traffic: the arrival times and lengths of requests, fixed by a seed before anything is served.

Open loop means that arrivals do not wait for answers: the queue of a server that is too slow grows, as in reality
(Schroeder, Wierman and Harchol-Balter 2006, NSDI). A trace is a list of phases. Within a phase, arrivals are a renewal
process: Poisson (burstiness 1), or with Gamma gaps of a larger coefficient of variation. Knows nothing about servers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import UserError

SPREAD = 0.5  # lengths are uniform within ±50 % of a phase's mean
BURSTINESS = 3.0  # coefficient of variation of the gaps of a bursty phase


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens of a request's prompt and answer."""

    prompt_tokens: int
    new_tokens: int

    @property
    def longest(self) -> int:
        """The largest context that a request of these lengths can reach, in tokens."""
        return _most(self.prompt_tokens) + _most(self.new_tokens)


@dataclass(frozen=True)
class Phase:
    """`rate` requests per second for `seconds`; `burstiness` is the coefficient of variation of the gaps."""

    seconds: float
    rate: float
    lengths: Lengths
    burstiness: float = 1.0


@dataclass(frozen=True)
class ServingRequest:
    """One request. `arrival` is in seconds since the trace began. The answer always has `new_tokens` tokens."""

    id: int
    arrival: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, drawn from `phases` with `seed`; `describe` returns what a record stores.

    Requests that arrive before second `warm_up` are served but not counted: a server that starts empty has an advantage
    over a loaded one.
    """

    name: str
    seed: int
    phases: tuple[Phase, ...]
    requests: tuple[ServingRequest, ...]
    warm_up: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def counted_seconds(self) -> float:
        """Seconds after the warm-up."""
        return self.seconds - self.warm_up

    @property
    def starts(self) -> list[float]:
        """Second at which each phase begins."""
        return [sum(phase.seconds for phase in self.phases[:index]) for index in range(len(self.phases))]

    def describe(self) -> dict[str, object]:
        """Return everything needed to reproduce the trace, and its numbers of requests and tokens."""
        return {
            "name": self.name,
            "seed": self.seed,
            "requests": len(self.requests),
            "new_tokens": sum(request.new_tokens for request in self.requests),
            "warm_up_seconds": self.warm_up,
            "phases": [
                {
                    "seconds": phase.seconds,
                    "requests_per_second": phase.rate,
                    "prompt_tokens": phase.lengths.prompt_tokens,
                    "new_tokens": phase.lengths.new_tokens,
                    "burstiness": phase.burstiness,
                }
                for phase in self.phases
            ],
        }


def make(name: str, phases: Sequence[Phase], seed: int = 0, warm_up: float = 0.0) -> Trace:
    """Return the trace of `phases` drawn with `seed`. A rate of 0 is silence. The first `warm_up` seconds do not count.

    Raises UserError without phases, and for negative or infinite numbers, lengths below one token, a burstiness that
    is not positive, or a warm-up that leaves nothing to count.
    """
    if not phases:
        raise UserError("traffic: a trace needs at least one phase")
    for index, phase in enumerate(phases):
        _check(index, phase)
    if not 0 <= warm_up < sum(phase.seconds for phase in phases):
        raise UserError(f"traffic: a warm-up of {warm_up} s; expected at least 0 s, and less than the whole trace")
    random = np.random.default_rng([seed, 0x7AFF1C])
    requests: list[ServingRequest] = []
    start = 0.0
    for phase in phases:
        for arrival in _arrivals(phase, random):
            prompt, new = (_length(mean, random) for mean in (phase.lengths.prompt_tokens, phase.lengths.new_tokens))
            requests.append(ServingRequest(len(requests), start + arrival, prompt, new))
        start += phase.seconds
    return Trace(name, seed, tuple(phases), tuple(requests), warm_up)


def _check(index: int, phase: Phase) -> None:
    where = f"traffic: phase {index + 1}"
    if not (np.isfinite(phase.rate) and phase.rate >= 0):
        raise UserError(f"{where}: rate {phase.rate} requests/s; expected 0 (silence) or more, and finite")
    if not (np.isfinite(phase.seconds) and phase.seconds > 0):
        raise UserError(f"{where}: {phase.seconds} s long; expected more than 0, and finite")
    if min(phase.lengths.prompt_tokens, phase.lengths.new_tokens) < 1:
        raise UserError(f"{where}: lengths {phase.lengths}; expected at least one token each")
    if not phase.burstiness > 0:
        raise UserError(f"{where}: burstiness {phase.burstiness}; expected more than 0 (1 is Poisson)")


def _arrivals(phase: Phase, random: np.random.Generator) -> list[float]:
    """Return arrival times in seconds within the phase; gaps are Gamma with mean 1/rate and the phase's coefficient of
    variation.
    """
    if phase.rate == 0:
        return []
    shape = 1 / phase.burstiness**2
    arrivals, now = [], random.gamma(shape, 1 / (phase.rate * shape))
    while now < phase.seconds:
        arrivals.append(float(now))
        now += random.gamma(shape, 1 / (phase.rate * shape))
    return arrivals


def _length(mean: int, random: np.random.Generator) -> int:
    return int(random.integers(max(1, round(mean * (1 - SPREAD))), _most(mean) + 1))


def _most(mean: int) -> int:
    return max(1, round(mean * (1 + SPREAD)))


def constant(rate: float, seconds: float, lengths: Lengths, seed: int = 0) -> Trace:
    """Return a trace of Poisson arrivals at a constant rate."""
    return make("constant", [Phase(seconds, rate, lengths)], seed)


def bursty(rate: float, seconds: float, lengths: Lengths, seed: int = 0) -> Trace:
    """Return a trace of bursty arrivals (Gamma gaps) at a constant mean rate."""
    return make("bursty", [Phase(seconds, rate, lengths, BURSTINESS)], seed)
