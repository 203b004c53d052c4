"""What a sparse model attends to over length and place: density and recall of mass over context, values repeated from
the start, the middle and the end of a prompt. Knows patterns of blocks and tasks, and no optimization.

Shapes: H query heads, N and M blocks of queries and keys, R sampled blocks of queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import nn

from lib.measure.quality import evaluate
from lib.measure.quality.evaluate import Retrieved
from lib.models.decoding.attention_inputs import Heads
from lib.models.loading import Loaded
from lib.models.tasks.retrieval import KEY, LEAD, VALUE
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention import experiment
from lib.optimizations.adaptive_sparse_attention.experiment import Finder

NEAR = 64  # tokens between a value at the end of a prompt and the question


@torch.inference_mode()
def survey(
    seen: Sequence[Heads], find: Finder, lengths: Sequence[int], share: float = 0.95, seed: int = 0
) -> list[dict]:
    """Return a row per length and block: what the pattern keeps, and what others of its budget would hold.

    Density and recall are of the pattern found; `window` and `random` are the recall of as many blocks in every row,
    chosen otherwise, `oracle` that of the blocks of most exact mass; `needed` is the least density at which an oracle
    reaches `share` of the mass. All exact, over sampled blocks of queries.
    """
    rows = []
    for length in lengths:
        for whole in seen:
            heads = whole if length == whole.tokens else whole.first(length)
            kept_HNM = find(heads)
            mass_HRM = experiment.mass(heads, find.block)
            found = experiment.judge(heads, kept_HNM, find.block, mass_HRM)
            row = {"length": length, "block": heads.index, "density": found.density, "recall": found.recall}
            row["needed"] = experiment.needed(heads, find.block, share, mass_HRM)
            for name in ("window", "random"):
                other_HNM = blocks.same_budget(kept_HNM, name, seed=seed + heads.index)
                row[name] = experiment.judge(heads, other_HNM, find.block, mass_HRM).recall
            rows.append(row | {"oracle": _oracle(kept_HNM, mass_HRM), "density_of_heads": found.density_H.tolist()})
    return rows


def _oracle(kept_HNM: torch.Tensor, mass_HRM: torch.Tensor) -> float:
    """Return the mean mass of the heaviest blocks, as many in every row as are kept."""
    count_HR1 = kept_HNM[:, experiment.sampled_rows(kept_HNM.shape[1])].sum(-1, keepdim=True)
    reached_HRM = mass_HRM.sort(dim=-1, descending=True).values.cumsum(-1)
    return float(reached_HRM.gather(-1, count_HR1 - 1).mean())


def curves(rows: Sequence[dict], names: Mapping[str, str]) -> pd.DataFrame:
    """Return `rows` of `survey` for `figures.impact`: over length, for each column in `names` (column → arm) the mean
    over blocks and, as `low` and `high`, the least and the largest block.
    """
    frame, found = pd.DataFrame(rows), []
    for column, arm in names.items():
        over = frame.groupby("length")[column]
        found.append(pd.DataFrame({"value": over.mean(), "low": over.min(), "high": over.max(), "arm": arm}))
    return pd.concat(found).rename_axis("strength").reset_index()


def at_places(
    loaded: Loaded,
    arms: Mapping[str, nn.Module],
    length: int,
    count: int,
    seed: int = 0,
    known: Mapping[str, Mapping[str, Retrieved]] | None = None,
    everywhere: Sequence[str] | None = None,
) -> dict[str, dict[str, Retrieved]]:
    """Return for each arm which of `count` values it repeats from the "start", "middle" and "end" of a prompt of
    `length` tokens: the same prompts for every arm, greedy, exact match.

    `known` are answers (arm → place) that were given before, to the same prompts; others are asked for. Arms that are
    not named in `everywhere` (by default all are) are asked in the middle alone. Raises ValueError where known answers
    are of another distance.
    """
    room = length - 2 * KEY - VALUE  # text around the stored value
    leads = {"start": LEAD, "middle": room // 2, "end": max(LEAD, room - NEAR)}
    found: dict[str, dict[str, Retrieved]] = {}
    for arm, model in arms.items():
        found[arm] = {}
        places = leads if everywhere is None or arm in everywhere else ("middle",)
        for place, lead in ((place, leads[place]) for place in places):
            one = (known or {}).get(arm, {}).get(place)
            if one is not None and (one.distance, len(one.right_N)) != (room - lead, count):
                raise ValueError(f"{arm}, {place}: known answers are not to prompts of {length} tokens")
            found[arm][place] = one or evaluate.retrieval(_with(loaded, model), room - lead, count, seed, lead)
    return found


def _with(loaded: Loaded, model: nn.Module) -> Loaded:
    return Loaded(**{**vars(loaded), "model": model})


def place_bars(found: Mapping[str, Mapping[str, Retrieved]]) -> pd.DataFrame:
    """Return `at_places` for `figures.bars`: a bar for each place and arm, with Wilson's 95 % interval."""
    rows = []
    for place in next(iter(found.values()), {}):
        for arm, places in ((arm, places) for arm, places in found.items() if place in places):
            right_N: np.ndarray = places[place].right_N
            spread = binomtest(int(right_N.sum()), len(right_N)).proportion_ci(method="wilson")
            row = {"arm": f"{place}, {arm}", "value": float(right_N.mean()), "low": spread.low, "high": spread.high}
            rows.append(row)
    return pd.DataFrame(rows)
