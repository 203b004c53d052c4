"""The real model behind the server loop: a trace replayed in real time, a burst whose energy is measured, and whether
answers served together equal those served alone. Knows no policy: the caller brings it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.measure.quality.evaluate import Classified, Retrieved
from lib.measure.serving import slo
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.server import Limits, Policy, RealClock, Served, VirtualClock, serve
from lib.measure.serving.slo import Objectives
from lib.measure.serving.traffic import ServingRequest, Trace
from lib.measure.timing import disturbance
from lib.measure.trackers import memory
from lib.models.loading import Loaded
from lib.models.tasks import tasks

PromptOf = Callable[[ServingRequest], torch.Tensor]
BURST_PROMPT, BURST_NEW = 128, 8  # tokens at most of a request in a burst
ALONE = 200  # items that are answered one at a time


@dataclass(frozen=True)
class Replayed:
    """A run of the real model: what happened, the tokens of every request, share of the given cores used, and what
    disturbed the machine meanwhile (None: nothing noticed).
    """

    served: Served
    output: dict[int, list[int]]
    utilisation: float
    disturbed: str | None


def replay(
    model: nn.Module, trace: Trace, policy: Policy, limits: Limits, prompt_of: PromptOf, batching: str = "iteration"
) -> Replayed:
    """Serve `trace` with the real model in real time. Raises RuntimeError if the cache ever outgrows its bound."""
    engine = ModelEngine(model, prompt_of, limits.cache_bytes)
    _warm_up(engine, trace)
    close, busy, start = disturbance.watch(), time.process_time(), time.perf_counter()
    served = serve(trace, policy, engine, RealClock(), limits, batching=batching)
    wall = time.perf_counter() - start
    share = (time.process_time() - busy) / (wall * len(disturbance.cores()))
    return Replayed(served, engine.output, share, close())


def _warm_up(engine: ModelEngine, trace: Trace) -> None:
    """Serve two requests that are not timed: the first calls of a shape cost more."""
    if trace.requests:
        engine.prefill([trace.requests[0]])
        engine.prefill([trace.requests[-1]])
        for _ in range(3):
            engine.decode()
        engine.clear()


class Burst:
    """The first requests of each phase, all arriving at once, served once per call: the workload of the energy reading.

    Prompts and answers are cut short. `tokens` counts the new tokens of one call.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        make_policy: Callable[[], Policy],
        limits: Limits,
        prompt_of: PromptOf,
        each: int = 3,
        new_tokens: int = BURST_NEW,
    ):
        chosen = [
            request
            for start, phase in zip(trace.starts, trace.phases)
            for request in _arriving(trace, start, start + phase.seconds)[:each]
        ]
        requests = [
            ServingRequest(i, 0.0, min(request.prompt_tokens, BURST_PROMPT), min(request.new_tokens, new_tokens))
            for i, request in enumerate(chosen)
        ]
        self.trace = replace(trace, name="burst", requests=tuple(requests))
        self.make_policy, self.limits = make_policy, replace(limits, patience_seconds=None)
        self.engine = ModelEngine(model, prompt_of, limits.cache_bytes)
        self.tokens = max(1, sum(request.new_tokens for request in requests))

    def __call__(self) -> None:
        serve(self.trace, self.make_policy(), self.engine, VirtualClock(), self.limits, drain_seconds=float("inf"))


def _arriving(trace: Trace, since: float, until: float) -> list[ServingRequest]:
    return [request for request in trace.requests if since <= request.arrival < until]


def retrieved_among_chats(
    loaded: Loaded, effort: Effort, policy: Policy, limits: Limits, rate: float, seed: int = 0
) -> tuple[Retrieved, Served]:
    """Return which values of key-value retrieval come back right when their prompts are served among others, and the
    run.

    Every second request is a chat of another length, so rows join, are padded and leave all the time. Times of the
    engine are real, idle time is skipped.
    """
    ids_BT, target_BV = tasks.retrieval_prompts(loaded, effort.retrieval_distance, effort.retrieval_prompts, seed)
    text_T = tasks.text_windows(loaded, "final", 4, 128, seed).flatten().cpu()
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, 2 * len(ids_BT)))
    requests, answer_tokens = [], target_BV.shape[1]
    for index, arrival in enumerate(arrivals.tolist()):
        length, new = int(random.integers(8, 96)), int(random.integers(4, 3 * answer_tokens))
        length, new = (length, new) if index % 2 else (ids_BT.shape[1], answer_tokens)
        requests.append(ServingRequest(index, arrival, length, new))
    trace = Trace("retrieval among chats", seed, (), tuple(requests))

    def prompt_of(request: ServingRequest) -> torch.Tensor:
        if request.id % 2:
            return text_T[request.id : request.id + request.prompt_tokens]
        return ids_BT[request.id // 2].cpu()

    engine = ModelEngine(loaded.model, prompt_of, limits.cache_bytes)
    limits = replace(limits, patience_seconds=None)
    served = serve(trace, policy, engine, VirtualClock(), limits, drain_seconds=float("inf"))
    right = [engine.output.get(2 * index) == target.tolist() for index, target in enumerate(target_BV)]
    return Retrieved(effort.retrieval_distance, np.array(right)), served


def classified(loaded: Loaded, effort: Effort, batch: int, seed: int = 0) -> list[Classified]:
    """Return the answers to the model's classification tasks, `batch` prompts read together."""
    answers = []
    for task in (name for name in loaded.tasks if name in tasks.CLASSIFY):
        items, labels = tasks.items(task, "final", effort.items, seed), tasks.class_labels(task)
        scores_NL = tasks.label_scores(loaded, task, items, batch).numpy()
        truth_N = np.array([labels.index(item.label) for item in items])
        answers.append(Classified(task, labels, [item.id for item in items], truth_N, scores_NL.argmax(1), scores_NL))
    return answers


def alone_and_together(
    loaded: Loaded, effort: Effort, policy: Policy, limits: Limits, rate: float, seed: int = 0
) -> list[Measurement]:
    """Return the accuracy of answers computed one at a time (baseline) against those computed together (optimized).

    Classification: one prompt per pass against 32, of at most ALONE items. Key-value retrieval: alone against
    served among others with `policy`.
    """
    if loaded.random_weights:
        reason = "random weights: answers carry no information"
        return [measurement.unavailable(name, "serve", reason) for name in ("f1_macro", "retrieval_exact_match")]
    options = {"resamples": effort.resamples, "seed": seed}
    effort = replace(effort, items=min(effort.items, ALONE))
    compared = []
    for single, batched in zip(classified(loaded, effort, 1, seed), classified(loaded, effort, 32, seed), strict=True):
        compared += evaluate.compare_classified(single, batched, **options)
    alone = evaluate.retrieval(loaded, effort.retrieval_distance, effort.retrieval_prompts, seed)
    together, _ = retrieved_among_chats(loaded, effort, policy, limits, rate, seed)
    return [*compared, evaluate.compare_retrieved(alone, together, **options)]


def measurements(baseline: Replayed, optimized: Replayed, objective: Objectives) -> list[Measurement]:
    """Return goodput, latencies, largest cache and CPU share of two replays of one trace. One run each, no interval."""
    runs = (baseline, optimized)
    source = f"one replay in real time each, {len(baseline.served.outcomes)} requests, real model"
    disturbed = sorted({run.disturbed for run in runs if run.disturbed})
    source += f"; disturbed: {'; '.join(disturbed)}" if disturbed else ""
    summaries = [slo.summary(run.served, objective) for run in runs]

    def informative(metric: str, values: Sequence[float | None]) -> Measurement:
        first, second = values
        if first is None or second is None:
            return measurement.unavailable(metric, "serve, real time", "too few requests finished", source)
        return measurement.informative(metric, "serve, real time", first, second, source, n=1)

    return [
        informative("goodput_requests_per_second", [row["goodput"] for row in summaries]),
        informative("goodput_share", [row["goodput share"] for row in summaries]),
        informative("latency_p50_ms", [_ms(row["latency p50"]) for row in summaries]),
        informative("time_per_output_token_ms", [_ms(row["time per output token"]) for row in summaries]),
        informative("kv_cache_peak_bytes", [float(run.served.peak_bytes) for run in runs]),
        informative("cpu_utilisation", [run.utilisation for run in runs]),
        informative("batch_rows", [row["batch"] for row in summaries]),
    ]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def peaks(loaded: Loaded, baseline: Replayed, optimized: Replayed) -> list[Measurement]:
    """Return true peaks of memory of one child process per arm, which decodes the largest batch that the arm formed."""
    arms = []
    for run in (baseline, optimized):
        steps = [step for step in run.served.steps if step.kind == "decode"]
        # The step whose padded cache was the largest of the run.
        largest = max(steps, key=lambda step: step.batch * step.tokens, default=None)
        batch, tokens = (largest.batch, largest.tokens) if largest else (1, 16)
        arms.append(
            memory.Arm(
                folder=str(loaded.folder) if loaded.folder else None,
                load=None if loaded.folder else {"name": loaded.name, "scale": loaded.scale, "random_weights": True},
                batch=batch,
                prompt_tokens=max(1, tokens - 4),
                new_tokens=4,
                dtype=str(loaded.dtype).removeprefix("torch."),
                device=loaded.device,
            )
        )
    baseline_peak, optimized_peak = memory.peaks(*arms)
    return memory.measurements(baseline_peak, optimized_peak, workload="serve")


def same_tokens(outputs: Sequence[dict[int, list[int]]]) -> tuple[float, float, int]:
    """Return (share of requests with equal answers, share of equal tokens, requests) of two runs of the same requests.

    Only what both produced is compared.
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


def beside(
    simulated: Sequence[Sequence[Served]], real: Sequence[Replayed], objective: Objectives
) -> list[dict[str, Any]]:
    """Return a row per policy and compared quantity: real, simulated (mean, least and most of the runs), relative error
    of the mean.

    Where least and most lie far apart the quantity depends on single requests, and one replay tells as little of it.
    """
    rows = []
    for runs, replayed in zip(simulated, real):
        measured = slo.summary(replayed.served, objective)
        summaries = [slo.summary(run, objective) for run in runs]
        for name, error in slo.errors(runs, replayed.served, objective).items():
            values = [value for summary in summaries if (value := summary[name]) is not None]
            row: dict[str, Any] = {"policy": replayed.served.policy, "quantity": name}
            row |= {"real": measured[name], "error": error}
            complete = len(values) == len(summaries)
            spread = (float(np.mean(values)), float(min(values)), float(max(values))) if complete else (None,) * 3
            rows.append(row | dict(zip(("simulated", "least", "most"), spread)))
    return rows


def simulation_error(rows: Sequence[dict[str, Any]]) -> Measurement:
    """Return the mean relative error of the simulation for the first policy and the last, from rows of `beside`."""
    source = f"simulation against one replay in real time, mean error of {', '.join(slo.COMPARED)}"
    names = list(dict.fromkeys(row["policy"] for row in rows))
    arms = [[row["error"] for row in rows if row["policy"] == name] for name in (names[0], names[-1])]
    known = [[error for error in arm if error is not None] for arm in arms]
    if not all(known):
        return measurement.unavailable("simulation_error", "serve, real time", "nothing to compare", source)
    first, last = (float(np.mean(arm)) for arm in known)
    return measurement.informative("simulation_error", "serve, real time", first, last, source, n=1)


def answers_alike(real: Sequence[Replayed], unavailable: str | None = None) -> list[Measurement]:
    """Return how many requests of two replays got the same tokens, and how many tokens are the same; or that this is
    `unavailable`, with the reason: random weights are near ties, which another batch decides otherwise.
    """
    *values, count = same_tokens([run.output for run in real])
    source = f"{count} requests answered by the real model under both policies, greedy, same prompts"
    names = ("same_answers", "top1_agreement")
    if reason := unavailable or (None if count else "nothing was served"):
        return [measurement.unavailable(name, "serve, real time", reason, source) for name in names]
    return [
        measurement.informative(name, "serve, real time", 1.0, value, source, n=count)
        for name, value in zip(names, values)
    ]
