"""Weight-only int8 and int4 as a yardstick of the usual alternative, rounded to nearest or by GPTQ.

Knows nothing of measuring, nor of the optimization that it is compared with.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lib.models.calibration.second_moments import Matrix, Moments, block_moments, matrices
from lib.models.calibration.walk import Walk
from lib.models.decoding import mla_absorption
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements.quantized import (
    BITS,
    GROUPS,
    SCALES,
    Packed,
    QuantizedExperts,
    QuantizedLinear,
    group_size,
    has_kernel,
)
from lib.models.structure.sharing import sharing
from lib.optimizations.common.compression import gptq

NAMES = {8: "int8", 4: "int4, groups of 128"}  # what the arms are called
PURPOSE = "weight-only, round to nearest"
BY_GPTQ, GPTQ_PURPOSE = "int4, GPTQ", "weight-only, errors compensated"


def weight_only(
    model: nn.Module,
    bits: int,
    part: str = "all",
    calibration: Sequence[dict[str, torch.Tensor]] | None = None,
) -> nn.Module:
    """Return a model whose decoder matrices of `part` (see `second_moments.matrices`) are stored in 8 or 4 bits.

    With calibration text int4 is chosen by GPTQ, block by block on the outputs of the quantized blocks before; without
    it every weight is rounded to nearest. The matrix by which absorbed latent attention expands stays dense: engines
    restore it once, and here it would be restored for each token. What is not quantized is shared with `model`. Raises
    UserError for a width that cannot be packed.
    """
    if bits not in BITS or (calibration is not None and bits != 4):
        raise ValueError(f"{bits} bits; expected one of {BITS}, and 4 for GPTQ")
    changed = sharing(model)
    names = {module: name for name, module in changed.named_modules()}
    dense = _expansions(changed)
    walk = None if calibration is None else Walk(changed, calibration)
    for block in walk or anatomy(changed).blocks:
        of_block = [matrix for matrix in matrices(changed, part, block.index) if matrix.owner not in dense]
        moments = {} if walk is None else block_moments(walk, of_block, gram=True, unchanged=False)
        by_owner: dict[nn.Module, list[Matrix]] = {}
        for matrix in of_block:
            by_owner.setdefault(matrix.owner, []).append(matrix)
        for owner, members in by_owner.items():
            changed.set_submodule(names[owner], _quantized(owner, bits, members, moments))
    return changed


def _quantized(owner: nn.Module, bits: int, members: Sequence[Matrix], moments: dict[str, Moments]) -> nn.Module:
    """Return the module in 8 or 4 bits; by GPTQ where there are moments of its matrices."""
    chosen: dict[str, list[Packed]] = {}
    for matrix in members if moments else ():
        gram = moments[matrix.name].gram
        assert gram is not None
        chosen[matrix.attribute] = gptq.packed(matrix.weight.data, gram, matrix.place)
    if isinstance(owner, nn.Linear):
        return QuantizedLinear(owner, bits, chosen["weight"][0] if chosen else None)
    return QuantizedExperts(owner, bits, chosen or None)


def without_kernel(model: nn.Module, bits: int, part: str = "all") -> int:
    """Return how many matrices of `part` torch has no packed kernel for: they are restored for every product."""
    return _kernels(model, bits, part).count(False)


def rounds_few_tokens(model: nn.Module, part: str = "all") -> bool:
    """Return whether int8 multiplies few tokens less exactly than many: its kernel does in bfloat16 what a model of
    another dtype does by the restored matrix.
    """
    return next(model.parameters()).dtype != SCALES and any(_kernels(model, 8, part))


def _kernels(model: nn.Module, bits: int, part: str) -> list[bool]:
    """Return of each matrix that is quantized whether torch has a packed kernel for it."""
    dense = _expansions(model)
    chosen = [matrix.weight for matrix in matrices(model, part) if matrix.owner not in dense]
    return [has_kernel(weight.view(-1, *weight.shape[-2:])[0], bits) for weight in chosen]


def other_groups(model: nn.Module, part: str = "all") -> str:
    """Return in words in which groups int4 takes the inputs of matrices whose width 128 does not divide; empty where
    there is none.
    """
    dense, counted = _expansions(model), Counter[int]()
    for matrix in matrices(model, part):
        group = group_size(matrix.weight.shape[-1])
        if matrix.owner not in dense and group != GROUPS[0]:
            counted[group] += 1
    each = ", ".join(f"{group} in {count}" for group, count in sorted(counted.items(), reverse=True))
    return f"{GROUPS[0]} does not divide the width of {counted.total()} matrices: groups of {each}" if counted else ""


def left_dense(model: nn.Module, part: str = "all") -> int:
    """Return how many matrices of `part` stay dense, since absorbed latent attention expands by them."""
    dense = _expansions(model)
    return sum(matrix.owner in dense for matrix in matrices(model, part))


def _expansions(model: nn.Module) -> set[nn.Module]:
    """Return the modules by which the latent attentions of `model` expand that decode absorbed; of a factored one its
    factors too.
    """
    attentions = [block.attention for block in anatomy(model).blocks if block.attention.kind == "latent"]
    absorbed = [each.module for each in attentions if mla_absorption.decodes_absorbed(each.module)]
    return {part for module in absorbed for part in module.kv_b_proj.modules()}
