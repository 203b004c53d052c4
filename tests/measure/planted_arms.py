"""One repetition of a planted experiment in a separate process: `python -m tests.measure.planted_arms REQUEST`.

Prints the measurements as one line of JSON. `lib.measure.trackers` children call `hold` and `add_work` by name.
"""

import json
import sys
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
from lib.models.structure import beyond_files
from lib.optimizations.common import judgement
from lib.optimizations.structured_pruning import method as pruning

HELD = "tests.measure.planted_arms:hold"
ADDED = "tests.measure.planted_arms:add_work"
SQUARE = 64  # rows of the planted products
TIMED = ("prefill", "decode")
FEW, MANY = {"prefill": 200, "decode": 20}, {"prefill": 2000, "decode": 150}  # products after a call


def pruned_by_nothing(model: str, effort: str, number: int) -> list[Measurement]:
    """Return the measurements of pruning with ratio 0 and no recovery, end to end: speed, memory, quality."""
    loaded, size = loading.load(model), settings.read(effort)
    optimized = pruning.apply(loaded.model, [], ratio=0.0)
    prompt_BT = _prompt(loaded, size.prompt_tokens, number)
    compared = speed.compare(loaded.model, optimized, prompt_BT, size, seed=number)
    judged = judgement.judge(loaded, optimized, replace(size, items=min(size.items, 80), windows=8), number)
    return [*compared.measurements, *footprint.footprint(loaded.model, optimized, size), *judged.measurements]


def slowed(
    model: str,
    effort: str,
    number: int,
    products: dict[str, int] | None = None,
    alone: bool = False,
    memory: bool = False,
    swap: bool = False,
) -> list[Measurement]:
    """Return the measurements of the model against itself with matrix work after every call: `products` maps the shape
    of the ids ("1x512") to a number of products. `alone` times both in this process, like an arm that no other process
    can load.
    """
    baseline, optimized = loading.load(model), loading.load(model).model
    if products is not None:
        add_work(optimized, products, noted=not alone)
    arms = (optimized, baseline.model) if swap else (baseline.model, optimized)
    size = settings.read(effort)
    prompt_BT = _prompt(baseline, size.prompt_tokens, number)
    compared = speed.compare(*arms, prompt_BT, size, names=TIMED, seed=number)
    assert alone == ("timed in one process" in compared.details), compared.details
    return [*compared.measurements, *(footprint.footprint(*arms, size) if memory else [])]


class Work:
    """A hook that computes products of two small matrices after every call of a model, by the shape of its ids."""

    def __init__(self, products: dict[str, int]) -> None:
        self.products, self.square = products, torch.randn(SQUARE, SQUARE)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for _ in range(self.products.get(_shape(args, kwargs), 0)):
            self.square @ self.square


def add_work(model: nn.Module, products: dict[str, int], noted: bool = True) -> nn.Module:
    """Add `Work` to the model; with `noted`, other processes repeat this on the model that they load."""
    model.register_forward_hook(Work(products), with_kwargs=True)
    return beyond_files.note(model, ADDED, products=products) if noted else model


def work_for(model: str, effort: str, number: int, shares: list[float]) -> list[dict[str, Any]]:
    """Return the numbers of products that slow calls down by `shares`, interpolated between the slowdown by few and by
    many: matrix work also slows what follows it, so its cost is not a multiple of a product's time. Every repetition
    then plants the same work.
    """
    shapes = {"prefill": f"1x{settings.read(effort).prompt_tokens}", "decode": "1x1"}
    slowdowns: dict[str, list[float]] = {name: [] for name in TIMED}
    for counts in (FEW, MANY):
        products = {shapes[name]: count for name, count in counts.items()}
        for row in slowed(model, effort, number, products):
            if row.unit == "tokens/s" and row.ratio:
                slowdowns[row.workload].append(1 / row.ratio - 1)
    rows = []
    for share in shares:
        for name, (few, many) in slowdowns.items():
            more = (share - few) / (many - few) * (MANY[name] - FEW[name])
            rows.append({"share": share, "ids": shapes[name], "products": max(1, round(FEW[name] + more))})
    return rows


def _shape(args: Any, kwargs: Any) -> str:
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return "x".join(str(side) for side in ids.shape)


def holding(model: str, effort: str, number: int, megabytes: int) -> list[Measurement]:
    """Return the memory peaks of the model against the model in a child that holds an extra block of memory."""
    size = settings.read(effort)
    work: dict[str, Any] = {"load": {"name": model}, "prompt_tokens": size.prompt_tokens, "new_tokens": size.new_tokens}
    held = memory.Arm(**work, transform=HELD, arguments={"megabytes": megabytes})
    none = memory.Arm(**work, transform=HELD, arguments={"megabytes": 0})
    return memory.measurements(*memory.peaks(none, held, turns=footprint.turns(size)))


def hold(model: nn.Module, megabytes: int) -> nn.Module:
    """Attach a tensor of this size to the model, with every page written."""
    if megabytes:
        model.register_buffer("held", torch.ones(megabytes * 2**20, dtype=torch.uint8), persistent=False)
    return model


def losing(model: str, draws: int, number: int) -> list[dict[str, Any]]:
    """Return how often each score is called maintained, over draws of 160 of the model's answers in which right answers
    are made wrong until the true loss of accuracy is the margin.
    """
    loaded = loading.load(model)
    task = next(name for name in loaded.tasks if evaluate.classifies(name))
    answers = evaluate.classify(loaded, task, "final", 400, 0)
    random = np.random.default_rng(number)
    right = np.flatnonzero(answers.right_N)
    margin = 0.02
    flip_share = margin * len(answers.ids) / len(right)  # of the right answers: the loss is the margin
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


ARMS = {arm.__name__: arm for arm in (pruned_by_nothing, slowed, work_for, holding, losing)}


def main() -> None:
    """Run one repetition."""
    request = json.loads(sys.argv[1])
    rows = ARMS[request.pop("arm")](**request)
    print(json.dumps([row.model_dump(mode="json") if isinstance(row, Measurement) else row for row in rows]))


if __name__ == "__main__":
    main()
