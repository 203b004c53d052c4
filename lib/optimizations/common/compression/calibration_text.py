"""How much calibration text a model needs: as many tokens as its statistics have unknowns. Knows no optimization."""

import math

from torch import nn

from lib.measure.metrics.settings import Effort
from lib.models.calibration.second_moments import matrices

TOKENS_PER_INPUT = 2  # of the widest matrix: with fewer tokens than inputs a covariance has no inverse


def sequences(model: nn.Module, effort: Effort, most: int | None = None) -> int:
    """Return the number of calibration sequences: the effort's (`most` at most), more where the width needs them.

    SparseGPT and SVD-LLM take 128 and 256 sequences of 2,048 tokens for widths of up to 11,008, 24 and 48 tokens per
    input; TOKENS_PER_INPUT is the least with which their sums have full rank, with a margin.
    """
    widest = max((matrix.weight.shape[-1] for matrix in matrices(model)), default=0)
    wanted = effort.calibration_sequences if most is None else min(most, effort.calibration_sequences)
    return max(wanted, math.ceil(TOKENS_PER_INPUT * widest / effort.calibration_tokens))
