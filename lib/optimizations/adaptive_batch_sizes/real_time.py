"""The adaptive policy and a fixed size on the real model in real time, beside simulations of the same requests.

Tells how far the simulation strays from the replays. Knows the study that it belongs to, and no figure.
"""

from dataclasses import dataclass

from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import engine, policy_comparison, replay, slo
from lib.measure.serving.policy_comparison import PolicyFactory
from lib.measure.serving.replay import PromptOf, Replayed
from lib.measure.serving.server import Served
from lib.measure.serving.traffic import Trace
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes.method import FixedSize
from lib.optimizations.adaptive_batch_sizes.study import TrafficStudy

JITTERS = 20  # simulations beside one replay
MOST_SIMULATION_ERROR = 0.10


@dataclass(frozen=True)
class RealTimeTrial:
    """One replay of each policy (fixed size, adaptive), and simulations of the same requests beside them.

    `rows` and `error` use the step times directly before and after the replays, `earlier` those of the beginning.
    """

    trace: Trace
    prompt_of: PromptOf
    replays: tuple[Replayed, Replayed]
    rows: list[dict]
    error: Measurement
    earlier: Measurement
    measurements: list[Measurement]

    @property
    def disturbed(self) -> str:
        """What disturbed the machine meanwhile."""
        return "; ".join(sorted({run.disturbed for run in self.replays if run.disturbed})) or "nothing"

    @property
    def served(self) -> Served:
        """The run of the adaptive policy."""
        return self.replays[1].served


def serve(loaded: Loaded, traffic: TrafficStudy, size: int, seconds: float) -> RealTimeTrial:
    """Serve a shorter changing trace with the real model under both policies. Raises AssertionError where the cache
    outgrew its bound.
    """
    setup, seed = traffic.setup, traffic.seeds[0]
    policies: tuple[PolicyFactory, ...] = (lambda: FixedSize(size), traffic.adaptive)
    rates = [phase.rate for phase in traffic.changing[0].phases]
    each = seconds / sum(1 / rate for rate in rates) if all(rates) else seconds
    trace = policy_comparison.trace(setup, "changing", each, seed + 1000)
    prompt_of = engine.prompts(loaded, policy_comparison.CONTEXTS[-1], seed)
    bracketed, replays = policy_comparison.with_bracketing_step_times(
        loaded,
        setup,
        lambda: [
            replay.replay(loaded.model, trace, make(), setup.limits, prompt_of, setup.batching) for make in policies
        ],
        seed,
    )
    bound = setup.limits.cache_bytes
    assert bound is None or all(run.served.peak_bytes <= bound for run in replays), "the memory bound was broken"
    rows, earlier = (
        replay.beside(
            [[times.run(trace, make(), jitter) for jitter in range(JITTERS)] for make in policies],
            replays,
            setup.objective,
        )
        for times in (bracketed, setup)
    )
    error = replay.simulation_error(rows)
    measurements = [error, *replay.measurements(replays[0], replays[1], setup.objective)]
    pair = replays[0], replays[1]
    return RealTimeTrial(trace, prompt_of, pair, rows, error, replay.simulation_error(earlier), measurements)


def read_timeline(served: Served, objective: slo.Objectives) -> tuple[str, str]:
    """Return two sentences on how to read the timeline of a run."""
    numbers = slo.summary(served, objective)
    if not served.outcomes:
        return "No request was served.", "Without requests the timeline says nothing."
    good = sum(slo.met(outcome, objective) for outcome in served.outcomes)
    longest = max((step.waiting for step in served.steps), default=0)
    first = (
        f"{good} of {len(served.outcomes)} requests met both objectives, at most {longest} waited at once, and the "
        f"largest batch had {numbers['largest batch']} rows."
    )
    late, slow = numbers["first token late"] or 0.0, numbers["tokens late"] or 0.0
    cause = "the queue cost more than the batch" if late > slow else "the batch cost more than the queue"
    cause = "neither cost more than the other" if late == slow else cause
    return first, f"The first token was late for {late:.0%} and the tokens behind it for {slow:.0%}: {cause}."


def simulation_refuted(trial: RealTimeTrial) -> tuple[bool | None, str]:
    """Return whether the simulation strays from the replay of the adaptive policy, and the evidence.

    Not where the mean error is small. Where it is large, only if most quantities lie outside the range of the jitters
    and nothing disturbed the replay: else one replay cannot tell.
    """
    name = trial.served.policy
    rows = [row for row in trial.rows if row["policy"] == name and row["error"] is not None]
    error = trial.error.optimized
    if error is None or not rows:
        return None, "nothing was served in real time"
    outside = sum(not row["least"] <= row["real"] <= row["most"] for row in rows)
    evidence = (
        f"mean relative error {error:.3f}, limit {MOST_SIMULATION_ERROR}; {outside} of {len(rows)} quantities outside "
        f"the range of {JITTERS} jitters; disturbed by: {trial.disturbed}"
    )
    if error <= MOST_SIMULATION_ERROR:
        return False, evidence
    return (True if 2 * outside > len(rows) and trial.disturbed == "nothing" else None), evidence
