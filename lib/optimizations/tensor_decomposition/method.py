"""Tensor decomposition: the decoder's matrices are replaced by two thin factors each, which are really executed.

- plain: the best low-rank matrix (truncated SVD).
- whitened: the best low-rank matrix on calibration inputs X. With S the Cholesky factor of X·Xᵀ, the SVD of W·S is cut
  and S⁻¹ applied (SVD-LLM, Wang et al. 2024). Where W has fewer rows than columns the same matrix is U·Uᵀ·W, U the
  leading eigenvectors of W·X·Xᵀ·Wᵀ, which needs no inverse.
- refined: whitened, then the factors of each block are trained for a few steps: its inputs come from the compressed
  blocks before it, its target is the original block's output (AA-SVD).
- experts: Tucker along the hidden dimension (HOSVD): the stack [E, 2I, H] gets one shared input factor, the stack
  [E, H, I] one shared output factor, each with a core per expert; whitened by the experts' own tokens.
- random: a random subspace of the same rank, as a control, and where weights are random themselves: the shapes of any
  other method at no cost.

Ranks come from one budget of bytes over all matrices: greedily by the energy ‖W·S‖² kept per element, in multiples of
8. Energies of different matrices are compared by what losing them costs: the divergence in nats that is measured
when this matrix alone is cut to half its break-even rank. (The Fisher information of the output would need one backward
pass only, but it is the curvature at an error of zero, and cuts are not small; the divergence itself is measured at an
error of that size.) Plain factors use no data: there it is the share of each matrix's own ‖W‖². A matrix
stays dense where factors would not be smaller than m·n, and where the budget is better spent on it whole. Knows nothing
of measuring; `apply` never changes the caller's model.

Shapes: a matrix is m × n (outputs × inputs), R rank; E experts, H hidden, I width of one expert.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.calibration import activations, blockwise, second_moments
from lib.models.offload import expert_cache
from lib.models.structure import factored as factors
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common import options as checks
from lib.optimizations.tensor_decomposition.allocation import allocate, options
from lib.optimizations.tensor_decomposition.low_rank import (
    FactorableMatrix,
    Spectrum,
    factorise,
    random_spectrum,
    spectrum_of,
)

NAME = "tensor_decomposition"
METHODS = ("plain", "whitened", "refined", "random")
BUDGETS = ("global", "uniform")
SIDES = {"weight": "linear", "gate_up_proj": "input", "down_proj": "output"}  # by the attribute of the module
WEIGHED_SEQUENCES = 2  # of the first calibration batch, to measure what each matrix is worth

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
    "trial": {"method": "whitened", "budget": "uniform"},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None, or that no matrix of the decoder is left in one dense piece."""
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
    spectra: Sequence[Spectrum] | None = None,
    ranks: dict[str, int | None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a model with about `compression` of the decoder's bytes less, factors in the place of matrices.

    spectra: what `analyse(model, calibration, method)` returned, to compress several times from one pass. ranks: of
    matrices by name (None: dense), in place of a budget. Raises UserError for a value out of range or out of reach,
    for too few calibration tokens, and where there is no matrix to factor. Embeddings and head are those of `model`,
    not copies: train neither in place.
    """
    checks.in_range(NAME, "compression", compression, 0, 1, closed="neither")
    checks.one_of(NAME, "method", method, METHODS)
    checks.one_of(NAME, "budget", budget, BUDGETS)
    expert_cache.require_changeable(model)
    spectra = analyse(model, calibration, method, budget, seed) if spectra is None else spectra
    chosen = allocate(model, spectra, compression, budget) if ranks is None else ranks
    compressed = copy.deepcopy(model, _shared(model, spectra, chosen))
    install(compressed, spectra, chosen)
    if method == "refined" and refine_steps:
        blockwise.refine(compressed, model, calibration, steps=refine_steps, learning_rate=learning_rate)
    return compressed


def _shared(model: nn.Module, spectra: Sequence[Spectrum], ranks: dict[str, int | None]) -> dict[int, torch.Tensor]:
    """Return the tensors that a copy need not hold anew: embeddings, head, and what factors will take the place of."""
    view = anatomy(model)
    tensors = [view.embeddings.weight, view.head.weight]
    attribute = {side: name for name, side in SIDES.items()}
    for matrix in (spectrum.matrix for spectrum in spectra if ranks.get(spectrum.matrix.name) is not None):
        tensors.append(getattr(model.get_submodule(matrix.module), attribute[matrix.side]))
    return {id(tensor): tensor for tensor in tensors}


# --- what can be factored --------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> list[FactorableMatrix]:
    """Return every dense matrix of the decoder's blocks; routers, norms, embeddings, head and vision stay dense."""
    return [_unfolded(matrix) for matrix in second_moments.matrices(model, inside_factors=False)]


def _unfolded(matrix: second_moments.Matrix) -> FactorableMatrix:
    """Return a matrix as it is factored: a stack of experts is unfolded along the hidden dimension."""
    weight: torch.Tensor = matrix.weight
    side = SIDES[matrix.attribute]
    if side == "input":
        weight = weight.flatten(0, 1)
    elif side == "output":
        weight = weight.transpose(0, 1).flatten(1)
    return FactorableMatrix(matrix.module_name, side, matrix.block, weight)


# --- what each rank keeps --------------------------------------------------------------------------------------------


def analyse(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    method: str = "whitened",
    budget: str = "global",
    seed: int = 0,
) -> list[Spectrum]:
    """Return the spectrum of every matrix of the decoder: of W for "plain", of W·S from `calibration` for "whitened".

    For "random" it is the flat one that a random subspace has on average. A "uniform" budget sets no matrix against
    another, so none is weighed for it: every worth is 1.
    """
    factorable = matrices(model)
    if not factorable:
        raise NotApplicable(f"no matrix to compress: {applies_to(model)}")
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [random_spectrum(matrix, generator) for matrix in factorable]
    if method == "plain":
        return [spectrum_of(matrix) for matrix in factorable]
    tokens = activations.count(calibration)
    for matrix in factorable:
        if matrix.side == "linear" and tokens:  # all tokens reach it, so too few are known before the pass
            _require(matrix, tokens)
    grams = _grams(model, calibration)
    for matrix in factorable:
        if matrix.side != "output":  # whose factors need no inverse of the covariance
            _require(matrix, int(grams[matrix.name].tokens))
    spectra = [spectrum_of(matrix, grams[matrix.name].gram) for matrix in factorable]
    return spectra if budget == "uniform" else weigh(model, spectra, calibration[0])


@torch.no_grad()
def weigh(model: nn.Module, spectra: Sequence[Spectrum], inputs: dict[str, torch.Tensor]) -> list[Spectrum]:
    """Return `spectra` with the worth of each: divergence, when it alone is cut, over the share of energy it then lost.

    Text is cut to a few sequences. For each matrix the model runs from its block on, as a copy that shares its tensors.
    """
    if set(inputs) <= {"input_ids", "attention_mask"}:
        inputs = {name: tensor[:WEIGHED_SEQUENCES] for name, tensor in inputs.items()}
    trial = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    (stream,) = blockwise.streams(model, [inputs], in_float32=False)

    def answers(changed: nn.Module, block: int) -> torch.Tensor:
        return blockwise.rest(changed, stream, block)[stream.mask_BT].float().log_softmax(-1)

    expected, weighed = answers(model, len(anatomy(model).blocks)), []
    for spectrum in spectra:
        factored = [rank for rank, _, _ in options(spectrum) if rank is not None]
        if not factored:
            weighed.append(spectrum)
            continue
        rank = min(factored, key=lambda rank: abs(rank - spectrum.matrix.break_even / 2))
        owner, _, leaf = spectrum.matrix.module.rpartition(".")
        whole = trial.get_submodule(spectrum.matrix.module)
        install(trial, [spectrum], {spectrum.matrix.name: rank})
        logits = answers(trial, spectrum.matrix.block)
        setattr(trial.get_submodule(owner), leaf, whole)
        lost = nn.functional.kl_div(logits, expected, reduction="sum", log_target=True) / len(expected)
        share = max(1 - float(spectrum.kept_R[rank - 1]), 1e-9)
        weighed.append(replace(spectrum, worth=max(float(lost), 0.0) / share))
    return weighed


def _grams(model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]]) -> dict[str, second_moments.Moments]:
    """Return the moments of what enters each matrix, by its name; experts' tokens count by their router weights."""
    observed = second_moments.matrices(model, inside_factors=False)
    moments = second_moments.moments(model, calibration, observed, gram=True, dtype=torch.float64, weighting="router")
    return {_unfolded(matrix).name: moments[matrix.name] for matrix in observed}


def _require(matrix: FactorableMatrix, tokens: int) -> None:
    columns = matrix.weight.shape[1]
    if tokens < columns:
        raise UserError(
            f"tensor_decomposition: {matrix.name}: {tokens} calibration tokens reach its {columns} inputs; "
            f"their covariance is singular. Give at least {columns}, or choose method plain"
        )


def predicted_divergence(spectra: Sequence[Spectrum], ranks: dict[str, int | None]) -> float:
    """Return the nats per token that cutting to these ranks should cost, were errors additive."""
    chosen = ((spectrum, ranks.get(spectrum.matrix.name)) for spectrum in spectra)
    return sum(spectrum.worth * (1 - float(spectrum.kept_R[rank - 1])) for spectrum, rank in chosen if rank is not None)


def install(model: nn.Module, spectra: Sequence[Spectrum], ranks: dict[str, int | None]) -> None:
    """Put factors of the given ranks into `model`, in place; what is None or not named stays dense."""
    names = {spectrum.matrix.name for spectrum in spectra}
    if unknown := sorted(set(ranks) - names):
        raise UserError(f"tensor_decomposition: no matrix {unknown[0]} in this model; there is {sorted(names)[0]}, …")
    for spectrum in spectra:
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
