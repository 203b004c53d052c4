"""Masks of kept weights: scores, patterns, and SparseGPT, which also corrects the kept weights.

Works on single matrices and on stacks of experts. Independent of models and of how the result is stored.

Shapes: E experts (1 for a single matrix), O outputs, I inputs, B columns of one step of SparseGPT.
"""

import math
import re
from collections.abc import Sequence

import torch

from lib.errors import UserError
from lib.models.calibration.inverse_factor import DAMPING, inverse_factor

METHODS = ("sparsegpt", "wanda", "magnitude", "random")
WITHIN = ("row", "matrix")
PATTERNS = ("unstructured", "2:4", "1x8", "8x8", "16x1")  # 4:8 and any other block RxC are accepted too
HALVES = {"2:4": 4, "4:8": 8}  # group size; half of each group is kept, whatever the sparsity
STEP = 128  # columns chosen at a time
UPDATED = 16  # columns updated one by one; the rest of the step is updated in one product


def block_shape(pattern: str) -> tuple[int, int]:
    """Return rows and columns of a pattern's blocks; (1, 1) without blocks. Raises UserError if unknown."""
    if pattern == "unstructured" or pattern in HALVES:
        return 1, 1
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern)
    if not match:
        raise UserError(f'sparse_neural_networks: pattern "{pattern}"; expected one of {", ".join(PATTERNS)}')
    return int(match[1]), int(match[2])


def score(
    weight: torch.Tensor, method: str, squares: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the score of every weight [..., O, I], float32; `squares` [I] are Σ x² of the inputs, for wanda.

    If all squares are 0 (no calibration token), wanda falls back to magnitude.
    """
    if method == "random":
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    magnitude = weight.float().abs()
    if method != "wanda":
        return magnitude
    assert squares is not None, "wanda needs the squares of the inputs"
    return magnitude * squares.sqrt() if squares.any() else magnitude


def keep(scores: torch.Tensor, sparsity: float, pattern: str, *, within: str = "row") -> torch.Tensor:
    """Return the bool mask [..., O, I] of the weights to keep: the highest scores within each row or within the matrix.

    A block scores the sum of its weights and competes within its row of blocks; for HALVES, weights compete within
    their group. Neither depends on `within`. In every case the matrix loses round(sparsity × I) weights per row on
    average (HALVES: half of them).
    """
    *batch, outputs, inputs = scores.shape
    if neighbours := HALVES.get(pattern):
        grouped = scores.view(*batch, outputs, inputs // neighbours, neighbours)
        return _highest(grouped, neighbours // 2).view(scores.shape)
    rows, columns = block_shape(pattern)
    blocks = scores.view(*batch, outputs // rows, rows, inputs // columns, columns).sum((-3, -1))
    count = blocks.shape[-1] - round(sparsity * blocks.shape[-1])
    if within == "matrix" and pattern == "unstructured":
        mask = _highest(blocks.flatten(-2), outputs * count).view(blocks.shape)
    else:
        mask = _highest(blocks, count)
    return mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def kept_of(shape: Sequence[int], sparsity: float, pattern: str) -> int:
    """Return the number of weights that `keep` keeps of a matrix or stack of `shape` [..., O, I]."""
    columns = block_shape(pattern)[1]
    blocks = shape[-1] // columns
    count = blocks // 2 if pattern in HALVES else blocks - round(sparsity * blocks)
    return math.prod(shape[:-1]) * count * columns


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of exactly `count` highest scores along the last dimension."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.topk(count, dim=-1, sorted=False).indices, True)


def sparsegpt(
    weight_EOI: torch.Tensor,
    gram_EII: torch.Tensor,
    sparsity: float,
    pattern: str,
    damping: float = DAMPING,
    factor_EII: torch.Tensor | None = None,
    what: str = "a matrix",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return SparseGPT's pruned and corrected weights and the mask of kept weights, each [E, O, I].

    `gram_EII` is Σ x·xᵀ. Columns are processed in order; later columns compensate for the effect of each dropped weight
    on the output, through the rows of the upper Cholesky factor of H⁻¹ (Frantar & Alistarh 2023, algorithm 1). An
    expert that saw no token has H = 1 and is pruned by magnitude. `factor_EII`: the inverse factor of `gram_EII`, if
    already computed for another matrix. Raises UserError naming `what`, as `inverse_factor` does.
    """
    weight, inputs, neighbours = weight_EOI.float().clone(), weight_EOI.shape[-1], HALVES.get(pattern)
    factor = inverse_factor(gram_EII, damping, what) if factor_EII is None else factor_EII
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, inputs, STEP):
        end = min(start + STEP, inputs)
        part_EOB, upper_EBB = weight[..., start:end], factor[..., start:end, start:end]
        curvature_E1B = upper_EBB.diagonal(dim1=-2, dim2=-1).square().unsqueeze(-2)
        chosen = None if neighbours else _keep_in_step(part_EOB, curvature_E1B, sparsity, pattern, start, inputs)
        errors = torch.zeros_like(part_EOB)
        for low in range(0, end - start, UPDATED):
            high = min(low + UPDATED, end - start)
            for j in range(low, high):
                if neighbours and j % neighbours == 0:
                    group = slice(j, j + neighbours)
                    scores = part_EOB[..., group].square() / curvature_E1B[..., group]
                    mask[..., start + j : start + j + neighbours] = _highest(scores, neighbours // 2)
                column = mask[..., start + j] if chosen is None else chosen[..., j]
                dropped_EO = part_EOB[..., j] * ~column
                errors[..., j] = dropped_EO / upper_EBB[..., j, j].unsqueeze(-1)
                part_EOB[..., j:high] -= errors[..., j].unsqueeze(-1) * upper_EBB[..., j, j:high].unsqueeze(-2)
                part_EOB[..., j] *= column  # dropped weights become exactly zero, kept ones do not change
            part_EOB[..., high:] -= errors[..., low:high] @ upper_EBB[..., low:high, high:]
        if chosen is not None:
            mask[..., start:end] = chosen
        weight[..., end:] -= errors @ factor[..., start:end, end:]
    return weight.to(weight_EOI.dtype), mask


def _keep_in_step(
    part_EOB: torch.Tensor, curvature_E1B: torch.Tensor, sparsity: float, pattern: str, start: int, inputs: int
) -> torch.Tensor:
    """Return the mask of the columns of one step; over all steps it drops as many weights as `keep`."""
    rows, columns = block_shape(pattern)
    scores = part_EOB.square() / curvature_E1B
    *batch, outputs, width = scores.shape
    blocks = scores.view(*batch, outputs // rows, rows, width // columns, columns).sum((-3, -1))
    done, now = start // columns, (start + width) // columns
    count = blocks.shape[-1] - (round(sparsity * now) - round(sparsity * done))
    if pattern == "unstructured":
        mask = _highest(blocks.flatten(-2), outputs * count).view(blocks.shape)
    else:
        mask = _highest(blocks, count)
    return mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
