"""Tensor decomposition: each matrix of the decoder is replaced by two thin factors, which are executed as such.

- plain: the best low-rank matrix (truncated SVD).
- whitened: the best low-rank matrix on calibration inputs X. With S the Cholesky factor of X·Xᵀ, the SVD of W·S is
  truncated and S⁻¹ applied (SVD-LLM, Wang et al. 2024). If W has fewer rows than columns, the same matrix is U·Uᵀ·W
  with U the leading eigenvectors of W·X·Xᵀ·Wᵀ, which needs no inverse.
- refitted: whitened; then, block by block, the outer factors of linear layers are refitted in closed form by least
  squares to the original block's output, with inputs from the compressed blocks before it.
- refined: whitened; then the factors of each block are trained for a few steps towards the same target (AA-SVD).
- experts: Tucker along the hidden dimension (HOSVD): the stack [E, 2I, H] gets one shared input factor, the stack
  [E, H, I] one shared output factor, each with a core per expert; whitened by the experts' own tokens.
- random: a random subspace of the same rank. A control, and the method for random weights: it gives the shapes of the
  other methods at no cost.

Ranks share one budget of bytes over all matrices. They are allocated greedily, in multiples of 8, by the energy ‖W·S‖²
kept per element, weighted by the cost of losing the matrix (`analysis`). Plain factors use no data: their energy is the
share of each matrix's own ‖W‖². A matrix stays dense if factors would be no smaller than m·n, or if the budget is
better spent on keeping it whole. Independent of measurement; `apply` never changes the caller's model.

Shapes: a matrix is m × n (outputs × inputs), R rank; E experts, H hidden, I width of one expert.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lib.models.calibration import blockwise
from lib.models.structure.sharing import sharing
from lib.optimizations.common.compression import options as checks
from lib.optimizations.tensor_decomposition.allocation import allocate, room_for
from lib.optimizations.tensor_decomposition.analysis import Spectra, matrices
from lib.optimizations.tensor_decomposition.installing import install
from lib.optimizations.tensor_decomposition.low_rank import Spectrum

NAME = "tensor_decomposition"
METHODS = ("plain", "whitened", "refitted", "refined", "random")
BUDGETS = ("global", "uniform")

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "compression": {
        "type": "float",
        "range": (0.0, 1.0),
        "default": 0.2,
        "help": "share of the decoder's bytes removed",
    },
    "method": {"type": "categorical", "choices": METHODS, "default": "refined"},
    "budget": {"type": "categorical", "choices": BUDGETS, "default": "global"},
    "refine_steps": {"type": "int", "range": (0, 1000), "default": 20, "help": "of Adam per block, method refined"},
}

COMPOSES = {
    "touches": ("weights", "storage"),
    "needs": ("whole matrices",),
    "invalidates": ("whole matrices", "whole channels", "statistics"),
    "mildest": {"compression": 0.0},
    "trial": {"method": "whitened", "budget": "uniform"},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None if the method applies, else the reason: the decoder has no dense matrix left."""
    return None if matrices(model) else "every matrix of the decoder is stored sparse or factored already"


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    compression: float = 0.2,
    method: str = "refined",
    budget: str = "global",
    refine_steps: int = 20,
    learning_rate: float = 1e-3,
    spectra: Iterable[Spectrum] | None = None,
    ranks: dict[str, int | None] | None = None,
    errors: list[tuple[float, float]] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a model with factors in place of matrices and about `compression` of the decoder's bytes removed.

    spectra: the result of `analyse(model, calibration, method)`, to compress several times from one pass. ranks: matrix
    name → rank (None: dense), instead of a budget. errors: list to which the block errors of "refitted" or "refined"
    are appended, as `blockwise` returns them. Raises UserError for a value out of range or out of reach, and if there
    is no matrix to factor. Warns if damping has to make up for missing calibration tokens. Weights that are not
    factored are shared with `model`: train neither in place.
    """
    checks.in_range(NAME, "compression", compression, 0, 1, closed="neither")
    checks.choices(NAME, {"method": (method, METHODS), "budget": (budget, BUDGETS)})
    checks.changeable(model)
    if spectra is None:
        spectra = analyse(model, calibration, method, budget, seed)
        if ranks is None:
            room_for(model, spectra.require_matrices(), compression)
    chosen = allocate(model, curves(spectra), compression, budget) if ranks is None else ranks
    compressed = sharing(model)
    install(compressed, spectra, chosen)
    taught: list[tuple[float, float]] = []
    if method == "refined" and refine_steps:
        taught = blockwise.refine(compressed, model, calibration, steps=refine_steps, learning_rate=learning_rate)
    if method == "refitted":
        taught = blockwise.refit(compressed, model, calibration)
    if errors is not None:
        errors += taught
    return compressed


def analyse(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    method: str = "whitened",
    budget: str = "global",
    seed: int = 0,
    weighed_blocks: int | None = None,
) -> Spectra:
    """Return the spectra of the decoder's matrices: of W for "plain", flat ones for "random", otherwise of W·S.

    A "uniform" budget compares no matrices, so every worth is 1. For "global" the worth is measured in at most
    `weighed_blocks` blocks (None: the default of `Spectra`). Lazy: the text is read when the spectra are. Raises
    NotApplicable at once if there is no matrix to factor.
    """
    spectra = Spectra(model, calibration, method, budget != "uniform", seed, weighed_blocks=weighed_blocks)
    spectra.require_matrices()
    return spectra


def curves(spectra: Iterable[Spectrum]) -> list[Spectrum]:
    """Return the energy that each rank of each matrix keeps, and the worth of each matrix."""
    return spectra.curves() if isinstance(spectra, Spectra) else list(spectra)


def predicted_divergence(spectra: Iterable[Spectrum], ranks: dict[str, int | None]) -> float:
    """Return the divergence, in nats per token, expected from truncating to `ranks` if errors were additive."""
    chosen = ((spectrum, ranks.get(spectrum.matrix.name)) for spectrum in curves(spectra))
    return sum(spectrum.worth * (1 - float(spectrum.kept_R[rank - 1])) for spectrum, rank in chosen if rank is not None)
