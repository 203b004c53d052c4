"""Replay the fixed size and the adaptive policy on the real model, arms taking turns step by step.

The replays give the headline, and test the simulation, which serves the same traces: how far does it stray?
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lib.measure.metrics import settings
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import engine, policy_comparison, replay, slo, validation
from lib.measure.serving.policy_comparison import PolicyFactory
from lib.measure.serving.protocol import Served
from lib.measure.serving.replaying.rounds import Replayed, ServingRounds
from lib.measure.serving.traffic import Trace
from lib.measure.serving.validation import MOST_ERROR, SimulationError
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes import real_rivals
from lib.optimizations.adaptive_batch_sizes.real_rivals import RivalReplays
from lib.optimizations.adaptive_batch_sizes.rivals import FixedSize
from lib.optimizations.adaptive_batch_sizes.study import ADAPTIVE, TrafficStudy

JITTERS = 10  # simulations of every replayed trace
ROUNDS = {"preview": 2, "quick": 6, "standard": 6, "thorough": 12}  # an interval takes at least six pairs
LEAST_REQUESTS = {"preview": 1, "quick": 6, "standard": 6, "thorough": 6}  # in each phase
LONGER = {"preview": 0.15, "quick": 1, "standard": 2, "thorough": 5}  # times the seconds of a quick replay
FIXED, AGAIN = "fixed", "fixed again"
SEEDS_FROM = 1000  # added to the first seed: traces on which no simulation has chosen a size


@dataclass(frozen=True)
class RealModelTrial:
    """Replays of the fixed `size` (twice) and of the adaptive policy, one trace per round.

    `rows` compare them with simulations of the same requests, `error` is the mean error of these, `rivals` are replayed
    on the first of the traces. `longer` is the mean time of decode steps ÷ the tabled time (None without a step).
    """

    size: int
    rounds: ServingRounds
    rows: list[dict[str, Any]]
    error: Measurement
    headline: Measurement
    measurements: list[Measurement]
    rivals: RivalReplays
    longer: float | None = None

    @property
    def workload(self) -> str:
        """The workload of the measurements, which names the chosen size."""
        return workload(self.size)

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The traces of the rounds."""
        return self.rounds.traces

    @property
    def served(self) -> Served:
        """The first run of the adaptive policy."""
        return self.rounds.served(ADAPTIVE)[0]

    @property
    def replays(self) -> tuple[list[Replayed], list[Replayed]]:
        """The replays of both arms."""
        return self.rounds.runs[FIXED], self.rounds.runs[ADAPTIVE]

    @property
    def caption(self) -> str:
        """The number of requests, how much longer decode steps took than tabled, and what disturbed the machine."""
        requests = sum(len(trace.requests) for trace in self.traces)
        text = f"{requests} requests, every arm in every round"
        text += f"; decode steps took {self.longer:.2f} times as long as tabled" if self.longer is not None else ""
        return f"{text}; disturbed by: {self.rounds.disturbed}"

    @property
    def strays(self) -> SimulationError:
        """How far the simulation strays from the replays: the error that simulated numbers carry."""
        return validation.error_of(self.error, self.rows)

    def carried(self, simulated: Measurement) -> Measurement:
        """Return a simulated measurement with this trial's error (`validation.with_error`)."""
        return validation.with_error(simulated, self.strays)


def workload(size: int) -> str:
    """Return the name of the replays' workload; the baseline is the fixed `size`."""
    return f"{replay.WORKLOAD}, fixed {size}"


def traces(study: TrafficStudy, effort: str, seconds: float, count: int | None = None) -> list[Trace]:
    """Return the changing traces to replay, each about `seconds` long at effort quick; `count` of them, by default as
    many as the effort has rounds.

    They are longer if that is too short to count goodput: a large model serves few requests per second.
    """
    each = policy_comparison.requests_in(study.setup, "changing", LONGER[effort] * seconds)
    each = max(each, LEAST_REQUESTS[effort])
    seeds = [study.seeds[0] + SEEDS_FROM + index for index in range(ROUNDS[effort] if count is None else count)]
    return policy_comparison.traces(study.setup, "changing", each, seeds)


def serve(
    loaded: Loaded, study: TrafficStudy, size: int, effort: str, seconds: float, rival_rounds: int = -1
) -> RealModelTrial:
    """Serve short changing traces with the real model, arms taking turns; then `rival_rounds` of them (-1: by
    effort), beginning with the same, under every policy. At effort preview disturbed rounds are not repeated. Raises
    AssertionError if the cache outgrew its bound.
    """
    setup, seed, preview = study.setup, study.seeds[0], settings.read(effort).preview
    arms: dict[str, PolicyFactory] = {FIXED: lambda: FixedSize(size)}
    arms |= {AGAIN: arms[FIXED], ADAPTIVE: study.adaptive}
    replayed = traces(study, effort, seconds)
    prompt_of = engine.prompts(loaded, setup.longest, seed)
    slowness = policy_comparison.slowness(loaded, setup, seed, preview=preview)
    options: dict[str, Any] = {"batching": setup.batching, "device": loaded.device, "seed": seed, "slowness": slowness}
    options |= {"repeated_share": 0.0} if preview else {}
    rounds = replay.in_turn(loaded.model, replayed, arms, setup.limits, prompt_of, **options)
    rounds = replace(rounds, calibration=setup.times.disturbed)
    bound = setup.limits.cache_bytes
    peaks = [run.served.peak_bytes for runs in rounds.runs.values() for run in runs]
    assert bound is None or max(peaks) <= bound, "the memory bound was broken"
    simulated = {
        name: [[setup.run(trace, arms[name](), jitter) for trace in replayed] for jitter in range(JITTERS)]
        for name in (FIXED, ADAPTIVE)
    }
    real = {name: rounds.served(name) for name in (FIXED, ADAPTIVE)}
    rows = validation.compare(simulated, real, setup.objective)
    error = validation.simulation_error(rows, f"simulation against {rounds.source}")
    names = (rounds, setup.objective, FIXED, AGAIN, ADAPTIVE, workload(size))
    headline = replay.goodput(*names)
    measurements = [
        headline,
        error,
        *replay.latencies(rounds, setup.objective, FIXED, AGAIN, ADAPTIVE, workload(size)),
        *replay.described(rounds, setup.objective, FIXED, ADAPTIVE, workload(size)),
        *replay.costs(rounds, FIXED, AGAIN, ADAPTIVE, workload(size)),
    ]
    again = traces(study, effort, seconds, real_rivals.rounds_of(effort, rival_rounds))
    place: dict[str, Any] = {"workload": workload(size), "device": loaded.device, "slowness": slowness}
    rivals = real_rivals.replayed(loaded.model, study, size, again, prompt_of, **place)
    longer = longer_than_tabled(study, [run for runs in real.values() for run in runs])
    return RealModelTrial(size, rounds, rows, error, headline, measurements, rivals, longer)


def control(study: TrafficStudy, trial: RealModelTrial) -> Measurement:
    """Return the baseline against its own repeated replay, judged by the margin alone: a control whose noise floor is
    its own difference could not fail.
    """
    return replay.control(trial.rounds, study.setup.objective, FIXED, AGAIN, trial.workload)


def read_timeline(served: Served, objective: slo.Objectives) -> tuple[str, str]:
    """Return two sentences on how to read the timeline of a run."""
    numbers = slo.summary(served, objective)
    if not served.counted:
        return "No request was served.", "Without requests the timeline shows nothing."
    good = sum(slo.met(outcome, objective) for outcome in served.counted)
    longest = max((step.waiting for step in served.steps), default=0)
    first = (
        f"{good} of {len(served.counted)} counted requests met both objectives; at most {longest} waited at once, and "
        f"the largest batch had {numbers['largest batch']} rows."
    )
    late, slow = numbers["first token late"] or 0.0, numbers["tokens late"] or 0.0
    cause = "the queue cost more than the batch" if late > slow else "the batch cost more than the queue"
    cause = "neither cost more than the other" if late == slow else cause
    return first, f"The first token was late for {percent(late)} and the tokens after it for {percent(slow)}: {cause}."


def simulation_refuted(trial: RealModelTrial) -> tuple[bool | None, str]:
    """Return whether the simulation strays from the replays, and the evidence.

    It does not if its error is small. If the error is large, it does only if most quantities of both arms lie outside
    the range of the jitters and nothing disturbed the replays; otherwise the answer is None.
    """
    rows = [row for row in trial.rows if row["error"] is not None]
    error, disturbed = trial.strays, trial.rounds.disturbed
    if error.share is None or not rows:
        return None, "nothing was served"
    outside = sum(None in (row["least"], row["real"]) or not row["least"] <= row["real"] <= row["most"] for row in rows)
    evidence = (
        f"relative error {error.share:.3f} ({error.of}), limit {MOST_ERROR}; {outside} of {len(rows)} quantities "
        f"outside the range of {JITTERS} jitters; disturbed by: {disturbed}"
    )
    if error.share <= MOST_ERROR:
        return False, evidence
    return (True if 2 * outside > len(rows) and disturbed == "nothing" else None), evidence


def longer_than_tabled(study: TrafficStudy, served: Sequence[Served]) -> float | None:
    """Return the mean ratio of measured to tabled time over the decode steps of `served`; None without a step."""
    ratios = [
        step.seconds / study.setup.times.decode(step.batch, step.tokens)
        for run in served
        for step in run.steps
        if step.kind == "decode"
    ]
    return float(np.mean(ratios)) if ratios else None
