"""Compensation: the matrix that reads removed channels or heads is refitted by ridge regression.

With X the inputs of the matrix W and X_K the kept ones, W·X·X_Kᵀ·(X_K·X_Kᵀ)⁻¹ comes nearest to the output W·X among all
matrices on X_K. With few tokens per input it fits the noise of the text, and on any other text is further from W·X than
the unchanged kept columns. So it is shrunk towards these, by an amount chosen on held-out text, and entirely if no fit
does better there. Closed form: needs only the Gram matrices of one block. Independent of how kept inputs are chosen.

Shapes: E experts (1 for a single matrix), O outputs, I inputs, J kept inputs.
"""

import torch

from lib.models.calibration.positive_root import positive_root
from lib.models.calibration.second_moments import Moments

DAMPING = 0.01  # minimum ridge as a share of the mean diagonal, as in SparseGPT
# Ridges to choose from, in tokens of white noise per input: with n tokens the ridge is r · I / n of the mean diagonal.
RIDGES = (0.0, 0.05, 0.25, 1.0)
JUDGED_ROWS = 256  # outputs on which a ridge is chosen: rows of a matrix are fitted independently


def fitted(
    weight_EOI: torch.Tensor, taught: Moments, held_out: Moments, kept_EJ: torch.Tensor, what: str = "a matrix"
) -> torch.Tensor:
    """Return matrices [E, O, J] on the kept inputs that replace `weight_EOI` on all inputs.

    Chooses from RIDGES, for all experts together, the ridge whose output is nearest on held-out text, then fits on all
    text. If none beats the unchanged kept columns, returns those. `taught` and `held_out`: Gram matrices [E, I, I] or
    [I, I]. Raises UserError naming `what`, as `positive_root` does.
    """
    inputs = weight_EOI.shape[-1]
    grams, held_out_grams = _grams(taught, inputs), _grams(held_out, inputs)
    tokens, held_out_tokens = taught.tokens.tolist(), held_out.tokens.tolist()
    judged_EPI = weight_EOI[:, :: max(1, weight_EOI.shape[1] // JUDGED_ROWS)]

    def held_out_error(ridge: float) -> float:
        experts = zip(judged_EPI, grams, tokens, held_out_grams, kept_EJ)
        return sum(
            _error(compensated(weight, gram, kept, _damping(ridge, inputs, count), what), weight, other, kept)
            for weight, gram, count, other, kept in experts
        )

    unchanged = sum(
        _error(weight[:, kept], weight, other, kept) for weight, other, kept in zip(judged_EPI, held_out_grams, kept_EJ)
    )
    errors = {ridge: held_out_error(ridge) for ridge in RIDGES}
    best = min(RIDGES, key=errors.__getitem__)
    if errors[best] >= unchanged:
        return torch.stack([weight[:, kept] for weight, kept in zip(weight_EOI, kept_EJ)])
    counts = [count + other_count for count, other_count in zip(tokens, held_out_tokens)]
    experts = zip(weight_EOI, grams, held_out_grams, counts, kept_EJ)
    return torch.stack(
        [
            compensated(weight, gram + other, kept, _damping(best, inputs, count), what)
            for weight, gram, other, count, kept in experts
        ]
    )


def compensated(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    kept_J: torch.Tensor,
    damping: float = DAMPING,
    what: str = "a matrix",
) -> torch.Tensor:
    """Return the matrix [O, J] on the kept inputs whose output is nearest to that of `weight_OI` on all inputs.

    `damping` is the ridge as a share of the mean diagonal. If the Gram matrix is zero (no calibration token), returns
    the unchanged kept columns. Raises UserError naming `what`, as `positive_root` does.
    """
    if not gram_II.any():
        return weight_OI[:, kept_J]
    gram = gram_II.double()
    root_JJ, ridge = positive_root(gram[kept_J][:, kept_J], damping * gram.diagonal().mean(), what)
    # Damped towards the unchanged kept columns, not towards zero.
    cross_OJ = weight_OI.double() @ gram[:, kept_J] + ridge * weight_OI.double()[:, kept_J]
    fitted_JO = torch.cholesky_solve(cross_OJ.T, root_JJ)
    return fitted_JO.T.to(weight_OI.dtype)


def _grams(moments: Moments, inputs: int) -> torch.Tensor:
    assert moments.gram is not None
    return moments.gram.view(-1, inputs, inputs)


def _damping(ridge: float, inputs: int, tokens: int) -> float:
    return max(DAMPING, ridge * inputs / max(1, tokens))


def _error(fitted_OJ: torch.Tensor, weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_J: torch.Tensor) -> float:
    """Return ‖W·X − Ŵ·X_K‖² for the inputs X of the Gram matrix."""
    lost_OI = weight_OI.double().clone()
    lost_OI[:, kept_J] -= fitted_OJ.double()
    return float(((lost_OI @ gram_II.double()) * lost_OI).sum())
