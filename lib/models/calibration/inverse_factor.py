"""What changing one input of a matrix does to the best values of the inputs after it, from the Gram matrix of its
inputs: the rows of a Cholesky factor, which SparseGPT and GPTQ both read.

Shapes: E experts (1 for a single matrix), I inputs.
"""

import torch

DAMPING = 0.01  # of the mean diagonal: Frantar & Alistarh 2023, section 4; Frantar et al. 2023 (GPTQ), section 3


def inverse_factor(gram_EII: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix Σ x·xᵀ, float32 [E, I, I].

    In float64: one input far larger than the others, or fewer tokens than inputs, leave a condition number near that of
    the damping, which the inverse of float32 does not survive. An expert that saw no token has H = 1.
    """
    damped = gram_EII.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    mean_E1 = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean_E1 > 0, damping * mean_E1, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
