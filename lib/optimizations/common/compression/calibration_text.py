"""Calibration text for a model: enough tokens for its covariances to have full rank.

All parts of a stack share one text, which is the same when the stack is judged, measured and saved.
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
    """Return the number of calibration sequences: the effort's (at most `most`), or more if the widest matrix needs it.

    SparseGPT and SVD-LLM use 128 and 256 sequences of 2,048 tokens for widths of up to 11,008, which is 24 and 48
    tokens per input. TOKENS_PER_INPUT is the minimum at which their sums have full rank, with a margin.
    """
    widest = max((matrix.weight.shape[-1] for matrix in matrices(model)), default=0)
    wanted = effort.calibration_sequences if most is None else min(most, effort.calibration_sequences)
    return max(wanted, math.ceil(TOKENS_PER_INPUT * widest / effort.calibration_tokens))


def batches(loaded: Loaded, effort: Effort, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return the calibration text of a model in batches, `sequences` of it in all, for one or several optimizations.

    With random weights it is the effort's own number of sequences, since nothing can be learned from them.
    """
    count = effort.calibration_sequences if loaded.random_weights else sequences(loaded.model, effort)
    return tasks.calibration(loaded, count, effort.calibration_tokens, seed)


def of_stack(loaded: Loaded, effort: Effort, seed: int = 0, *, chosen_at: str = "") -> list[dict[str, torch.Tensor]]:
    """Return the calibration text of a stack: that of the effort at which it was chosen and judged.

    chosen_at: the effort stated by the stack's recipe. If it is empty, the text is that of the run's `effort`, at most
    quick. Raises UserError for an unknown effort.
    """
    if chosen_at:
        effort = settings.read(chosen_at, loaded.scale)
    elif not effort.brief:
        effort = settings.read("quick", loaded.scale)
    return batches(loaded, effort, seed)
