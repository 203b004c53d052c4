"""Replaces a model's matrices with factors. Independent of how ranks are allocated.

Shapes: E experts, R rank.
"""

from collections.abc import Iterable

from torch import nn

from lib.errors import UserError
from lib.models.structure.replacements import factored as factors
from lib.optimizations.tensor_decomposition.low_rank import Spectrum, factorise

SIDES = {"weight": "linear", "gate_up_proj": "input", "down_proj": "output"}  # by the attribute of the module
FIRST_SEQUENCES = 2  # sequences of the first calibration batch on which the worth of each matrix is measured


def install(model: nn.Module, spectra: Iterable[Spectrum], ranks: dict[str, int | None]) -> None:
    """Put factors of the given ranks into `model`, in place; a matrix of rank None or not named stays dense.

    Raises UserError if a name in `ranks` has no spectrum.
    """
    names = set()
    for spectrum in spectra:
        names.add(spectrum.matrix.name)
        rank, matrix = ranks.get(spectrum.matrix.name), spectrum.matrix
        if rank is None:
            continue
        outer, inner = factorise(spectrum, rank)
        if matrix.side == "linear":
            factors.factor_linear(model, matrix.module, outer, inner)
            continue
        count = model.get_submodule(matrix.module).num_experts
        if matrix.side == "input":
            factors.factor_experts(model, matrix.module, gate_up=(outer.unflatten(0, (count, -1)), inner))
        else:
            factors.factor_experts(model, matrix.module, down=(outer, inner.unflatten(1, (count, -1)).transpose(0, 1)))
    if unknown := sorted(set(ranks) - names):
        raise UserError(f"tensor_decomposition: no matrix {unknown[0]} in this model; there is {sorted(names)[0]}, …")
