"""The Cholesky factor of an inverse Gram matrix, from which SparseGPT and GPTQ read how the weights of later inputs
compensate best for a change in the weights of one input.

Shapes: E experts (1 for a single matrix), I inputs.
"""

import torch

from lib.models.calibration.positive_root import positive_root, ridge_of

DAMPING = 0.01  # of the mean diagonal: Frantar & Alistarh 2023, section 4; Frantar et al. 2023 (GPTQ), section 3


def inverse_factor(gram_EII: torch.Tensor, damping: float = DAMPING, what: str = "a matrix") -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix Σ x·xᵀ, float32 [E, I, I].

    Computed in float64: if one input is far larger than the others, or with fewer tokens than inputs, only the damping
    bounds the condition number, which is too large for an inverse in float32. For an expert without tokens the damped
    matrix is the identity; sums that are not positive definite are damped more. Raises UserError naming `what`, as
    `positive_root` does.
    """
    root_EII, _ = positive_root(gram_EII, ridge_of(gram_EII, damping), what)
    return torch.linalg.cholesky(torch.cholesky_inverse(root_EII), upper=True).float()
