"""Replays with two profiles of the real model, while other processes share the cores in the middle third of a trace.

All settings take turns step by step (`lib.measure.serving.replaying.turns`), so that any slowdown at some moment of a
trace affects all of them at that moment. Idle waiting is skipped. The slowness is read from the replays, so that the
simulation gets the same and can be compared with both settings. Policies are passed in as functions; the module is
independent of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import engine, replay, step_timing, validation
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.protocol import Clock, Policy, Served
from lib.measure.serving.replay import PromptOf
from lib.measure.serving.replaying import turns
from lib.measure.serving.replaying.rounds import Replayed, ServingRounds
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.slo import Objectives
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, Phase, ServingRequest, Trace, make
from lib.measure.serving.validation import SimulationError
from lib.measure.timing import disturbance
from lib.measure.trackers import energy_source
from lib.measure.trackers.energy_source import Counter
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.feedback_mechanisms import scenarios, shadow
from lib.optimizations.feedback_mechanisms.disturbance_comparison import (
    CONTEXTS,
    LENGTHS,
    PolicyFactory,
    TwoProfileSetup,
)
from lib.optimizations.feedback_mechanisms.guarding.shadow_reads import ShadowReads
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST, Profiles
from lib.optimizations.feedback_mechanisms.scenarios import CALM, WARM_UP, Scenario, Spinner

JITTERS = 5  # simulations per replay
ROUNDS = {"preview": 2, "quick": 6, "standard": 6, "thorough": 12}  # an interval needs at least six pairs
# Length of a replay relative to quick: within two seconds a limit hardly moves.
LONGER = {"preview": 0.15, "quick": 1, "standard": 4, "thorough": 8}
PHASES = ("warm-up", "calm", "stolen core", "calm")
# Requests per third, on average: arrivals are random, and with five, only every second build reached
# `replay.LEAST_COUNTED`. Then the largest factor by which a replay is stretched to reach that number.
LEAST_REQUESTS, MOST_STRETCHED = 7, 3
STATIC, AGAIN, LOOP = "static", "static again", "loop"


@dataclass(frozen=True)
class Stolen:
    """A replay, the profile that answered each request, and the number of the guard's rollbacks."""

    replayed: Replayed
    profile_of: dict[int, int]
    rollbacks: int = 0

    @property
    def served(self) -> Served:
        """The outcome of each request."""
        return self.replayed.served


class Stealing:
    """An engine during whose calls `spinner` runs between seconds `start` and `end` of its clock.

    Servers in turn share the spinner: their clocks are never far apart.
    """

    def __init__(self, engine: Profiles, spinner: Spinner, clock: Clock, start: float, end: float):
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

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        self._look()
        return self.engine.shared(parts)

    def leave(self, ids: Sequence[int]) -> float:
        return self.engine.leave(ids)


def trace(rate: float, seconds: float, lengths: Lengths, seed: int = 0) -> Trace:
    """Return the trace to replay: a warm-up and three thirds, at the calm share of `rate`."""
    calm, lead = Phase(seconds / 3, CALM * rate, lengths), WARM_UP * seconds / 3
    return make("stolen core, live", [Phase(lead, CALM * rate, lengths), *[calm] * 3], seed, lead)


def traces(rate: float, seconds: float, effort: str, seed: int = 0) -> list[Trace]:
    """Return the trace of every round.

    A replay lasts `seconds` at effort quick; it is stretched, by at most MOST_STRETCHED, to have LEAST_REQUESTS in a
    third.
    """
    seconds *= LONGER[effort]
    seconds = min(max(seconds, 3 * LEAST_REQUESTS / (CALM * rate)), MOST_STRETCHED * seconds)
    return [trace(rate, seconds, LENGTHS, seed + 1000 + at) for at in range(ROUNDS[effort])]


@dataclass(frozen=True)
class _Arm:
    """A server with its own profiles, which takes turns with the others."""

    engines: list[ModelEngine]
    profiles: Profiles
    timed: turns.EngineInTurn
    policy: turns.ChargedPolicy
    serve: Callable[[], Served]


def serve_stolen(
    models: Sequence[nn.Module],
    trace: Trace,
    policies: Mapping[str, Policy],
    setup: TwoProfileSetup,
    prompt_of: PromptOf,
    counter: Counter | None = None,
    slower: float = 1.0,
) -> dict[str, Stolen]:
    """Serve `trace` with the real models under every policy, in turns; busy processes share the cores in its middle
    third. Seconds are divided by `slower`, the machine's slowness when the trace began.

    The setup's share of the fast profile's answers is reread by the full one, in the server's time, for a guard that
    rolls the fast profile back if they lose too much.
    """
    in_turn = turns.Turns({name: VirtualClock() for name in policies})
    with Spinner() as spinner:
        arms = {
            name: _arm(name, policy, models, trace, setup, prompt_of, spinner, in_turn, counter, slower)
            for name, policy in policies.items()
        }
        close = disturbance.watch()
        served = turns.run({name: arm.serve for name, arm in arms.items()}, in_turn)
        disturbed = close()
    return {name: _stolen(arm, served[name], disturbed, counter) for name, arm in arms.items()}


def _arm(
    name: str, policy: Policy, models: Sequence[nn.Module], trace: Trace, setup: TwoProfileSetup, prompt_of: PromptOf,
    spinner: Spinner, in_turn: turns.Turns, counter: Counter | None, slower: float,
) -> _Arm:  # fmt: skip
    clock, engines = in_turn.clocks[name], [ModelEngine(model, prompt_of) for model in models]
    for profile in engines:
        replay.warm_up(profile, trace)

    def read(requests: Sequence[ServingRequest]) -> tuple[float, list[float]]:
        start = time.perf_counter()
        answers = [torch.tensor(engines[-1].output[request.id]) for request in requests]
        losses = shadow.disagreements(models[0], [prompt_of(request) for request in requests], answers)
        return time.perf_counter() - start, losses

    reads = None
    if setup.shadow_share and len(models) > 1:
        guard = scenarios.guard(setup.bound, setup.shadow_share, trace, trace.seed)
        reads = ShadowReads(guard, read, clock.now, trace.seed)
    profiles = Profiles(engines, lambda: getattr(policy, "profile", 0), reads)
    stealing = Stealing(profiles, spinner, clock, *trace.starts[2:4])
    timed = turns.EngineInTurn(stealing, in_turn, name, counter.joules if counter else None, slower)
    charged = turns.ChargedPolicy(policy, clock, slower)
    aside = partial(timed.beside, profiles.aside) if reads else None
    limits = setup.limits
    return _Arm(
        engines, profiles, timed, charged, lambda: serve(trace, charged, timed, clock, limits, aside=aside)
    )  # fmt: skip


def _stolen(arm: _Arm, served: Served, disturbed: str | None, counter: Counter | None) -> Stolen:
    output = {request: ids for profile in arm.engines for request, ids in profile.output.items()}
    reads = arm.profiles.shadow
    rollbacks = sum(event == "rolled back" for _, event in reads.guard.events) if reads else 0
    run = replay.replayed(served, output, arm.timed, arm.policy, disturbed, counter)
    return Stolen(run, dict(arm.profiles.owner), rollbacks)


def workload(size: int) -> str:
    """Return the name of the replays' workload, with the baseline's static limit `size`."""
    return f"{replay.WORKLOAD}, static {size}"


def slowness(run: Stolen, times: StepTimes) -> tuple[tuple[float, float], ...]:
    """Return (second, factor) of the warm-up and of each third, with factor the mean of measured ÷ tabled decode
    seconds. For runs with one profile.
    """
    starts, factors = run.served.trace.starts, []
    for start, end in zip(starts, [*starts[1:], run.served.trace.seconds]):
        inside = [
            step.seconds / times.decode(step.batch, step.tokens)
            for step in run.served.steps
            if step.kind == "decode" and start <= step.start < end
        ]
        factors.append((start, float(np.mean(inside)) if inside else 1.0))
    return tuple(factors)


@dataclass(frozen=True)
class LiveTrial:
    """Replays of a static setting, of the same again, and of the loop, one trace per round, while a core is stolen.

    policy: the loop that served its first round. profile_of: the profile that answered each request of the loop's runs.
    slowness: (second, factor) of warm-up and thirds, read from the first static run. rows, error: simulations of both
    settings, and their mean error. missed: mean seconds missed by static and loop. rollbacks: of the fast profile, in
    all runs of the loop. acted: number of runs in which the loop moved its limit or changed the profile.
    """

    rounds: ServingRounds
    policy: Policy
    profile_of: list[dict[int, int]]
    slowness: tuple[tuple[float, float], ...]
    rows: list[dict]
    error: Measurement
    missed: tuple[float, float]
    headline: Measurement
    measurements: list[Measurement]
    rollbacks: int = 0
    acted: int = 0

    @property
    def replays(self) -> tuple[list[Replayed], list[Replayed]]:
        """The replays of both arms."""
        return self.rounds.runs[STATIC], self.rounds.runs[LOOP]

    @property
    def served(self) -> Served:
        """The first run of the loop."""
        return self.rounds.served(LOOP)[0]

    @property
    def courses(self) -> tuple[list, list]:
        """The loop's decisions and its changes of the profile in its first run."""
        return getattr(self.policy, "course", []), getattr(getattr(self.policy, "switch", None), "course", [])

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The second at which each phase begins."""
        return list(zip(self.served.trace.starts, PHASES))

    @property
    def conditions(self) -> str:
        """One line on the slowness of each phase, other disturbances, the seconds missed, and the number of replays in
        which the loop changed anything, as a static limit does not.
        """
        factors = ", ".join(f"{factor:.2f}" for _, factor in self.slowness)
        missed = f"seconds missed: {self.missed[0]:.2f} static, {self.missed[1]:.2f} loop"
        missed += f"; rollbacks by the guard: {self.rollbacks}"
        missed += f"; the loop moved a setting in {self.acted} of {len(self.rounds.traces)} replays"
        return f"Slowed by {factors} (warm-up and thirds); other disturbances: {self.rounds.disturbed}; {missed}"

    @property
    def strays(self) -> SimulationError:
        """The simulation's error against the replays, which all simulated numbers carry."""
        return validation.error_of(self.error, self.rows)

    def carried(self, simulated: Measurement) -> Measurement:
        """Return a simulated measurement with this trial's error (`validation.with_error`)."""
        return validation.with_error(simulated, self.strays)


def compare(
    loaded: Loaded,
    fast: nn.Module,
    setup: TwoProfileSetup,
    static: PolicyFactory,
    loop: PolicyFactory,
    *,
    size: int,
    effort: str,
    seconds: float,
    seed: int,
) -> LiveTrial:
    """Replay calm traces with a stolen core under both settings in turn, and simulate them with each replay's own
    slowness (`simulations`). `size` is the limit of the static setting, named in the workload.
    """
    live = traces(setup.rate, seconds, effort, seed)
    models = (loaded.model,) if setup.alone else (loaded.model, fast)
    prompt_of, counter = engine.prompts(loaded, CONTEXTS[-1], seed), energy_source.counter(loaded.device)
    makers: Mapping[str, PolicyFactory] = {STATIC: static, AGAIN: static, LOOP: loop}
    runs: dict[str, list[Stolen]] = {name: [] for name in makers}
    policies: list[Policy] = []
    slower: list[float] = []
    text_T = tasks.text_windows(loaded, "final", 4, CONTEXTS[-1], seed).flatten()
    repeats = 1 if effort == "preview" or loaded.scale != "proxy" else 3
    slowness_now = partial(step_timing.slowness, loaded.model, text_T, setup.times[0], repeats=repeats)
    for each in live:
        chosen = {name: make(Scenario(each)) for name, make in makers.items()}
        policies.append(chosen[LOOP])
        slower.append(slowness_now())
        for name, run in serve_stolen(models, each, chosen, setup, prompt_of, counter, slower[-1]).items():
            runs[name].append(run)
    factors, simulated = simulations(setup, live, runs, makers)
    replayed = {name: [run.replayed for run in each] for name, each in runs.items()}
    conditions: dict[str, Any] = {"planned": True, "stepwise": True, "calibration": setup.times[0].disturbed}
    rounds = ServingRounds(tuple(live), replayed, counter, slowness=tuple(slower), **conditions)
    rows = validation.compare(simulated, {name: rounds.served(name) for name in (STATIC, LOOP)}, setup.objective)
    error = validation.simulation_error(rows, f"simulation against {rounds.source}")
    headline = replay.goodput(rounds, setup.objective, STATIC, AGAIN, LOOP, workload(size))
    means = [
        float(np.mean([scenarios.seconds_beyond(run, setup.objective) for run in rounds.served(name)]))
        for name in (STATIC, LOOP)
    ]
    measurements = [
        headline,
        error,
        *replay.latencies(rounds, setup.objective, STATIC, AGAIN, LOOP, workload(size)),
        *replay.described(rounds, setup.objective, STATIC, LOOP, workload(size)),
        *replay.costs(rounds, STATIC, AGAIN, LOOP, workload(size)),
    ]
    owners = [run.profile_of for run in runs[LOOP]]
    missed = means[0], means[1]
    counts = sum(run.rollbacks for run in runs[LOOP]), sum(map(moved, policies))
    return LiveTrial(rounds, policies[0], owners, factors[0], rows, error, missed, headline, measurements, *counts)


def moved(policy: Policy) -> bool:
    """Return whether a loop moved its limit or changed the profile.

    If it did neither, any difference of its replay from that of a static limit is not its doing.
    """
    limits = {limit for _, limit, _ in getattr(policy, "course", [])}
    return len(limits) > 1 or bool(getattr(policy, "changes", []))


def simulations(
    setup: TwoProfileSetup,
    live: Sequence[Trace],
    runs: Mapping[str, Sequence[Stolen]],
    makers: Mapping[str, PolicyFactory],
) -> tuple[list[tuple[tuple[float, float], ...]], dict[str, list[list[Served]]]]:
    """Return the slowness of each static replay, and the simulations of both settings: per jitter, a run per trace.

    Settings get different slices of a shared core, so each is simulated with its own slowness. With rows of two
    profiles at once a step's tabled time is unknown, so the loop then gets the slowness of the round's static replay.
    """
    timed = {STATIC: runs[STATIC], LOOP: runs[LOOP if setup.alone else STATIC]}
    factors = {name: [slowness(run, setup.times[0]) for run in replays] for name, replays in timed.items()}
    scripts = {name: [Scenario(*pair) for pair in zip(live, slow)] for name, slow in factors.items()}
    simulated = {
        name: [[setup.play(script, makers[name](script), jitter).served for script in own] for jitter in range(JITTERS)]
        for name, own in scripts.items()
    }
    return factors[STATIC], simulated


def read_timeline(live: LiveTrial, objective: Objectives) -> tuple[str, str]:
    """Return two sentences on the timeline of the loop's first replay."""
    decisions, changes = live.courses
    course = pd.DataFrame(decisions, columns=["second", "limit", "signal"])
    start, end = live.served.trace.starts[2:4]
    stolen = course[course.second.between(start, end)].signal
    calm = course[course.second < start].signal
    target = objective.token_seconds
    ratios = [f"{signal.median() / target:.2f}" if len(signal) else "an unknown share" for signal in (calm, stolen)]
    first = (
        f"The signal's median is {ratios[0]} of the objective before the core is stolen, and {ratios[1]} while it is."
    )
    profiles = [profile for owner in live.profile_of for profile in owner.values()]
    share = sum(profile == 1 for profile in profiles) / max(1, len(profiles))
    if getattr(live.policy, "switch", None) is None:
        return first, f"The profile never changes, since {NO_FAST}: only the limit of rows moves."
    answered = f"over all rounds the fast one gave {percent(share)} of the answers"
    return first, f"Changes of the profile: {len(changes)}; {answered}."
