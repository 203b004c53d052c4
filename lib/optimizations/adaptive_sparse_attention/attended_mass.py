"""Measure what a block pattern attends to: density and recall of attention mass of single blocks, by context length.

Recall of mass is always computed from exact probabilities (for a sample of the blocks of queries), never from the
scores that chose the pattern. `planted` builds heads whose mass is concentrated by construction, to show how the search
and the kernel behave if attention is sparse.

Shapes: H query heads, G key-value heads, T tokens, D head size, N and M blocks of queries and keys, R sampled rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.models.decoding.attention_inputs import Heads, watch
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks

SAMPLED_ROWS = 12  # blocks of queries whose exact mass is computed, spread evenly over the prompt
SHARE = 0.95  # of the mass, that an oracle has to reach
CURVES = {
    "density": "density, kept",
    "recall": "recall of mass, kept",
    "needed": f"density that an oracle needs for {SHARE}",
}
SHOWN_HEADS = 4


@dataclass(frozen=True)
class Attended:
    """The share of causal blocks and the exact share of attention mass that a pattern keeps, per head."""

    density_H: np.ndarray
    recall_H: np.ndarray

    @property
    def density(self) -> float:
        return float(self.density_H.mean())

    @property
    def recall(self) -> float:
        return float(self.recall_H.mean())


def sampled_rows(count: int, most: int = SAMPLED_ROWS) -> torch.Tensor:
    """Return the indices of at most `most` of `count` rows, evenly spread and including the last."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().unique()


@torch.inference_mode()
def attended(heads: Heads, kept_HNM: torch.Tensor, block: int, mass_HRM: torch.Tensor | None = None) -> Attended:
    """Return density and exact recall of mass of a pattern; `mass_HRM`: `sampled_mass`, if already computed."""
    rows = sampled_rows(kept_HNM.shape[1])
    mass_HRM = sampled_mass(heads, block) if mass_HRM is None else mass_HRM
    causal = int(blocks.causal_blocks(*kept_HNM.shape[1:]).sum())
    density_H = kept_HNM.sum((1, 2)).float() / causal
    recall_H = (mass_HRM * kept_HNM[:, rows]).sum(-1).mean(1)
    return Attended(density_H.cpu().numpy(), recall_H.cpu().numpy())


@torch.inference_mode()
def sampled_mass(heads: Heads, block: int) -> torch.Tensor:
    """Return the exact share of mass [H, R, M] of every block for the sampled blocks of queries."""
    rows = sampled_rows(blocks.blocks_of(heads.tokens, block))
    return blocks.exact_mass(heads.query_HTD, heads.key_GTD, heads.scaling, block, rows)


@dataclass
class Finder:
    """Find the pattern of heads: heads → kept blocks [H, N, M]. Arguments as in `block_pattern.choose`."""

    tau: float
    block: int
    stride: int
    most: float = 1.0

    @torch.inference_mode()
    def __call__(self, heads: Heads) -> torch.Tensor:
        share_HNM = blocks.scores(heads.query_HTD, heads.key_GTD, heads.scaling, self.block, self.stride)
        return blocks.choose(share_HNM, self.tau, self.most)


def needed(heads: Heads, block: int, share: float, mass_HRM: torch.Tensor | None = None) -> float:
    """Return the lowest density at which an oracle reaches `share` of the mass in every row; no pattern needs less.

    The oracle takes the fewest blocks with the most exact mass, over the sampled blocks of queries, weighted by their
    number of visible blocks. `mass_HRM`: see `attended`.
    """
    mass_HRM = sampled_mass(heads, block) if mass_HRM is None else mass_HRM
    rows = sampled_rows(blocks.blocks_of(heads.tokens, block))
    ordered_HRM = mass_HRM.sort(dim=-1, descending=True).values.cumsum(-1)
    count_HR = (ordered_HRM < share).sum(-1) + 1
    return float(count_HR.sum() / ((rows + 1).sum() * len(count_HR)))


def planted(heads: Heads, block: int, share: float = 0.15, seed: int = 0) -> Heads:
    """Return heads of the same shapes with nearly all mass in a few blocks that are known by construction.

    Every block of keys points in its own direction. The queries of a block point along the directions of the first
    block, their own, and a random `share` of the visible blocks (more in some heads, fewer in others), so strongly that
    little mass is left for the rest.
    """
    random = torch.Generator().manual_seed(seed)
    count, tokens = heads.query_HTD.shape[0], heads.tokens
    groups, _, width = heads.key_GTD.shape
    total = blocks.blocks_of(tokens, block)
    direction_GMD = torch.randn(groups, total, width, generator=random)
    direction_GMD = direction_GMD / direction_GMD.norm(dim=-1, keepdim=True)
    portion_H = share * (0.5 + torch.rand(count, generator=random))
    target_HNM = torch.rand(count, total, total, generator=random) < portion_H[:, None, None]
    target_HNM[:, :, 0] = True
    target_HNM |= torch.eye(total, dtype=torch.bool)
    target_HNM &= blocks.causal_blocks(total, total)
    strength = 12 + 2 * float(np.log(total))  # in nats, above directions that are only similar
    member_HMD = direction_GMD.repeat_interleave(count // groups, 0)
    # Queries that score every target direction equally and every other about zero, by least squares.
    gram_HMM = member_HMD @ member_HMD.transpose(1, 2) + 1e-2 * torch.eye(total)
    query_HND = torch.linalg.solve(gram_HMM, target_HNM.float().transpose(1, 2)).transpose(1, 2) @ member_HMD
    query_HTD = (strength / heads.scaling) * query_HND.repeat_interleave(block, 1)[:, :tokens]
    key_GTD = direction_GMD.repeat_interleave(block, 1)[:, :tokens]
    noise_GTD = 0.02 * torch.randn(key_GTD.shape, generator=random)
    like = {"device": heads.query_HTD.device, "dtype": heads.query_HTD.dtype}
    return Heads(heads.index, query_HTD.to(**like), (key_GTD + noise_GTD).to(**like), heads.value_GTV, heads.scaling)


@torch.inference_mode()
def survey(
    heads: Sequence[Heads], find: Finder, lengths: Sequence[int], share: float = SHARE, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a row per length and block: density and recall of the pattern, and of controls with the same budget.

    `density` and `recall` belong to the pattern. `window`, `random` and `oracle` are the recall of as many blocks in
    every row, chosen in other ways or, for `oracle`, by exact mass. `needed` is the lowest density at which an oracle
    reaches `share` of the mass in every row. All are exact, over sampled blocks of queries.
    """
    rows = []
    for length in lengths:
        for whole in heads:
            first = whole if length == whole.tokens else whole.first(length)
            kept_HNM = find(first)
            mass_HRM = sampled_mass(first, find.block)
            pattern = attended(first, kept_HNM, find.block, mass_HRM)
            row: dict[str, Any] = {"length": length, "block": first.index}
            row |= {"density": pattern.density, "recall": pattern.recall}
            row["needed"] = needed(first, find.block, share, mass_HRM)
            for name in ("window", "random"):
                control_HNM = blocks.same_budget(kept_HNM, name, seed=seed + first.index)
                row[name] = attended(first, control_HNM, find.block, mass_HRM).recall
            row |= {"oracle": _oracle(kept_HNM, mass_HRM), "density_of_heads": pattern.density_H.tolist()}
            rows.append(row)
    return rows


def survey_model(
    model: nn.Module, ids_1T: torch.Tensor, find: Finder, lengths: Sequence[int], seed: int = 0
) -> list[dict[str, Any]]:
    """Return `survey` of every block of `model` while it reads a prompt, holding the heads of one block at a time."""
    rows: list[dict[str, Any]] = []
    watch(model, ids_1T, visit=lambda heads: rows.extend(survey([heads], find, lengths, seed=seed)))
    return sorted(rows, key=lambda row: (row["length"], row["block"]))


def _oracle(kept_HNM: torch.Tensor, mass_HRM: torch.Tensor) -> float:
    """Return the mean mass of the heaviest blocks, as many in every row as `kept_HNM` keeps."""
    count_HR1 = kept_HNM[:, sampled_rows(kept_HNM.shape[1])].sum(-1, keepdim=True)
    reached_HRM = mass_HRM.sort(dim=-1, descending=True).values.cumsum(-1)
    return float(reached_HRM.gather(-1, count_HR1 - 1).mean())


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str] = CURVES) -> pd.DataFrame:
    """Return `rows` of `survey` for `style.impact`: by length, for each column in `names` (column → arm), the mean over
    blocks and the smallest and largest block as `low` and `high`.
    """
    frame, frames = pd.DataFrame(rows), []
    for column, arm in names.items():
        over = frame.groupby("length")[column]
        frames.append(pd.DataFrame({"value": over.mean(), "low": over.min(), "high": over.max(), "arm": arm}))
    return pd.concat(frames).rename_axis("strength").reset_index()


def by_length(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return for each length the means over blocks of the columns of `survey`."""
    columns = ["density", "recall", "oracle", "window", "random", "needed"]
    return pd.DataFrame(rows).groupby("length")[columns].mean().reset_index()


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return two sentences on how to read the figure of `curves`, computed from its numbers."""
    at_end = by_length(rows).iloc[-1]
    first = (
        f"At {at_end.length:.0f} tokens the pattern keeps {at_end.density:.2f} of the blocks with {at_end.recall:.3f} "
        f"of the mass; in every row an oracle needs {at_end.needed:.2f} for {SHARE}."
    )
    return first + (
        f" With as many blocks in every row an oracle would hold {at_end.oracle:.3f}, a window {at_end.window:.3f} and "
        f"random blocks {at_end.random:.3f}."
    )


def pattern(heads: Heads, find: Finder) -> tuple[Attended, dict[str, np.ndarray]]:
    """Return density and recall of the pattern for `heads`, and its panels for a figure of masks."""
    kept_HNM = find(heads)
    measured = attended(heads, kept_HNM, find.block)
    return measured, panels(measured, kept_HNM)


def panels(pattern: Attended, kept_HNM: torch.Tensor) -> dict[str, np.ndarray]:
    """Return {title: kept blocks [N, M]} for a few heads, from the sparsest to the densest."""
    order = torch.tensor(pattern.density_H).argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN_HEADS, len(order))).long()].tolist()
    return {f"head {head}: {pattern.density_H[head]:.2f} kept": kept_HNM[head].cpu().numpy() for head in chosen}


def described(pattern: Attended, what: str) -> str:
    """Return the alternative text of a figure of `panels`."""
    span = f"from {pattern.density_H.min():.2f} to {pattern.density_H.max():.2f}"
    return f"Blocks kept in {what}: density {span} by head, recall of mass {pattern.recall:.3f}."


def table(patterns: Mapping[str, Attended]) -> pd.DataFrame:
    """Return density, recall of mass, and the recall of the worst head of each pattern."""
    rows = [(name, pattern.density, pattern.recall, pattern.recall_H.min()) for name, pattern in patterns.items()]
    return pd.DataFrame(rows, columns=["heads", "density", "recall of mass", "recall of the worst head"])
