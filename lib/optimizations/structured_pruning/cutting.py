"""Removes the least salient experts, channels and heads, block by block; the tensors shrink.

Independent of how saliency is scored and of how much is removed.

Shapes: E experts, J channels kept of each expert.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lib.models.calibration.distillation import split
from lib.models.calibration.second_moments import Matrix, Moments, matrices, moments_apart
from lib.models.calibration.walk import Walk, require_finite
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.surgery import (
    best_experts,
    keep_channels,
    keep_expert_channels,
    keep_experts,
    keep_groups,
    resize_linear,
    synchronise,
)
from lib.optimizations.structured_pruning.compensation import fitted
from lib.optimizations.structured_pruning.saliency import Scores

READING = ("o_proj", "down_proj")  # the matrices that read heads and channels
CHANNEL_MULTIPLE = 8  # kept widths are multiples of this: matrix kernels are built for aligned rows
FITTED = ("heads", "channels")  # granularities whose removal takes inputs from a matrix
Readings = dict[int, tuple[Moments, Moments]]  # id of the reading module → moments of fitting text, of held-out text


def prune_blocks(
    pruned: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    scores: Sequence[Scores],
    shares: Sequence[dict[str, float]],
    compensate: bool,
) -> None:
    """Prune every block of `pruned` in place by its scores and shares.

    With `compensate`, each block is refitted on the outputs of the pruned blocks before it.
    """
    if not compensate or not any(share[part] for share in shares for part in FITTED):
        for block in anatomy(pruned).blocks:
            require_finite(block)
            prune_block(block, scores[block.index], shares[block.index])
        synchronise(pruned)
        return
    taught, held_out = split(calibration)
    walk = Walk(pruned, [*taught, *held_out])
    for block in walk:
        prune_block(block, scores[block.index], shares[block.index], readings(walk, len(taught)))
        synchronise(pruned)


def readings(walk: Walk, taught: int) -> Readings:
    """Return the input moments of the matrices that read heads or channels in the block in front of `walk`.

    Two per matrix: of the first `taught` batches, and of the held-out rest.
    """
    readers = reading(walk.model, walk.index)
    first, rest = moments_apart(walk, readers, taught)
    return {id(matrix.owner): (first[matrix.name], rest[matrix.name]) for matrix in readers}


def reading(model: nn.Module, block: int) -> list[Matrix]:
    """Return the matrices of a block that read heads or channels."""
    linears = [m for m in matrices(model, "all", block) if m.module_name.rpartition(".")[2] in READING]
    return [*linears, *(m for m in matrices(model, "experts", block) if m.attribute == "down_proj")]


def prune_block(block: Block, scores: Scores, shares: dict[str, float], moments: Readings | None = None) -> None:
    """Prune one block in place; with `moments`, refit the reading matrices to their original outputs."""
    part, attention = block.feed_forward, block.attention
    if shares["heads"] and attention.kind != "none":
        kept = _kept(scores["heads"], shares["heads"])
        output = attention.output
        columns = _columns(attention.key_value_heads, output.in_features, kept)
        new = _fitted(output, moments, columns, f"block {block.index}, {READING[0]}")
        keep_groups(attention, kept)
        if new is not None:
            resize_linear(output, new)
    if shares["channels"] and part.down is not None:
        kept = _kept(scores["channels"], shares["channels"], CHANNEL_MULTIPLE)
        reader = part.down
        new = _fitted(reader, moments, kept, f"block {block.index}, {READING[1]}")
        keep_channels(block, kept)
        if new is not None:
            resize_linear(reader, new)
    if shares["channels"] and part.experts is not None:
        kept_EJ = _kept(scores["expert_channels"], shares["channels"], CHANNEL_MULTIPLE)
        down = part.experts.down
        keep_expert_channels(part.experts, kept_EJ)
        if moments is not None and id(part.experts.module) in moments:
            what = f"block {block.index}, experts.{READING[1]}"
            new = fitted(down, *moments[id(part.experts.module)], kept_EJ, what)
            part.experts.module.down_proj = nn.Parameter(new, requires_grad=False)
    if shares["experts"] and part.experts is not None:
        count = round(part.experts.count * (1 - shares["experts"]))
        keep_experts(part.experts, best_experts(part.experts, scores["experts"], count))


def _fitted(reader: nn.Linear, moments: Readings | None, kept: torch.Tensor, what: str) -> torch.Tensor | None:
    """Return the weights of `reader` refitted to its original output, or None if it has no moments."""
    if moments is None or id(reader) not in moments:
        return None
    return fitted(reader.weight[None], *moments[id(reader)], kept[None], what)[0]


def _columns(groups: int, inputs: int, kept: torch.Tensor) -> torch.Tensor:
    """Return the indices of the inputs that belong to the groups `kept`."""
    return torch.arange(inputs, device=kept.device).view(groups, -1)[kept].flatten()


def _kept(scores: torch.Tensor, share: float, multiple: int = 1) -> torch.Tensor:
    """Return the ascending indices of the most salient entries along the last dimension: all but about `share`."""
    size = scores.shape[-1]
    count = min(size, max(1, multiple, round(size * (1 - share) / multiple) * multiple))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values
