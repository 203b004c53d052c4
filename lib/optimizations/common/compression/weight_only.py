"""Weight-only int8 and int4 as a yardstick: what everyone uses, at its bytes, without choosing anything.

Knows nothing of measuring, and nothing of the optimization that it is held against.
"""

from torch import nn

from lib.models.calibration.second_moments import matrices
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements.quantized import BITS, QuantizedExperts, QuantizedLinear, has_kernel
from lib.models.structure.sharing import sharing

NAMES = {8: "int8", 4: "int4, groups of 128"}  # what the arms are called
PURPOSE = "weight-only, round to nearest"


def weight_only(model: nn.Module, bits: int, part: str = "all") -> nn.Module:
    """Return a model whose decoder matrices of `part` (see `second_moments.matrices`) are stored in 8 or 4 bits.

    What is not quantized is shared with `model`. Raises UserError for a width that cannot be packed.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits; expected one of {BITS}")
    changed = sharing(model)
    names = {module: name for name, module in changed.named_modules()}
    for block in anatomy(model).blocks:
        for owner in {matrix.owner: None for matrix in matrices(changed, part, block.index)}:
            packed = QuantizedLinear(owner, bits) if isinstance(owner, nn.Linear) else QuantizedExperts(owner, bits)
            changed.set_submodule(names[owner], packed)
    return changed


def without_kernel(model: nn.Module, bits: int, part: str = "all") -> int:
    """Return how many matrices of `part` torch has no packed kernel for: they are restored for every product."""
    chosen = matrices(model, part)
    return sum(not has_kernel(matrix.weight.view(-1, *matrix.weight.shape[-2:])[0], bits) for matrix in chosen)
