"""Cholesky factors of sums Σ x·xᵀ, which are positive definite except for rounding and directions without data.

Products of one batch are float32. If a few directions carry nearly all variance, or there were fewer tokens than
inputs, the variance of the other directions is only rounding, which may be negative. A ridge on the diagonal makes the
factor exist, and grows if it is too small. Knows nothing of what a factor is used for.

Shapes: E experts (1 for a single matrix), I inputs.
"""

import torch

from lib.errors import UserError

STEP = 10.0  # by which a ridge that is too small is multiplied
LEAST = 1e-12  # of the trace, the smallest ridge that is tried after 0


def ridge_of(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `damping` times the mean diagonal of each matrix, float64 [] or [E]; 1 if all inputs were zero."""
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    return torch.where(mean > 0, damping * mean, 1.0)


def positive_root(gram: torch.Tensor, ridge: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (L, ridge) with L·Lᵀ = gram + ridge on the diagonal, both float64: [I, I] and [], or [E, I, I] and [E].

    gram: Σ x·xᵀ. ridge: the smallest value to add. For a matrix that is still not positive definite it is multiplied by
    STEP repeatedly, up to the trace, which bounds negative variances from rounding. Each matrix of a stack has its own
    ridge. Raises UserError naming `what` if sums are not finite or no ridge suffices.
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
