"""One repetition of a planted experiment in a process of its own: `python -m tests.measure.planted_arms REQUEST`.

Prints the measurements as one line of JSON. `lib.measure.trackers` children call `holding` and `slow_down` by name.
"""

import json
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.compare import footprint, speed
from lib.measure.metrics import settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.quality.answers import Classified
from lib.measure.trackers import memory
from lib.models import loading
from lib.optimizations.common import judgement
from lib.optimizations.structured_pruning import method as pruning

HELD = "tests.measure.planted_arms:hold"
SQUARE = 96  # rows of the planted product


def pruned_by_nothing(model: str, effort: str, number: int) -> list[Measurement]:
    """Pruning with ratio 0 and no recovery, through the whole path: speed, memory, quality."""
    loaded, size = loading.load(model), settings.read(effort)
    optimized = pruning.apply(loaded.model, [], ratio=0.0)
    prompt_BT = _prompt(loaded, size.prompt_tokens, number)
    compared = speed.compare(loaded.model, optimized, prompt_BT, size, seed=number)
    judged = judgement.judge(loaded, optimized, replace(size, items=min(size.items, 80), windows=8), number)
    return [*compared.measurements, *footprint.footprint(loaded.model, optimized, size), *judged.measurements]


def slowed(
    model: str, effort: str, number: int, share: float, memory: bool = False, swap: bool = False
) -> list[Measurement]:
    """The model against itself with `share` more matrix work in every step."""
    baseline, optimized = loading.load(model), loading.load(model).model
    if share:
        slow_down(optimized, share)
    arms = (optimized, baseline.model) if swap else (baseline.model, optimized)
    size = settings.read(effort)
    names = ("prefill", "decode")
    prompt_BT = _prompt(baseline, size.prompt_tokens, number)
    compared = speed.compare(*arms, prompt_BT, size, names=names, seed=number)
    return [*compared.measurements, *(footprint.footprint(*arms, size) if memory else [])]


def slow_down(model: nn.Module, share: float) -> nn.Module:
    """Make every call of the model do about `share` more: products of two small matrices, as many as that takes."""
    square = torch.randn(SQUARE, SQUARE)
    products: dict[torch.Size, int] = {}

    @torch.inference_mode()
    def seconds(call: Any, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        start = time.perf_counter()
        output = plain(*args, **kwargs)
        took = time.perf_counter() - start
        if ids.shape not in products:
            products[ids.shape] = round(share * took / seconds(lambda: square @ square, 200))
        for _ in range(products[ids.shape]):
            square @ square
        return output

    for _ in range(3):  # the first calls are slow, and must not set the amount
        plain(input_ids=torch.ones(1, 8, dtype=torch.long))
    model.forward = forward
    return model


def holding(model: str, effort: str, number: int, megabytes: int) -> list[Measurement]:
    """Peaks of the model, and of the model in a child that holds a block of memory besides."""
    size = settings.read(effort)
    work: dict[str, Any] = {"load": {"name": model}, "prompt_tokens": size.prompt_tokens, "new_tokens": size.new_tokens}
    held = memory.Arm(**work, transform=HELD, arguments={"megabytes": megabytes})
    none = memory.Arm(**work, transform=HELD, arguments={"megabytes": 0})
    return memory.measurements(*memory.peaks(none, held, turns=footprint.turns(size)))


def hold(model: nn.Module, megabytes: int) -> nn.Module:
    """Attach a tensor of this size to the model, every page of it written."""
    if megabytes:
        model.register_buffer("held", torch.ones(megabytes * 2**20, dtype=torch.uint8), persistent=False)
    return model


def losing(model: str, draws: int, number: int) -> list[dict[str, Any]]:
    """Answers of the model to 160 drawn items, of which so many right ones are made wrong that the true loss of
    accuracy is the margin; how often each score is called maintained.
    """
    loaded = loading.load(model)
    task = next(name for name in loaded.tasks if evaluate.classifies(name))
    answers = evaluate.classify(loaded, task, "final", 400, 0)
    random = np.random.default_rng(number)
    right = np.flatnonzero(answers.right_N)
    margin = 0.02
    flip_share = margin * len(answers.ids) / len(right)  # of the right answers: the true loss is the margin
    maintained = {name: 0 for name in ("accuracy", "f1_macro")}
    for draw in range(draws):
        chosen = random.integers(0, len(answers.ids), 160)
        base = _subset(answers, chosen)
        wrong = random.random(160) < flip_share
        changed_N = np.where(wrong & base.right_N, (base.truth_N + 1) % len(base.labels), base.chosen_N)
        scores_NL = base.scores_NL.copy()
        scores_NL[wrong & base.right_N] *= 1.01
        other = replace(base, chosen_N=changed_N, scores_NL=scores_NL)
        for measured in answer_comparison.compare_classified(base, other, margin=margin, seed=draw):
            if measured.metric in maintained:
                maintained[measured.metric] += measured.verdict == "maintained"
    return [{"metric": name, "draws": draws, "maintained": count} for name, count in maintained.items()]


def _subset(answers: Classified, chosen: np.ndarray) -> Classified:
    return replace(
        answers,
        ids=[answers.ids[index] for index in chosen],
        truth_N=answers.truth_N[chosen],
        chosen_N=answers.chosen_N[chosen],
        scores_NL=answers.scores_NL[chosen],
        source_N=None if answers.source_N is None else answers.source_N[chosen],
    )


def _prompt(loaded: loading.Loaded, tokens: int, seed: int) -> torch.Tensor:
    return evaluate.task_list.text_windows(loaded, "final", 1, tokens, seed)


ARMS = {arm.__name__: arm for arm in (pruned_by_nothing, slowed, holding, losing)}


def main() -> None:
    """Run one repetition."""
    request = json.loads(sys.argv[1])
    rows = ARMS[request.pop("arm")](**request)
    print(json.dumps([row.model_dump(mode="json") if isinstance(row, Measurement) else row for row in rows]))


if __name__ == "__main__":
    main()
