"""Attributes a stack's gain to its parts: every subset is built once, and gains are divided by Shapley values.

Independent of any particular optimization.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lib.measure.compare.speed import Timed
from lib.measure.timing import interleaved
from lib.measure.timing.interleaved import Rounds
from lib.optimizations.common.evidence import interactions, shapley
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import method as composing

WHOLE = "the whole stack"


def groups(steps: Sequence[RecipeStep], most: int = shapley.MOST_PARTS) -> dict[str, list[RecipeStep]]:
    """Return at most `most` parts of the stack by name, in order; the steps beyond that form the last part together.

    A part is named after its optimizations; a repeated name gets a number.
    """
    cut = [[step] for step in steps[: most - 1]] + ([list(steps[most - 1 :])] if len(steps) >= most else [])
    parts: dict[str, list[RecipeStep]] = {}
    for part in cut:
        name = base = " + ".join(step.optimization for step in part)
        number = 1
        while name in parts:
            number += 1
            name = f"{base} {number}"
        parts[name] = part
    return parts


def every_subset(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    parts: Mapping[str, list[RecipeStep]],
    *,
    whole: nn.Module | None = None,
    seed: int = 0,
) -> dict[tuple[str, ...], nn.Module]:
    """Return the model of every subset of the parts; () is `model` itself.

    Each is built from the subset without its last part, as the pipeline would. `whole`: the model after all parts, if
    already built. Raises UserError if a part refuses a subset; the gain then cannot be attributed.
    """
    models: dict[tuple[str, ...], nn.Module] = {}
    for subset in shapley.subsets(list(parts)):
        if not subset:
            models[subset] = model
            continue
        if whole is not None and len(subset) == len(parts):
            models[subset] = whole
            continue
        steps = parts[subset[-1]]
        models[subset] = composing.compose(models[subset[:-1]], calibration, steps, arrange=False, seed=seed).model
    return models


def one_part(name: str, timed: Mapping[str, Timed]) -> dict[str, Rounds]:
    """Return the judged blocks of prefill and decode as rounds of two arms, the baseline and the only part.

    The whole gain belongs to that part, so nothing has to be timed again.
    """
    return {
        work_name: Rounds(
            {interactions.BASELINE: judged.pairs.baseline_seconds, name: judged.pairs.optimized_seconds},
            judged.pairs.iterations,
            judged.pairs.disturbed,
            [
                [interactions.BASELINE, name][:: 1 if order == interleaved.BASELINE_FIRST else -1]
                for order in judged.pairs.order
            ],
            process=judged.pairs.process,
        )
        for work_name, judged in timed.items()
        if work_name in interactions.WORKLOADS
    }


def attribute(
    names: Sequence[str],
    timed: Mapping[str, Rounds],
    lost: Mapping[str, np.ndarray],
    seed: int = 0,
    source_N: np.ndarray | None = None,
) -> list[dict]:
    """Return a row per part and for the whole: Shapley values in log-speed per workload and in loss, with intervals.

    Arms are named by `interactions.named(*subset)`. The parts' values add up to the whole in every round and window, as
    do the means returned. `source_N` is the document number of each window.
    """
    subsets = shapley.subsets(list(names))
    values = {
        work_name: {subset: -rounds.logs(interactions.named(*subset)) for subset in subsets}
        for work_name, rounds in timed.items()
    }
    if lost:
        values["loss"] = {subset: lost[interactions.named(*subset)] for subset in subsets}
    units = {subset: np.eye(len(subsets))[at] for at, subset in enumerate(subsets)}
    weights = {**shapley.shapley(list(names), units), WHOLE: np.asarray([1.0, -1.0])}  # of the subsets in each share
    rows = []
    for quantity, of_subset in values.items():
        shares = shapley.shapley(list(names), of_subset)
        shares[WHOLE] = of_subset[tuple(names)] - of_subset[()]
        for part, values_S in shares.items():
            if quantity == "loss":
                share = shapley.over_items(values_S, seed=seed, source_S=source_N)
            else:
                sigma = interactions.process_sigma(quantity, weights[part])
                share = shapley.mean_over_rounds(values_S, sigma, timed[quantity].process)
            rows.append({"what": quantity, "part": part, "value": share.value, "low": share.low, "high": share.high})
    return rows
