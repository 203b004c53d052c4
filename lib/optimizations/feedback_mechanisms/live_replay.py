"""Two profiles of the real model serve a trace in real time while a core is really stolen in its middle third.

How much slower the machine then was is read from the static run, so that the simulation gets the same slowness and can
be compared with both runs. Policies come in as functions; this module knows none.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import engine, replay
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.replay import PromptOf, Replayed
from lib.measure.serving.server import Limits, Policy, RealClock, Served, serve
from lib.measure.serving.slo import Objectives
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, Phase, ServingRequest, Trace, make
from lib.measure.timing import disturbance
from lib.models.loading import Loaded
from lib.optimizations.feedback_mechanisms import scenarios
from lib.optimizations.feedback_mechanisms.disturbance_comparison import (
    CONTEXTS,
    LENGTHS,
    PolicyFactory,
    TwoProfileSetup,
)
from lib.optimizations.feedback_mechanisms.profiles import Profiles
from lib.optimizations.feedback_mechanisms.scenarios import CALM, Scenario, Spinner

JITTERS = 5  # simulations beside one replay
LONGER = 3  # times the seconds of a quick replay, beyond quick
PHASES = ("calm", "stolen core", "calm")


@dataclass(frozen=True)
class Stolen:
    """A replay, and which profile answered each request."""

    replayed: Replayed
    profile_of: dict[int, int]

    @property
    def served(self) -> Served:
        """What happened to each request."""
        return self.replayed.served


class Stealing:
    """An engine that starts `spinner` at its first call after second `start`, and stops it at the first after `end`."""

    def __init__(self, engine: Profiles, spinner: Spinner, clock: RealClock, start: float, end: float):
        self.engine, self.spinner, self.clock, self.span = engine, spinner, clock, (start, end)

    def _look(self) -> None:
        inside = self.span[0] <= self.clock.now() < self.span[1]
        (self.spinner.start if inside else self.spinner.stop)()

    @property
    def bytes(self) -> float:
        return self.engine.bytes

    def clear(self) -> None:
        self.engine.clear()

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        self._look()
        return self.engine.prefill(requests)

    def decode(self) -> float:
        self._look()
        return self.engine.decode()

    def leave(self, ids: Sequence[int]) -> float:
        return self.engine.leave(ids)


def trace(rate: float, seconds: float, lengths: Lengths, seed: int = 0) -> Trace:
    """Return the trace to replay: the calm share of `rate`, in three thirds."""
    return make("stolen core, live", [Phase(seconds / 3, CALM * rate, lengths)] * 3, seed)


def serve_stolen(
    models: Sequence[nn.Module], trace: Trace, policy: Policy, limits: Limits, prompt_of: PromptOf
) -> Stolen:
    """Serve `trace` with the real models in real time; a busy process shares the cores in its middle third."""
    engines = [ModelEngine(model, prompt_of) for model in models]
    for profile in engines:
        for request in trace.requests[:2]:
            profile.prefill([request])
        for _ in range(3 if trace.requests else 0):
            profile.decode()
    profiles = Profiles(engines, lambda: getattr(policy, "profile", 0))
    with Spinner() as spinner:
        close, busy, start = disturbance.watch(), time.process_time(), time.perf_counter()
        clock = RealClock()
        stealing = Stealing(profiles, spinner, clock, trace.seconds / 3, 2 * trace.seconds / 3)
        served = serve(trace, policy, stealing, clock, limits)
        wall = time.perf_counter() - start
        share = (time.process_time() - busy) / (wall * len(disturbance.cores()))
        disturbed = close()
    output = {request: ids for profile in engines for request, ids in profile.output.items()}
    return Stolen(Replayed(served, output, share, disturbed), dict(profiles.owner))


def slowness(run: Stolen, times: StepTimes) -> tuple[tuple[float, float], ...]:
    """Return (second, factor) of each third: median of measured ÷ tabled decode seconds. For runs of one profile."""
    third, factors = run.served.trace.seconds / 3, []
    for index in range(3):
        inside = [
            step.seconds / times.decode(step.batch, step.tokens)
            for step in run.served.steps
            if step.kind == "decode" and index * third <= step.start < (index + 1) * third
        ]
        factors.append((index * third, float(np.median(inside)) if inside else 1.0))
    return tuple(factors)


@dataclass(frozen=True)
class LiveTrial:
    """Two replays while a core is stolen (static, loop), the policies that served, simulations of both (`rows`) and
    the seconds each missed.

    slowness: (second, factor) of each third, read from the static run.
    """

    runs: tuple[Stolen, Stolen]
    policies: tuple[Policy, Policy]
    slowness: tuple[tuple[float, float], ...]
    rows: list[dict]
    missed: list[float]
    measurements: list[Measurement]

    @property
    def replays(self) -> tuple[Replayed, Replayed]:
        """Both replays."""
        return self.runs[0].replayed, self.runs[1].replayed

    @property
    def served(self) -> Served:
        """The run of the loop."""
        return self.runs[1].served

    @property
    def courses(self) -> tuple[list, list]:
        """The course of the loop that served: its decisions, and its changes of the profile."""
        loop = self.policies[1]
        return getattr(loop, "course", []), getattr(getattr(loop, "switch", None), "course", [])

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The second at which each third begins."""
        return list(zip(self.served.trace.starts, PHASES))

    @property
    def conditions(self) -> str:
        """Slowness of each third, what else disturbed the machine, and the seconds missed, as one line."""
        disturbed = "; ".join(sorted({run.disturbed for run in self.replays if run.disturbed})) or "nothing else"
        factors = ", ".join(f"{factor:.2f}" for _, factor in self.slowness)
        missed = f"seconds missed: {self.missed[0]:.1f} static, {self.missed[1]:.1f} loop"
        return f"Slowed by {factors} (thirds); disturbed by: {disturbed}; {missed}"


def compare(
    loaded: Loaded,
    fast: nn.Module,
    setup: TwoProfileSetup,
    static: PolicyFactory,
    loop: PolicyFactory,
    *,
    effort: str,
    seconds: float,
    seed: int,
) -> LiveTrial:
    """Replay a calm trace with a stolen core under both policies, and simulate the same with the slowness it had."""
    seconds *= 1 if effort == "quick" else LONGER
    live = trace(setup.rate, seconds, LENGTHS, seed + 1000)
    prompt_of = engine.prompts(loaded, CONTEXTS[-1], seed)
    planned = Scenario(live)
    policies = static(planned), loop(planned)
    first, second = (serve_stolen((loaded.model, fast), live, policy, setup.limits, prompt_of) for policy in policies)
    factors = slowness(first, setup.times[0])
    again = Scenario(live, factors)
    simulated = [
        [setup.play(again, make_policy(again), jitter).served for jitter in range(JITTERS)]
        for make_policy in (static, loop)
    ]
    rows = replay.beside(simulated, [first.replayed, second.replayed], setup.objective)
    measurements = [
        replay.simulation_error(rows),
        *replay.measurements(first.replayed, second.replayed, setup.objective),
    ]
    missed = [scenarios.seconds_beyond(run.served, setup.objective) for run in (first, second)]
    return LiveTrial((first, second), policies, factors, rows, missed, measurements)


def read_timeline(live: LiveTrial, objective: Objectives) -> tuple[str, str]:
    """Return two sentences on how to read the timeline of the loop's replay."""
    decisions, changes = live.courses
    course = pd.DataFrame(decisions, columns=["second", "limit", "signal"])
    third = live.served.trace.seconds / 3
    stolen = course[course.second.between(third, 2 * third)].signal
    calm = course[course.second < third].signal
    target = objective.token_seconds
    ratios = [f"{signal.median() / target:.2f}" if len(signal) else "an unknown share" for signal in (calm, stolen)]
    first = (
        f"The signal's median is {ratios[0]} of the objective before the core is stolen, and {ratios[1]} while it is."
    )
    profiles = list(live.runs[1].profile_of.values())
    share = sum(profile == 1 for profile in profiles) / max(1, len(profiles))
    return first, f"Changes of the profile: {len(changes)}; the fast one gave {share:.0%} of the answers."
