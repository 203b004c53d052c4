"""How much calibration text a model needs, and the text: as many tokens as its statistics have unknowns.

A stack has one text for all of its parts, the same where it is judged, measured and saved. Knows no optimization.
"""

import math

import torch
from torch import nn

from lib.measure.metrics import settings
from lib.measure.metrics.settings import Effort
from lib.models.calibration.second_moments import matrices
from lib.models.loading import Loaded
from lib.models.tasks import tasks

TOKENS_PER_INPUT = 2  # of the widest matrix: with fewer tokens than inputs a covariance has no inverse


def sequences(model: nn.Module, effort: Effort, most: int | None = None) -> int:
    """Return the number of calibration sequences: the effort's (`most` at most), more where the width needs them.

    SparseGPT and SVD-LLM take 128 and 256 sequences of 2,048 tokens for widths of up to 11,008, 24 and 48 tokens per
    input; TOKENS_PER_INPUT is the least with which their sums have full rank, with a margin.
    """
    widest = max((matrix.weight.shape[-1] for matrix in matrices(model)), default=0)
    wanted = effort.calibration_sequences if most is None else min(most, effort.calibration_sequences)
    return max(wanted, math.ceil(TOKENS_PER_INPUT * widest / effort.calibration_tokens))


def batches(loaded: Loaded, effort: Effort, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return the calibration text of a model that several optimizations change: `sequences` of it in batches.

    Nothing is learned from random weights, however wide: there it is the effort's number of sequences.
    """
    count = effort.calibration_sequences if loaded.random_weights else sequences(loaded.model, effort)
    return tasks.calibration(loaded, count, effort.calibration_tokens, seed)


def of_stack(loaded: Loaded, effort: Effort, seed: int = 0, *, chosen_at: str = "") -> list[dict[str, torch.Tensor]]:
    """Return the calibration text of a stack: that of the effort it was chosen at, on which it was judged.

    chosen_at: the effort that its recipe states; where it states none, or nothing chose the stack, it is `effort`, that
    of the run, and quick at most. Raises UserError for an unknown effort.
    """
    if chosen_at:
        effort = settings.read(chosen_at, loaded.scale)
    elif not effort.brief:
        effort = settings.read("quick", loaded.scale)
    return batches(loaded, effort, seed)
