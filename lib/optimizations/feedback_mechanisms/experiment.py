"""Two profiles of the real model serve a trace in real time while a core is really stolen in its middle third.

What the machine then was slowed by is read from the run itself, so that the simulation can be given the same slowness
and be compared with it. Knows no policy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.replay import PromptOf, Replayed
from lib.measure.serving.server import Limits, Policy, RealClock, Served, serve
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, Phase, ServingRequest, make
from lib.measure.timing import disturbance
from lib.optimizations.feedback_mechanisms.profiles import Profiles
from lib.optimizations.feedback_mechanisms.scenarios import CALM, Scenario, Spinner


@dataclass(frozen=True)
class Stolen:
    """A replay, and which profile answered each request."""

    replayed: Replayed
    profile_of: dict[int, int]

    @property
    def served(self) -> Served:
        return self.replayed.served


class Stealing:
    """An engine that starts `spinner` at the first call after second `start`, and stops it at the first after `end`."""

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


def trace(rate: float, seconds: float, lengths: Lengths, seed: int = 0):
    """Return the trace to replay: the calm share of `rate`, in three thirds."""
    return make("stolen core, live", [Phase(seconds / 3, CALM * rate, lengths)] * 3, seed)


def replay(models: Sequence[nn.Module], trace, policy: Policy, limits: Limits, prompt_of: PromptOf) -> Stolen:
    """Serve `trace` with the real models in real time; a busy process shares the cores in its middle third."""
    engines = [ModelEngine(model, prompt_of) for model in models]
    for engine in engines:
        for request in trace.requests[:2]:
            engine.prefill([request])
        for _ in range(3 if trace.requests else 0):
            engine.decode()
    profiles = Profiles(engines, lambda: getattr(policy, "profile", 0))
    with Spinner() as spinner:
        close, busy, start = disturbance.watch(), time.process_time(), time.perf_counter()
        clock = RealClock()
        engine = Stealing(profiles, spinner, clock, trace.seconds / 3, 2 * trace.seconds / 3)
        served = serve(trace, policy, engine, clock, limits)
        wall = time.perf_counter() - start
        share = (time.process_time() - busy) / (wall * len(disturbance.cores()))
        disturbed = close()
    output = {name: ids for engine in engines for name, ids in engine.output.items()}
    return Stolen(Replayed(served, output, share, disturbed), dict(profiles.owner))


def slowness(run: Stolen, times: StepTimes) -> tuple[tuple[float, float], ...]:
    """Return (second, factor) of each third: median of measured ÷ tabled decode seconds. For runs of one profile."""
    third, found = run.served.trace.seconds / 3, []
    for index in range(3):
        inside = [
            step.seconds / times.decode(step.batch, step.tokens)
            for step in run.served.steps
            if step.kind == "decode" and index * third <= step.start < (index + 1) * third
        ]
        found.append((index * third, float(np.median(inside)) if inside else 1.0))
    return tuple(found)


def scenario(run: Stolen, factors: Sequence[tuple[float, float]]) -> Scenario:
    """Return the scenario that the simulation is given to repeat `run`."""
    return Scenario(run.served.trace, tuple(factors))
