"""Cholesky factors of sums Σ x·xᵀ, which are positive definite but for rounding and for what a text never showed.

Products of one batch are float32: where a few directions carry nearly everything, or fewer tokens than inputs were
seen, variances of the others are zero but for that rounding, which may be negative. A ridge on the diagonal makes the
factor exist; where it is too small it grows. Knows nothing of what a factor is used for.

Shapes: E experts (1 for a single matrix), I inputs.
"""

import torch

from lib.errors import UserError

STEP = 10.0  # times the ridge, where it was too small
LEAST = 1e-12  # of the trace, where there was none


def ridge_of(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `damping` times the mean variance of each matrix, float64 [] or [E]; 1 where no input was ever active."""
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    return torch.where(mean > 0, damping * mean, 1.0)


def positive_root(gram: torch.Tensor, ridge: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (L, ridge) with L·Lᵀ = gram + ridge on the diagonal, both float64: [I, I] and [], or [E, I, I] and [E].

    gram: Σ x·xᵀ. ridge: the least to add; a matrix that is not positive definite with it takes STEP times as much, and
    so on up to its trace, which no negative variance that is rounding exceeds. Matrices of a stack do not share it.
    Raises UserError in the name of `what` where sums are not finite, or where that does not help.
    """
    stack = gram.to(torch.float64, copy=True).reshape(-1, *gram.shape[-2:])
    added_E = ridge.to(stack).expand(len(stack)).clone()
    diagonal_EI = stack.diagonal(dim1=-2, dim2=-1)
    trace_E = diagonal_EI.abs().sum(-1)
    _require(torch.isfinite(stack.sum((-2, -1))), what, "are not finite (NaN or infinite)")
    diagonal_EI += added_E[:, None]
    root, failed_E = torch.linalg.cholesky_ex(stack)
    while bool(failed_E.any()):
        again = failed_E.nonzero().flatten()
        within_E = (failed_E == 0) | (added_E < trace_E)
        _require(within_E, what, "have no factor, however strongly they are damped")
        more = torch.maximum(STEP * added_E[again], LEAST * trace_E[again])
        diagonal_EI[again] += (more - added_E[again])[:, None]
        added_E[again] = more
        root[again], failed_E[again] = torch.linalg.cholesky_ex(stack[again])
    return root.view(gram.shape), added_E.view(gram.shape[:-2])


def _require(fine_E: torch.Tensor, what: str, fault: str) -> None:
    if bool(fine_E.all()):
        return
    where = what if len(fine_E) == 1 else f"{what}, one of its experts"
    raise UserError(
        f"{where}: sums of its inputs on the calibration text {fault}; run in bfloat16 or float32, or give other text"
    )
