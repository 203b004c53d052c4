"""Replays traces with the real model behind the server loop, step by step and arms in turn, and measures the replays.

Every round serves one trace with every arm. The model runs every step, which takes its measured time; idle waiting is
skipped. The arms take turns within the trace, so that a slow phase of the machine affects all of them; each round has
its own trace. Rates and objectives assume the machine's speed at the time when step times were measured. If the machine
is slower when a round begins, the round's seconds are divided by that factor; otherwise the same trace would be another
share of its capacity. Goodput, latency, energy and the cache's peak are all measured on these replays, so they describe
the same traffic. Knows nothing about particular policies: the caller passes functions that create them.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_samples, paired_stats
from lib.measure.metrics.decision import BUSY
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import slo
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.protocol import Limits, Policy, Served
from lib.measure.serving.replaying import turns
from lib.measure.serving.replaying.rounds import Replayed, ServingRounds
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.slo import Objectives
from lib.measure.serving.traffic import ServingRequest, Trace
from lib.measure.timing import disturbance
from lib.measure.trackers import energy, energy_source
from lib.measure.trackers.energy_source import Counter

PromptOf = Callable[[ServingRequest], torch.Tensor]
WORKLOAD = "serve, real model"
REPEATED_SHARE = 0.5  # at most this share of the number of rounds is served again because of disturbances
LEAST_COUNTED = 15  # requests in a replay, on average: goodput is a count
LATENCIES = {  # means or percentiles of a replay, by metric; with the tail, since policies may let some requests wait
    "latency_p50_ms": "latency p50",
    "latency_p95_ms": "latency p95",
    "time_to_first_token_ms": "first token p50",
    "time_per_output_token_ms": "time per output token",
}
SHARED = "the other process, started on purpose, uses energy too, and the counter reads the whole processor"
BLURRED = "arms take turns step by step, and the GPU's counter updates too rarely to assign energy to a step"
# Why the cache's peak is not judged: builds of one commit chose 4 and 8 rows, and the peak was larger and smaller.
FOLLOWS_THE_CHOICE = "it follows from the chosen size and the schedule, where noise decides between equally good ones"


def warm_up(engine: ModelEngine, trace: Trace) -> None:
    """Serve two requests together, untimed, because the first calls of a shape are slower. The cache's bound is lifted
    meanwhile, since it may not have room for both.
    """
    if trace.requests:
        bound, engine.limit_bytes = engine.limit_bytes, None
        engine.prefill([trace.requests[0]])
        engine.prefill([trace.requests[-1]])
        for _ in range(3):
            engine.decode()
        engine.clear()
        engine.limit_bytes = bound


def in_turn(
    model: nn.Module,
    traces: Sequence[Trace],
    arms: Mapping[str, Callable[[], Policy]],
    limits: Limits,
    prompt_of: PromptOf,
    *,
    batching: str = "iteration",
    device: str = "cpu",
    seed: int = 0,
    slowness: Callable[[], float] | None = None,
    repeated_share: float = REPEATED_SHARE,
) -> ServingRounds:
    """Replay every trace under every arm, with a new policy each time, all arms at the same moment of the trace
    (`lib.measure.serving.replaying.turns`).

    `slowness` is called before every round and returns how many times slower the machine is than when rates and
    objectives were set. A disturbed round is served again with new policies; at most `repeated_share` × the number of
    rounds. Raises RuntimeError if a cache outgrows its bound.
    """
    counter = energy_source.counter(device)
    runs: dict[str, list[Replayed]] = {name: [] for name in arms}
    factors: list[float] = []
    repeated = 0
    others = counter.beside() if counter.beside else None

    def round_of(trace: Trace, names: Sequence[str]) -> tuple[dict[str, Replayed], float]:
        factor = slowness() if slowness else 1.0
        engines = {name: ModelEngine(model, prompt_of, limits.cache_bytes) for name in names}
        policies = {name: arms[name]() for name in names}
        return _together(trace, engines, policies, limits, batching, counter, factor), factor

    for index, trace in enumerate(traces):
        names = list(arms)
        random.Random(seed + index).shuffle(names)
        served, factor = round_of(trace, names)
        while repeated < int(repeated_share * len(traces)) and any(run.disturbed for run in served.values()):
            repeated += 1
            served, factor = round_of(trace, names)
        factors += [factor] if slowness else []
        for name, run in served.items():
            runs[name].append(run)
    shared = others() if others else None
    options: dict[str, Any] = {"slowness": tuple(factors), "repeated": repeated, "shared": shared}
    return ServingRounds(tuple(traces), runs, counter, stepwise=True, **options)


def _together(
    trace: Trace,
    engines: Mapping[str, ModelEngine],
    policies: Mapping[str, Policy],
    limits: Limits,
    batching: str,
    counter: Counter,
    slowness: float,
) -> dict[str, Replayed]:
    """Serve one trace with every arm, in turns."""
    for engine in engines.values():
        warm_up(engine, trace)
    clocks = {name: VirtualClock() for name in engines}
    in_turn_of = turns.Turns(clocks)
    timed = {
        name: turns.EngineInTurn(engine, in_turn_of, name, counter.joules, slowness) for name, engine in engines.items()
    }
    charged = {name: turns.ChargedPolicy(policy, clocks[name], slowness) for name, policy in policies.items()}

    def server(name: str) -> Callable[[], Served]:
        return lambda: serve(trace, charged[name], timed[name], clocks[name], limits, batching=batching)

    close = disturbance.watch()
    served = turns.run({name: server(name) for name in engines}, in_turn_of)
    disturbed = close()
    return {
        name: replayed(served[name], engines[name].output, timed[name], charged[name], disturbed, counter)
        for name in engines
    }


def replayed(
    served: Served,
    output: dict[int, list[int]],
    engine: turns.EngineInTurn,
    policy: turns.ChargedPolicy,
    disturbed: str | None,
    counter: Counter | None,
) -> Replayed:
    """Return the replay of one arm. Its seconds include the policy's own computation, and so do its joules if they are
    an estimate from seconds; a counter updates too rarely for that.
    """
    wall, busy = (getattr(engine, name) + getattr(policy, name) for name in ("wall_seconds", "cpu_seconds"))
    joules = engine.joules
    if joules is not None and counter and counter.of_times:
        joules += counter.of_times(policy.wall_seconds, policy.cpu_seconds)
    share = busy / max(wall * disturbance.cores_given(), 1e-9)
    return Replayed(served, output, share, disturbed, busy, joules)


# --- measurements -----------------------------------------------------------------------------------------------------


def goodput(
    rounds: ServingRounds, objective: Objectives, baseline: str, again: str, optimized: str, workload: str = WORKLOAD
) -> Measurement:
    """Return the goodput of two arms, paired by round. `again` is the baseline replayed a second time in every round,
    for the noise floor.
    """
    arms = [[slo.goodput(run, objective) for run in rounds.served(name)] for name in (baseline, optimized, again)]
    judged = _judged("goodput_requests_per_second", workload, arms, rounds.source, disturbed=rounds.busy)
    counted = float(np.mean([len(run.counted) for run in rounds.served(baseline)]))
    if counted >= LEAST_COUNTED:
        return judged
    reason = f"{counted:.1f} requests counted in a replay, fewer than {LEAST_COUNTED}: two policies that differ may tie"
    return measurement.unjudged(judged, reason)


def control(
    rounds: ServingRounds, objective: Objectives, baseline: str, again: str, workload: str = WORKLOAD
) -> Measurement:
    """Return the goodput of two equal arms. It is judged by the variance between processes of other runs, not by its
    own deviation, so that it can fail. On a busy machine it is not judged, like the arms.
    """
    arms = [[slo.goodput(run, objective) for run in rounds.served(name)] for name in (baseline, again, baseline)]
    return _judged("goodput_requests_per_second", workload, arms, rounds.source, disturbed=rounds.busy)


def costs(
    rounds: ServingRounds, baseline: str, again: str, optimized: str, workload: str = WORKLOAD
) -> list[Measurement]:
    """Return the cache's peak (without a verdict), CPU seconds and joules per token of the same replays."""
    names = (baseline, optimized, again)
    peaks = [[float(run.served.peak_bytes) for run in rounds.runs[name]] for name in names]
    peak = _judged("kv_cache_peak_bytes", workload, peaks, rounds.source, process_sigma=0.0)
    joules = _joules(rounds, names, workload)
    counted = joules.verdict not in ("unavailable", "informative")
    return [measurement.unjudged(peak, FOLLOWS_THE_CHOICE), _cpu_seconds(rounds, names, workload, counted), joules]


def _joules(rounds: ServingRounds, names: Sequence[str], workload: str) -> Measurement:
    """Return the joules per token of the replays; judged if a counter measured them, and only those of the arms."""
    metric, source = "energy_joules_per_token", f"{rounds.counter.scope}; {rounds.source}"
    spent = [[_per_token(run.joules, run) for run in rounds.runs[name]] for name in names]
    known = [[value for value in arm if value is not None] for arm in spent]
    if any(len(arm) < len(rounds.traces) for arm in known):
        return measurement.unavailable(metric, workload, "the counter did not move within a replay", source)
    joules = _judged(metric, workload, known, source, provenance=rounds.counter.provenance)
    on_gpu = rounds.counter.kind == "nvml"
    if rounds.counter.provenance != "measured":
        return measurement.unjudged(joules, energy.ESTIMATED)
    if rounds.planned and not on_gpu:
        return measurement.unjudged(joules, SHARED)
    if rounds.shared:
        return measurement.unjudged(joules, energy.counted_too(rounds.shared))
    return measurement.unjudged(joules, BLURRED) if rounds.stepwise and on_gpu else joules


def _cpu_seconds(rounds: ServingRounds, names: Sequence[str], workload: str, counted: bool) -> Measurement:
    """Return the CPU seconds per token of the replays; judged if no counter measured joules (`counted`), unless a GPU
    did the work.
    """
    samples = [[_per_token(run.cpu_seconds, run) or 0.0 for run in rounds.runs[name]] for name in names]
    seconds = energy.cpu_seconds(*samples, workload=workload, source=rounds.source, counted=counted)
    if counted or rounds.counter.kind != "nvml" or seconds.verdict == "unavailable":
        return seconds
    return measurement.unjudged(seconds, energy.BESIDE_A_GPU)


def _per_token(amount: float | None, run: Replayed) -> float | None:
    return amount / run.tokens if amount and amount > 0 and run.tokens else None


def _judged(metric: str, workload: str, arms: Sequence[Sequence[float]], source: str, **options: Any) -> Measurement:
    """Return a measurement of (baseline, optimized, baseline again), paired by round. It is not judged if a value is 0;
    a disturbance is still stated, since it withholds the other timed verdicts of these rounds.
    """
    if min(map(min, arms), default=0.0) <= 0:
        first, second = (float(np.mean(arm)) for arm in arms[:2])
        reason = "the value of a replay is 0, so not every round has a ratio"
        fields: dict[str, Any] = {"n": len(arms[0]), "reason": reason}
        if busy := options.get("disturbed"):
            reason = f"{BUSY}: {busy[-1]}, in {len(busy)} of {len(arms[0])} rounds; {reason}"
            fields |= {"reason": reason, "disturbed": len(busy)}
        return measurement.informative(metric, workload, first, second, source, **fields)
    floor = paired_stats.noise_floor(paired_stats.differences(arms[0], arms[2]))
    return paired_samples.from_samples(metric, workload, arms[0], arms[1], source=source, floor=floor, **options)


def latencies(
    rounds: ServingRounds, objective: Objectives, baseline: str, again: str, optimized: str, workload: str = WORKLOAD
) -> list[Measurement]:
    """Return the latencies of two arms, paired by round. `again` is the baseline replayed a second time in every round,
    for the noise floor. Not judged if a request of a replay did not finish: its time per token is then unknown, and an
    arm that leaves out its slow requests would look fast.
    """
    names = (baseline, optimized, again)
    arms = [[slo.summary(run, objective) for run in rounds.served(name)] for name in names]
    unfinished = [sum(int(row["unfinished"] or 0) for row in arm) for arm in arms]
    source = f"{rounds.source}; unfinished, and of infinite latency: {unfinished[0]} and {unfinished[1]} requests"
    source += f", {unfinished[2]} of the second replay of the baseline"
    results = []
    for metric, key in LATENCIES.items():
        values = [[1000 * value for row in arm if (value := row[key]) is not None] for arm in arms]
        if min(map(len, values), default=0) < len(rounds.traces):
            results.append(measurement.unavailable(metric, workload, "too few requests finished", source))
            continue
        judged = _judged(metric, workload, values, source, disturbed=rounds.busy)
        lost = sum(unfinished)
        missing = f"{lost} request{'' if lost == 1 else 's'} of the three replays did not finish"
        results.append(measurement.unjudged(judged, missing) if any(unfinished) else judged)
    return results


def described(
    rounds: ServingRounds, objective: Objectives, baseline: str, optimized: str, workload: str = WORKLOAD
) -> list[Measurement]:
    """Return goodput share, p99 time between tokens, mean batch and CPU utilisation of two arms: means over the rounds,
    not judged.
    """
    names = {
        "goodput_share": ("goodput share", 1),
        "time_between_tokens_p99_ms": ("between tokens p99", 1000),
        "batch_rows": ("batch", 1),
    }
    arms = [[slo.summary(run, objective) for run in rounds.served(name)] for name in (baseline, optimized)]
    results = []
    for metric, (key, scale) in names.items():
        first, second = (_mean([row[key] for row in arm]) for arm in arms)
        if first is None or second is None:
            results.append(measurement.unavailable(metric, workload, "too few requests finished", rounds.source))
        else:
            values = scale * first, scale * second
            results.append(measurement.informative(metric, workload, *values, rounds.source, n=len(rounds.traces)))
    base, opt = (float(np.mean([run.utilisation for run in rounds.runs[name]])) for name in (baseline, optimized))
    source = f"user + system time over wall time, {rounds.source}"
    return [*results, measurement.informative("cpu_utilisation", workload, base, opt, source, n=len(rounds.traces))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# --- answers ----------------------------------------------------------------------------------------------------------


def same_tokens(outputs: Sequence[dict[int, list[int]]]) -> tuple[float, float, int]:
    """Return (share of requests with equal answers, share of equal tokens, requests) of two runs of the same requests.

    Only tokens that both runs produced are compared.
    """
    first, second = outputs
    shared = sorted(set(first) & set(second))
    equal = tokens = same = 0
    for name in shared:
        length = min(len(first[name]), len(second[name]))
        a, b = torch.tensor(first[name][:length]), torch.tensor(second[name][:length])
        equal += bool((a == b).all())
        tokens += length
        same += int((a == b).sum())
    return equal / max(1, len(shared)), same / max(1, tokens), len(shared)


def answers_alike(
    baseline: Sequence[Replayed], optimized: Sequence[Replayed], unavailable: str | None = None
) -> list[Measurement]:
    """Return the share of requests with the same tokens in both arms' replays of the same traces, and the share of
    equal tokens. `unavailable` is the reason if they are not available: random weights give near ties, which another
    batch decides differently.
    """
    pairs = [same_tokens([before.output, after.output]) for before, after in zip(baseline, optimized)]
    count = sum(requests for *_, requests in pairs)
    source = f"{count} requests answered by the real model under both policies, greedy, same prompts"
    names = ("same_answers", "top1_agreement")
    if reason := unavailable or (None if count else "nothing was served"):
        return [measurement.unavailable(name, WORKLOAD, reason, source) for name in names]
    values = [sum(pair[index] * pair[2] for pair in pairs) / count for index in range(2)]
    return [measurement.informative(name, WORKLOAD, 1.0, value, source, n=count) for name, value in zip(names, values)]
