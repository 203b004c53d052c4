"""Sparsity budgets: the share of weights that each block loses, from the outliers among its scores.

Independent of which weights are dropped.
"""

from collections.abc import Iterator

import torch
from torch import nn

from lib.models.calibration.observed import Observed
from lib.models.calibration.second_moments import Matrix, Moments, matrices
from lib.optimizations.common.compression.budgets import OUTLIER, by_outliers
from lib.optimizations.sparse_neural_networks.masks import score


def owl(model: nn.Module, observed: Observed, sparsity: float) -> dict[int, float]:
    """Return block index → share of its weights to drop; over all weights the share is `sparsity`.

    Scores are |W|·rms(x) (Yin et al. 2024, OWL); an outlier is a score above OUTLIER times the mean over all matrices
    of its block. `observed` gives the squares of the inputs.
    """
    outliers, sizes = {}, {}
    for index, sums in observed:
        of_block = [matrix for matrix in matrices(model, observed.part, index) if matrix.name in sums]
        sizes[index] = float(sum(matrix.weight.numel() for matrix in of_block))
        outliers[index] = outlier_share(of_block, sums)
    return by_outliers(outliers, sizes, sparsity)


def outlier_share(of_block: list[Matrix], sums: dict[str, Moments]) -> float:
    """Return the share of a block's scores above OUTLIER times their mean; 0 without scores."""
    count = total = 0.0
    for scores in _scores(of_block, sums):
        count, total = count + scores.numel(), total + float(scores.sum(dtype=torch.float64))
    limit = OUTLIER * total / max(1.0, count)
    return sum(float((scores > limit).sum()) for scores in _scores(of_block, sums)) / max(1.0, count)


def _scores(of_block: list[Matrix], sums: dict[str, Moments]) -> Iterator[torch.Tensor]:
    """Yield the scores [O, I] of each matrix and each expert, except experts that no token reached.

    Squares are divided by tokens, because experts see different numbers of them.
    """
    for matrix in of_block:
        stack = matrix.weight.data.view(-1, *matrix.weight.shape[-2:])
        moments = sums[matrix.name]
        squares_EI, tokens_E = moments.squares.float().view(len(stack), -1), moments.tokens.expand(len(stack)).tolist()
        for weight, squares, tokens in zip(stack, squares_EI, tokens_E):
            if tokens:
                yield score(weight, "wanda", squares / tokens)
