"""Scripted disturbances of a server, and measures of how far it strays from its objectives under them.

A scenario is a trace of requests and the slowness of the machine at each moment. Rates are shares of the measured
capacity, so a scenario is equally demanding for a small and a large model. `Spinner` disturbs a real run with processes
that take this process's cores. Independent of policies.
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

WINDOWS = 30  # windows per trace for counting the seconds beyond an objective
GOOD_SHARE = 0.9  # share of the requests arriving in a window that must be served within the objectives
CALM, BUSY = 0.45, 1.15  # load as a share of what the full profile can serve within the objectives
COOL_DOWNS = 10  # cool-downs that fit in a trace
WARM_UP = 0.2  # length of the warm-up before the script, in thirds
BROKEN = "broken profile"
STOLEN = 2.0  # slowness of a machine whose cores are shared with one other process each

Losses = tuple[Sequence[float], Sequence[float]]
SPOTLESS: Losses = (0.0,), (1.0,)


@dataclass(frozen=True)
class Scenario:
    """A trace, and pairs (second, factor): after that second every step takes `factor` times as long.

    Requests that arrive after second `broken` get a broken answer if the fast profile answers them.
    """

    trace: Trace
    slowness: tuple[tuple[float, float], ...] = ()
    broken: float = math.inf

    @property
    def name(self) -> str:
        return self.trace.name

    @property
    def thirds(self) -> list[float]:
        """The seconds at which the three thirds begin, and the second at which the last one ends."""
        return [*self.trace.starts[-3:], self.trace.seconds]

    def factor(self, second: float) -> float:
        """Return the machine's slowness at `second`: step time over the measured step time."""
        return next((factor for start, factor in reversed(self.slowness) if start <= second), 1.0)


def script(times: StepTimes, objective: Objectives, lengths: Lengths, seconds: float, seed: int = 0) -> list[Scenario]:
    """Return the four scenarios, all of one length: quiet, load step, longer prompts, stolen core.

    After a warm-up that does not count, the middle third is disturbed: the load steps beyond capacity; prompts become
    three times as long, at a rate beyond *their* capacity; the machine slows down under an unchanged calm load.
    """
    third = seconds / 3
    lead = WARM_UP * third
    worst = {name: (needed, rate) for name, (needed, rate, _) in demands(times, objective, lengths).items()}
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
    """Return the script's load step with a fast profile that breaks as the load rises, just when it is needed."""
    step = next(scenario for scenario in script if scenario.name == "load step")
    return Scenario(replace(step.trace, name=BROKEN), step.slowness, step.thirds[1])


def demands(times: StepTimes, objective: Objectives, lengths: Lengths) -> dict[str, tuple[Lengths, float, float]]:
    """Return the peak demand of each scenario of `script`: lengths, requests per second, slowness."""
    long = Lengths(3 * lengths.prompt_tokens, lengths.new_tokens)
    rate, long_rate = (times.capacity(size, objective.token_seconds)[0] for size in (lengths, long))
    return {
        "quiet": (lengths, CALM * rate, 1.0),
        "load step": (lengths, BUSY * rate, 1.0),
        "longer prompts": (long, BUSY * long_rate, 1.0),
        "stolen core": (lengths, CALM * rate, STOLEN),
    }


class Played(NamedTuple):
    """A simulated run.

    `profile_of`: request id → index of the profile that answered it. `shadow_seconds`: time spent on rereading answers.
    `events`: the guard's events (second, name).
    """

    served: Served
    profile_of: dict[int, int]
    shadow_seconds: float = 0.0
    events: Sequence[tuple[float, str]] = ()

    @property
    def rollbacks(self) -> list[float]:
        """The seconds at which the fast profile was rolled back."""
        return [second for second, event in self.events if event == "rolled back"]

    def share(self, profile: int) -> float:
        """Return the share of answered requests that `profile` answered."""
        return sum(index == profile for index in self.profile_of.values()) / max(1, len(self.profile_of))


class SlowedEngine(SimulatedEngine):
    """The simulated engine on a machine with the scenario's slowness; `now` returns the current second."""

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
    """Serve a scenario in virtual time and return the run. `times`: of the model, or of each profile.

    `shadow_share` of the fast profile's answers are reread by the full profile, in one pass over prompts and answers; a
    guard with this `bound` rolls the fast profile back if they lose too much. `losses`: pools of losses of a sound and
    of a broken profile, from which the loss of each answer is drawn, depending on the request alone.
    """
    clock = VirtualClock()
    by_profile = [times] if isinstance(times, StepTimes) else times
    engines = [SlowedEngine(profile, scenario, clock.now, seed) for profile in by_profile]

    def read(requests: Sequence[ServingRequest]) -> tuple[float, list[float]]:
        tokens = max(request.prompt_tokens + request.new_tokens for request in requests)
        pools = [losses[request.arrival >= scenario.broken] for request in requests]
        drawn = [random.Random(f"loss {seed} {request.id}").choice(pool) for request, pool in zip(requests, pools)]
        return by_profile[0].prefill(len(requests), tokens) * scenario.factor(clock.now()), drawn

    shadow = None
    if shadow_share and len(by_profile) > 1:
        shadow = ShadowReads(guard(bound, shadow_share, scenario.trace, seed), read, clock.now, seed)
    profiles = Profiles(engines, lambda: getattr(policy, "profile", 0), shadow)
    served = serve(scenario.trace, policy, profiles, clock, limits, aside=profiles.aside)
    owner = dict(profiles.owner)
    return Played(served, owner, shadow.seconds, list(shadow.guard.events)) if shadow else Played(served, owner)


def guard(bound: float, share: float, trace: Trace, seed: int) -> Guard:
    """Return the guard of a served trace: less is reread after a clean start; a cool-down is a tenth of the trace."""
    return Guard(bound, share, trace.seconds / COOL_DOWNS, seed, later=LATER * share)


def seconds_beyond(served: Served, objectives: Objectives) -> float:
    """Return the seconds of the trace in which too few of the arriving requests were served within both objectives."""
    return float(sum(width for _, width, good in windows(served, objectives) if good is not None and good < GOOD_SHARE))


def windows(served: Served, objectives: Objectives) -> list[tuple[float, float, float | None]]:
    """Return (start, seconds, share of requests served within the objectives) of each window after the warm-up.

    The share is None if no request arrived.
    """
    start, width = served.trace.warm_up, served.trace.counted_seconds / WINDOWS
    counts, good = np.zeros(WINDOWS), np.zeros(WINDOWS)
    for outcome in served.counted:
        window = min(WINDOWS - 1, int((outcome.request.arrival - start) / width))
        counts[window] += 1
        good[window] += met(outcome, objectives)
    return [(start + i * width, width, float(good[i] / counts[i]) if counts[i] else None) for i in range(WINDOWS)]


def overshoot(served: Served, objectives: Objectives) -> float:
    """Return the excess of the slowest time per token after the warm-up over the objective, as a share of it; 0 if none
    exceeds it.
    """
    times = [outcome.token_seconds for outcome in served.counted]
    slowest = max((seconds for seconds in times if seconds is not None), default=0.0)
    return max(0.0, slowest / objectives.token_seconds - 1)


def reversals(values: Sequence[float]) -> int:
    """Return the number of times that a series changes direction."""
    moves = np.sign(np.diff(np.asarray(values, dtype=float)))
    moves = moves[moves != 0]
    return int((moves[1:] != moves[:-1]).sum())


def swing(course: Sequence[tuple[float, float, float]], since: float, until: float) -> float | None:
    """Return the swing of a limit in the second half of [since, until): the sum of its moves minus its net change, in
    ln(limit), per decision.

    It is large for an oscillating loop and small for a settled one, however many moves they make. `course` holds
    (second, limit, signal). None with fewer than two decisions in that time.
    """
    levels = np.log([limit for second, limit, _ in course if (since + until) / 2 <= second < until])
    if len(levels) < 2:
        return None
    return float((np.abs(np.diff(levels)).sum() - abs(levels[-1] - levels[0])) / len(levels))


class Spinner:
    """Busy processes, one on each core of this process, between `start` and `stop` or the end of the `with` block.

    Every core is then shared with another process.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the processes, unless they run already."""
        if self.processes:
            return
        for core in disturbance.cores():
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            self.processes.append(process)
            if hasattr(psutil.Process, "cpu_affinity"):
                psutil.Process(process.pid).cpu_affinity([core])

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []

    def __enter__(self) -> "Spinner":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
