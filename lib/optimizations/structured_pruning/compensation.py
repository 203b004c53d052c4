"""Compensation: the matrix that reads removed channels or heads is refitted by ridge regression.

With X what enters the matrix W and K what is kept of it, W·X·X_Kᵀ·(X_K·X_Kᵀ)⁻¹ is nearest to the output W·X among all
matrices on X_K. With few tokens per input it follows the noise of the text, and is further from W·X on any other text
than the kept columns as they are. So it is shrunk towards those, as far as held-out text asks for, and all the way
where no fit does better there. Closed form: Gram matrices of one block are all it needs. Knows nothing of what is kept.

Shapes: E experts (1 for a single matrix), O outputs, I inputs, J kept inputs.
"""

import torch

from lib.models.calibration.positive_root import positive_root
from lib.models.calibration.second_moments import Moments

DAMPING = 0.01  # of the mean diagonal at least, as in SparseGPT
# Of the ridge, in tokens of white noise per input: with n tokens it is RIDGES · I / n of the mean diagonal.
RIDGES = (0.0, 0.05, 0.25, 1.0)
JUDGED_ROWS = 256  # outputs that a ridge is chosen on: rows of a matrix are fitted independently


def fitted(
    weight_EOI: torch.Tensor, taught: Moments, held_out: Moments, kept_EJ: torch.Tensor, what: str = "a matrix"
) -> torch.Tensor:
    """Return the matrices [E, O, J] on the kept inputs that stand in for `weight_EOI` on all of them.

    Of RIDGES the one whose output is nearest on held-out text, for all experts together, fitted on all of the text; the
    kept columns as they are where none is nearer. `taught` and `held_out`: Gram matrices [E, I, I] or [I, I]. Raises
    UserError in the name of `what` as `positive_root` does.
    """
    inputs = weight_EOI.shape[-1]
    grams, others = _grams(taught, inputs), _grams(held_out, inputs)
    tokens, more = taught.tokens.tolist(), held_out.tokens.tolist()
    few_EPI = weight_EOI[:, :: max(1, weight_EOI.shape[1] // JUDGED_ROWS)]

    def lost(ridge: float) -> float:
        each = zip(few_EPI, grams, tokens, others, kept_EJ)
        return sum(
            _error(compensated(weight, gram, kept, _damping(ridge, inputs, count), what), weight, other, kept)
            for weight, gram, count, other, kept in each
        )

    as_they_are = sum(
        _error(weight[:, kept], weight, other, kept) for weight, other, kept in zip(few_EPI, others, kept_EJ)
    )
    errors = {ridge: lost(ridge) for ridge in RIDGES}
    best = min(RIDGES, key=errors.__getitem__)
    if errors[best] >= as_they_are:
        return torch.stack([weight[:, kept] for weight, kept in zip(weight_EOI, kept_EJ)])
    counts = [count + more_count for count, more_count in zip(tokens, more)]
    every = zip(weight_EOI, grams, others, counts, kept_EJ)
    return torch.stack(
        [
            compensated(weight, gram + other, kept, _damping(best, inputs, count), what)
            for weight, gram, other, count, kept in every
        ]
    )


def compensated(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    kept_J: torch.Tensor,
    damping: float = DAMPING,
    what: str = "a matrix",
) -> torch.Tensor:
    """Return the matrix [O, J] on the kept inputs whose output is nearest to that of `weight_OI` on all of them.

    `damping` is the ridge as a share of the mean diagonal. Where calibration showed nothing (a Gram matrix of zeros) it
    is the kept columns as they are. Raises UserError in the name of `what` as `positive_root` does.
    """
    if not gram_II.any():
        return weight_OI[:, kept_J]
    gram = gram_II.double()
    root_JJ, ridge = positive_root(gram[kept_J][:, kept_J], damping * gram.diagonal().mean(), what)
    # Damped towards the kept columns as they are, not towards zero.
    cross_OJ = weight_OI.double() @ gram[:, kept_J] + ridge * weight_OI.double()[:, kept_J]
    fitted_JO = torch.cholesky_solve(cross_OJ.T, root_JJ)
    return fitted_JO.T.to(weight_OI.dtype)


def _grams(moments: Moments, inputs: int) -> torch.Tensor:
    assert moments.gram is not None
    return moments.gram.view(-1, inputs, inputs)


def _damping(ridge: float, inputs: int, tokens: int) -> float:
    return max(DAMPING, ridge * inputs / max(1, tokens))


def _error(fitted_OJ: torch.Tensor, weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_J: torch.Tensor) -> float:
    """Return ‖W·X − Ŵ·X_K‖² on the text behind a Gram matrix."""
    lost_OI = weight_OI.double().clone()
    lost_OI[:, kept_J] -= fitted_OJ.double()
    return float(((lost_OI @ gram_II.double()) * lost_OI).sum())
