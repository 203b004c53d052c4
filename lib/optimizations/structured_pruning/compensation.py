"""Compensation: the matrix that reads removed channels or heads is refitted by least squares.

With X what enters the matrix W and K what is kept of it, W·X·X_Kᵀ·(X_K·X_Kᵀ)⁻¹ is nearest to the output W·X among all
matrices on X_K. Closed form: the Gram matrix of one block is all it needs. Knows nothing of what is kept.

Shapes: O outputs, I inputs, J kept inputs.
"""

import torch

DAMPING = 0.01  # of the mean diagonal, as in SparseGPT


def compensated(weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_J: torch.Tensor) -> torch.Tensor:
    """Return the matrix [O, J] on the kept inputs whose output is nearest to that of `weight_OI` on all of them.

    Where calibration showed nothing (a Gram matrix of zeros) it is the kept columns as they are.
    """
    if not gram_II.any():
        return weight_OI[:, kept_J]
    gram = gram_II.double()
    own_JJ = gram[kept_J][:, kept_J].clone()
    damping = DAMPING * gram.diagonal().mean()
    own_JJ.diagonal().add_(damping)
    # Damped towards the kept columns as they are, not towards zero.
    cross_OJ = weight_OI.double() @ gram[:, kept_J] + damping * weight_OI.double()[:, kept_J]
    fitted_JO = torch.cholesky_solve(cross_OJ.T, torch.linalg.cholesky(own_JJ))
    return fitted_JO.T.to(weight_OI.dtype)
