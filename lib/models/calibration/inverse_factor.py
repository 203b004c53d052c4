"""What changing one input of a matrix does to the best values of the inputs after it, from the Gram matrix of its
inputs: the rows of a Cholesky factor, which SparseGPT and GPTQ both read.

Shapes: E experts (1 for a single matrix), I inputs.
"""

import torch

from lib.models.calibration.positive_root import positive_root, ridge_of

DAMPING = 0.01  # of the mean diagonal: Frantar & Alistarh 2023, section 4; Frantar et al. 2023 (GPTQ), section 3


def inverse_factor(gram_EII: torch.Tensor, damping: float = DAMPING, what: str = "a matrix") -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix Σ x·xᵀ, float32 [E, I, I].

    In float64: one input far larger than the others, or fewer tokens than inputs, leave a condition number near that of
    the damping, which the inverse of float32 does not survive. An expert that saw no token has H = 1; one whose sums
    are not positive definite is damped more. Raises UserError in the name of `what` as `positive_root` does.
    """
    root_EII, _ = positive_root(gram_EII, ridge_of(gram_EII, damping), what)
    return torch.linalg.cholesky(torch.cholesky_inverse(root_EII), upper=True).float()
