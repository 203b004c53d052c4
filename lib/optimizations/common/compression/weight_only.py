"""Weight-only int8 and int4, rounded to nearest or by GPTQ: the usual alternative, used as a yardstick."""

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

NAMES = {8: "int8", 4: "int4, groups of 128"}  # names of the arms
PURPOSE = "weight-only, round to nearest"
BY_GPTQ, GPTQ_PURPOSE = "int4, GPTQ", "weight-only, errors compensated"


def weight_only(
    model: nn.Module,
    bits: int,
    part: str = "all",
    calibration: Sequence[dict[str, torch.Tensor]] | None = None,
) -> nn.Module:
    """Return a model whose decoder matrices of `part` (see `second_moments.matrices`) are stored in 8 or 4 bits.

    With calibration text int4 uses GPTQ, block by block on the outputs of the quantized blocks before; without it every
    weight is rounded to nearest. The expansion matrix of absorbed latent attention stays dense: engines restore it
    once, whereas here it would be restored for every token. Modules not quantized are shared with `model`. Raises
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
    """Return the module in 8 or 4 bits, by GPTQ if there are moments of its matrices."""
    chosen: dict[str, list[Packed]] = {}
    for matrix in members if moments else ():
        gram = moments[matrix.name].gram
        assert gram is not None
        chosen[matrix.attribute] = gptq.packed(matrix.weight.data, gram, matrix.place)
    if isinstance(owner, nn.Linear):
        return QuantizedLinear(owner, bits, chosen["weight"][0] if chosen else None)
    return QuantizedExperts(owner, bits, chosen or None)


def without_kernel(model: nn.Module, bits: int, part: str = "all") -> int:
    """Return the number of matrices of `part` without a packed kernel in torch: they are restored for every product."""
    return _kernels(model, bits, part).count(False)


def rounds_few_tokens(model: nn.Module, part: str = "all") -> bool:
    """Return whether int8 is less exact for few tokens than for many: its kernel multiplies few tokens in bfloat16, and
    many tokens use the restored matrix in the model's own dtype.
    """
    return next(model.parameters()).dtype != SCALES and any(_kernels(model, 8, part))


def _kernels(model: nn.Module, bits: int, part: str) -> list[bool]:
    """Return for each quantized matrix whether torch has a packed kernel for it."""
    dense = _expansions(model)
    chosen = [matrix.weight for matrix in matrices(model, part) if matrix.owner not in dense]
    return [has_kernel(weight.view(-1, *weight.shape[-2:])[0], bits) for weight in chosen]


def other_groups(model: nn.Module, part: str = "all") -> str:
    """Return in words the group sizes of int4 for matrices whose width is not a multiple of 128; empty if there are
    none.
    """
    dense, counted = _expansions(model), Counter[int]()
    for matrix in matrices(model, part):
        group = group_size(matrix.weight.shape[-1])
        if matrix.owner not in dense and group != GROUPS[0]:
            counted[group] += 1
    each = ", ".join(f"{group} in {count}" for group, count in sorted(counted.items(), reverse=True))
    return f"{GROUPS[0]} does not divide the width of {counted.total()} matrices: groups of {each}" if counted else ""


def left_dense(model: nn.Module, part: str = "all") -> int:
    """Return the number of matrices of `part` that stay dense as expansion matrices of absorbed latent attention."""
    dense = _expansions(model)
    return sum(matrix.owner in dense for matrix in matrices(model, part))


def _expansions(model: nn.Module) -> set[nn.Module]:
    """Return the expansion modules of all latent attentions in `model` that decode absorbed, including the factors of a
    factored one.
    """
    attentions = [block.attention for block in anatomy(model).blocks if block.attention.kind == "latent"]
    absorbed = [each.module for each in attentions if mla_absorption.decodes_absorbed(each.module)]
    return {part for module in absorbed for part in module.kv_b_proj.modules()}
