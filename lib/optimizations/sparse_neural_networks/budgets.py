"""The share of weights that each block loses, by the outliers among the scores of its weights.

Knows nothing of which weights go.
"""

from torch import nn

from lib.models.calibration.observed import Observed
from lib.models.calibration.second_moments import matrices
from lib.optimizations.common.compression.budgets import OUTLIER, by_outliers
from lib.optimizations.sparse_neural_networks.masks import score


def owl(model: nn.Module, observed: Observed, sparsity: float) -> dict[int, float]:
    """Return the share of weights that each block loses, by index; over all weights it is `sparsity`.

    Scores are |W|·‖x‖₂ (Yin et al. 2024, OWL); `observed` gives the squares of the inputs.
    """
    outliers, sizes = {}, {}
    for index, sums in observed:
        total = above = 0.0
        for matrix in (m for m in matrices(model, observed.part, index) if m.name in sums):
            stack = matrix.weight.data.view(-1, *matrix.weight.shape[-2:])
            squares = sums[matrix.name].squares.float().view(len(stack), -1)
            for weight, square in zip(stack, squares):
                scores = score(weight, "wanda", square)
                above += float((scores > OUTLIER * scores.mean()).sum())
                total += scores.numel()
        outliers[index], sizes[index] = above / max(1.0, total), total
    return by_outliers(outliers, sizes, sparsity)
