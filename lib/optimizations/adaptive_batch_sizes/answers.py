"""Compare answers computed in a batch with answers computed alone, as accuracy on held-out items.

A different batch size rounds differently; batching may change nothing else. The caller passes in the policy.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.quality.answers import Classified, Retrieved
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.protocol import Limits, Policy, Served
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.traffic import ServingRequest, Trace
from lib.models.loading import Loaded
from lib.models.tasks import tasks

ALONE = 160  # most items answered one at a time
TOGETHER = 2  # the cache has room for at least this many rows of the longest kind, so that answers share a batch
FEWER = 2  # effort preview divides the numbers of items and of retrieved values by it


def retrieved_among_chats(
    loaded: Loaded,
    effort: Effort,
    policy: Policy,
    limits: Limits,
    rate: float,
    batching: str = "iteration",
    *,
    seed: int = 0,
) -> tuple[Retrieved, Served]:
    """Return which values of key-value retrieval are right when their prompts are served among chats, and the run.

    Every second request is a chat of a different length, so rows join, are padded and leave all the time. Engine times
    are real, idle time is skipped. No request is refused: the cache's bound, set for other requests, is raised if
    needed to hold TOGETHER of the longest ones, since an answer that was never computed is not a wrong one.
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
            start = request.id * 31 % max(1, len(text_T) - request.prompt_tokens)  # the text may be short
            return text_T[start : start + request.prompt_tokens]
        return ids_BT[request.id // 2].cpu()

    if limits.cache_bytes is not None:
        columns = max(request.prompt_tokens + request.new_tokens for request in requests)
        limits = replace(limits, cache_bytes=max(limits.cache_bytes, TOGETHER * columns * limits.bytes_per_token))
    engine = ModelEngine(loaded.model, prompt_of, limits.cache_bytes)
    limits = replace(limits, patience_seconds=None)
    served = serve(trace, policy, engine, VirtualClock(), limits, batching=batching, drain_seconds=float("inf"))
    # With batching by request a finished row is decoded on with the others.
    outputs = [engine.output.get(2 * index, [])[:answer_tokens] for index in range(len(target_BV))]
    right = [output == target.tolist() for output, target in zip(outputs, target_BV)]
    complete = all(len(output) == answer_tokens for output in outputs)
    given_NV = np.array(outputs) if complete else None
    return Retrieved(effort.retrieval_distance, np.array(right), given_NV=given_NV), served


def classified(loaded: Loaded, effort: Effort, batch: int, seed: int = 0) -> list[Classified]:
    """Return the answers to the model's classification tasks, reading `batch` prompts together.

    A real model reads a shared prefix once and shares passes whatever `batch` is, so for a batch of 1 each item is
    scored in a call of its own.
    """
    answers = []
    for task in (name for name in loaded.tasks if name in tasks.CLASSIFY):
        items, labels = tasks.items(task, "final", effort.items, seed), tasks.class_labels(task)
        groups = [[item] for item in items] if batch == 1 else [items]
        scores_NL = torch.cat([tasks.label_scores(loaded, task, group, batch) for group in groups]).numpy()
        truth_N = np.array([labels.index(item.label) for item in items])
        ids, source_N = [item.id for item in items], evaluate.sources_of(items)
        chosen_N = scores_NL.argmax(1)
        answers.append(Classified(task, labels, ids, truth_N, chosen_N, scores_NL, source_N=source_N))
    return answers


def alone_and_together(loaded: Loaded, effort: Effort, *served: Any, seed: int = 0) -> list[Measurement]:
    """Return the accuracy of answers computed one at a time (baseline) against answers computed together (optimized).

    Classification: one prompt per pass against 32, on at most ALONE items. Key-value retrieval: alone against served
    among chats; `served` (policy, limits, rate, batching) is as in `retrieved_among_chats`. Effort preview
    divides both numbers of items by FEWER.
    """
    if loaded.random_weights:
        reason = "random weights: answers carry no information"
        return [measurement.unavailable(name, "serve", reason) for name in ("f1_macro", "retrieval_exact_match")]
    options = {"resamples": effort.resamples, "seed": seed}
    fewer = FEWER if effort.preview else 1
    items, prompts = min(effort.items, ALONE) // fewer, effort.retrieval_prompts // fewer
    effort = replace(effort, items=items, retrieval_prompts=prompts)
    compared = []
    for single, batched in zip(classified(loaded, effort, 1, seed), classified(loaded, effort, 32, seed), strict=True):
        compared += answer_comparison.compare_classified(single, batched, **options)
    alone = evaluate.retrieval(loaded, effort.retrieval_distance, effort.retrieval_prompts, seed)
    together, _ = retrieved_among_chats(loaded, effort, *served, seed=seed)
    return [*compared, answer_comparison.compare_retrieved(alone, together, **options)]
