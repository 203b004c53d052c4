"""GPTQ: quantize a matrix to int4, where later columns compensate the output error of rounding a column.

Frantar et al. 2023, without reordering columns: each group of inputs shares a scale and a zero point as in rounding to
nearest, so both take the same bytes and use the same kernel.

Shapes: E experts (1 for a single matrix), O outputs, I inputs, G groups.
"""

import torch

from lib.models.calibration.inverse_factor import inverse_factor
from lib.models.structure.replacements.quantized import (
    Packed,
    at_steps,
    grid,
    group_size,
    pack_steps,
    require_pairs,
    steps,
)

MOST_FACTORS = 2**26  # elements of inverse factors held in memory at a time


def packed(weight: torch.Tensor, gram: torch.Tensor, what: str = "a matrix") -> list[Packed]:
    """Return int4 (values, scales) for each matrix of `weight`, [O, I] or [E, O, I], using its inputs' Gram matrix.

    `gram` is Σ x·xᵀ, [I, I] or [E, I, I]; an expert that saw no token is rounded to nearest. Raises UserError for a
    width that int4 cannot pack, and where `inverse_factor` does, naming `what`.
    """
    stack_EOI, gram_EII = weight.view(-1, *weight.shape[-2:]), gram.view(-1, *gram.shape[-2:])
    require_pairs(stack_EOI.shape[-1])
    at_once = max(1, MOST_FACTORS // gram_EII[0].numel())
    every: list[Packed] = []
    for first in range(0, len(stack_EOI), at_once):  # the inverses of a large stack would not fit
        part = slice(first, first + at_once)
        every += [pack_steps(*rounded) for rounded in zip(*quantize(stack_EOI[part], gram_EII[part], what))]
    return every


@torch.no_grad()
def quantize(
    weight_EOI: torch.Tensor, gram_EII: torch.Tensor, what: str = "a matrix"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (steps 0 to 15 [E, O, I], scale [E, O, G], zero point [E, O, G]) by GPTQ."""
    weight, inputs = weight_EOI.float().clone(), weight_EOI.shape[-1]
    factor, group = inverse_factor(gram_EII, what=what), group_size(inputs)
    chosen, grids = torch.empty_like(weight), []
    for start in range(0, inputs, group):
        end = start + group
        part_EOB, upper_EBB = weight[..., start:end], factor[..., start:end, start:end]
        scale_EO, zero_EO = grid(part_EOB)
        errors = torch.empty_like(part_EOB)
        for j in range(group):
            column = part_EOB[..., j, None]
            step = steps(column, scale_EO, zero_EO)
            chosen[..., start + j, None] = step
            error = (column - at_steps(step, scale_EO, zero_EO)) / upper_EBB[..., j, j, None, None]
            errors[..., j, None] = error
            part_EOB[..., j:] -= error * upper_EBB[..., j, j:].unsqueeze(-2)
        weight[..., end:] -= errors @ factor[..., start:end, end:]
        grids.append((scale_EO, zero_EO))
    scale_EOG, zero_EOG = (torch.stack(parts, -1) for parts in zip(*grids))
    return chosen, scale_EOG, zero_EOG
