"""Scripted disturbances of a server, and how far it strayed from its objectives while they lasted.

A scenario is a trace of requests and how much slower the machine is at each moment. Rates are shares of the measured
capacity, so a scenario asks the same of a small model and of a large one. `Spinner` disturbs a real run: processes that
take the cores this one runs on. Knows no policy.
"""

import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import psutil

from lib.measure.serving.protocol import Limits, Policy, Served
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.simulator import SimulatedEngine
from lib.measure.serving.slo import Objectives, met
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, Phase, ServingRequest, Trace, make
from lib.measure.timing import disturbance
from lib.optimizations.feedback_mechanisms.guarding.shadow_reads import ShadowReads
from lib.optimizations.feedback_mechanisms.method import LATER, Guard
from lib.optimizations.feedback_mechanisms.profiles import Profiles

WINDOWS = 30  # into which a trace is cut to count the seconds beyond an objective
GOOD_SHARE = 0.9  # of the requests arriving in a window that must be served well
CALM, BUSY = 0.45, 1.15  # shares of what the full profile can serve within the objectives
COOL_DOWNS = 10  # in a trace
WARM_UP = 0.2  # of a third, before the script begins
BROKEN = "broken profile"
STOLEN = 2.0  # how much slower a machine is whose core is shared with one other process

Losses = tuple[Sequence[float], Sequence[float]]
SPOTLESS: Losses = (0.0,), (1.0,)


@dataclass(frozen=True)
class Scenario:
    """A trace, and pairs (second, factor): from that second on every step takes `factor` times as long. Requests that
    arrive from second `broken` on get a broken answer where the fast profile gives it.
    """

    trace: Trace
    slowness: tuple[tuple[float, float], ...] = ()
    broken: float = math.inf

    @property
    def name(self) -> str:
        return self.trace.name

    @property
    def thirds(self) -> list[float]:
        """The second at which each third begins, and the last one ends."""
        return [*self.trace.starts[-3:], self.trace.seconds]

    def factor(self, second: float) -> float:
        """Return how much slower than measured the machine is at `second`."""
        return next((factor for start, factor in reversed(self.slowness) if start <= second), 1.0)


def script(times: StepTimes, objective: Objectives, lengths: Lengths, seconds: float, seed: int = 0) -> list[Scenario]:
    """Return the four scenarios of one length: quiet, load step, longer prompts, stolen core.

    Behind a warm-up that does not count, the middle third is disturbed: the load steps beyond capacity; prompts get
    three times as long, beyond *their* capacity; the machine slows down under an unchanged calm load.
    """
    third = seconds / 3
    lead = WARM_UP * third
    worst = {name: (asked, rate) for name, (asked, rate, _) in demands(times, objective, lengths).items()}
    calm, busy, longer = (Phase(third, worst[n][1], worst[n][0]) for n in ("quiet", "load step", "longer prompts"))
    first = Phase(lead, calm.rate, lengths)
    slower = ((0.0, 1.0), (lead + third, STOLEN), (lead + 2 * third, 1.0))
    return [
        Scenario(make("quiet", [first, *[calm] * 3], seed, lead)),
        Scenario(make("load step", [first, calm, busy, calm], seed, lead)),
        Scenario(make("longer prompts", [first, calm, longer, calm], seed, lead)),
        Scenario(make("stolen core", [first, *[calm] * 3], seed, lead), slower),
    ]


def secretly_broken(script: Sequence[Scenario]) -> Scenario:
    """Return the script's load step with a fast profile that breaks as the load rises: what is needed is what fails."""
    step = next(scenario for scenario in script if scenario.name == "load step")
    return Scenario(replace(step.trace, name=BROKEN), step.slowness, step.thirds[1])


def demands(times: StepTimes, objective: Objectives, lengths: Lengths) -> dict[str, tuple[Lengths, float, float]]:
    """Return what each scenario of `script` asks for at its worst: lengths, requests per second, slowness."""
    long = Lengths(3 * lengths.prompt_tokens, lengths.new_tokens)
    rate, long_rate = (times.capacity(each, objective.token_seconds)[0] for each in (lengths, long))
    return {
        "quiet": (lengths, CALM * rate, 1.0),
        "load step": (lengths, BUSY * rate, 1.0),
        "longer prompts": (long, BUSY * long_rate, 1.0),
        "stolen core": (lengths, CALM * rate, STOLEN),
    }


class Played(NamedTuple):
    """A run, which profile answered each request that was admitted (request id → index), the seconds that reading
    answers again took, and the guard's events (second, what).
    """

    served: Served
    profile_of: dict[int, int]
    shadow_seconds: float = 0.0
    events: Sequence[tuple[float, str]] = ()

    @property
    def rollbacks(self) -> list[float]:
        """The seconds at which the fast profile was taken back."""
        return [second for second, what in self.events if what == "rolled back"]

    def share(self, profile: int) -> float:
        """Return the share of the answered requests that `profile` answered."""
        return sum(index == profile for index in self.profile_of.values()) / max(1, len(self.profile_of))


class SlowedEngine(SimulatedEngine):
    """The simulated engine on a machine that is slower at times; `now` returns the second."""

    def __init__(self, times: StepTimes, scenario: Scenario, now: Callable[[], float], seed: int = 0):
        super().__init__(times, seed)
        self.scenario, self.now = scenario, now

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        return super().prefill(requests) * self.scenario.factor(self.now())

    def decode(self) -> float:
        return super().decode() * self.scenario.factor(self.now())

    def leave(self, ids: Sequence[int]) -> float:
        return super().leave(ids) * self.scenario.factor(self.now())


def play(
    scenario: Scenario,
    policy: Policy,
    times: StepTimes | Sequence[StepTimes],
    limits: Limits,
    seed: int = 0,
    shadow_share: float = 0.0,
    *,
    bound: float = 0.1,
    losses: Losses = SPOTLESS,
) -> Played:
    """Serve a scenario in virtual time and return what happened. `times`: of the model, or of each profile.

    `shadow_share` of the fast profile's answers are read again by the full one, in one pass over prompts and answers;
    a guard with that `bound` takes it back where they lose too much. `losses`: of a sound and of a broken one's
    answers, from which each one's is drawn, by the request alone.
    """
    clock = VirtualClock()
    each = [times] if isinstance(times, StepTimes) else times
    engines = [SlowedEngine(profile, scenario, clock.now, seed) for profile in each]

    def read(requests: Sequence[ServingRequest]) -> tuple[float, list[float]]:
        tokens = max(request.prompt_tokens + request.new_tokens for request in requests)
        pools = [losses[request.arrival >= scenario.broken] for request in requests]
        drawn = [random.Random(f"loss {seed} {request.id}").choice(pool) for request, pool in zip(requests, pools)]
        return each[0].prefill(len(requests), tokens) * scenario.factor(clock.now()), drawn

    shadow = None
    if shadow_share and len(each) > 1:
        shadow = ShadowReads(guard(bound, shadow_share, scenario.trace, seed), read, clock.now, seed)
    profiles = Profiles(engines, lambda: getattr(policy, "profile", 0), shadow)
    served = serve(scenario.trace, policy, profiles, clock, limits, aside=profiles.aside)
    owner = dict(profiles.owner)
    return Played(served, owner, shadow.seconds, list(shadow.guard.events)) if shadow else Played(served, owner)


def guard(bound: float, share: float, trace: Trace, seed: int) -> Guard:
    """Return the guard of a served trace: less is read after a clean start; a cool-down lasts a tenth of the trace."""
    return Guard(bound, share, trace.seconds / COOL_DOWNS, seed, later=LATER * share)


def seconds_beyond(served: Served, objectives: Objectives) -> float:
    """Return for how many seconds of the trace too few of the requests arriving were served within both objectives."""
    return float(sum(width for _, width, good in windows(served, objectives) if good is not None and good < GOOD_SHARE))


def windows(served: Served, objectives: Objectives) -> list[tuple[float, float, float | None]]:
    """Return (start, seconds, share of well-served requests) of each window after the warm-up; None where no request
    arrived.
    """
    start, width = served.trace.warm_up, served.trace.counted_seconds / WINDOWS
    counts, good = np.zeros(WINDOWS), np.zeros(WINDOWS)
    for outcome in served.counted:
        window = min(WINDOWS - 1, int((outcome.request.arrival - start) / width))
        counts[window] += 1
        good[window] += met(outcome, objectives)
    return [(start + i * width, width, float(good[i] / counts[i]) if counts[i] else None) for i in range(WINDOWS)]


def overshoot(served: Served, objectives: Objectives) -> float:
    """Return by what share of the objective the slowest time per token after the warm-up lay beyond it; 0 where none
    did.
    """
    times = [outcome.token_seconds for outcome in served.counted]
    slowest = max((seconds for seconds in times if seconds is not None), default=0.0)
    return max(0.0, slowest / objectives.token_seconds - 1)


def reversals(values: Sequence[float]) -> int:
    """Return how often a course changes direction."""
    moves = np.sign(np.diff(np.asarray(values, dtype=float)))
    moves = moves[moves != 0]
    return int((moves[1:] != moves[:-1]).sum())


def swing(course: Sequence[tuple[float, float, float]], since: float, until: float) -> float | None:
    """Return how far a limit goes back and forth in the second half of [since, until): the sum of its moves less what
    they lead to in the end, in ln(limit), per decision. An oscillating loop's is large and a settled one's is not,
    however many or few moves it makes. `course` has (second, limit, signal); None with less than two decisions then.
    """
    levels = np.log([limit for second, limit, _ in course if (since + until) / 2 <= second < until])
    if len(levels) < 2:
        return None
    return float((np.abs(np.diff(levels)).sum() - abs(levels[-1] - levels[0])) / len(levels))


class Spinner:
    """Processes that are always busy, one on each core of this process, while the `with` block lasts or until `stop`:
    every core is then shared with another process.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Begin to steal."""
        if self.processes:
            return
        for core in disturbance.cores():
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            self.processes.append(process)
            if hasattr(psutil.Process, "cpu_affinity"):
                psutil.Process(process.pid).cpu_affinity([core])

    def stop(self) -> None:
        """Give the cores back."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []

    def __enter__(self) -> "Spinner":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
