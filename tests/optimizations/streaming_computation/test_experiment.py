"""What would refute the claims: each answered from measurements, and left open where they cannot tell."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement
from lib.optimizations.streaming_computation import experiment, window_quality
from lib.optimizations.streaming_computation.window_quality import LongTexts

PEAK = "peak_memory_above_start_bytes"


def _answers(optimized_tokens, peak=50.0, offload_ci=(1.5, 2.0), climb=(0.9, 1.0), exact=True):
    work = [SimpleNamespace(output_BN=torch.tensor([tokens])) for tokens in ([1, 2], optimized_tokens)]
    compared = Compared([], {"decode": SimpleNamespace(baseline=work[0], optimized=work[1])})
    peaks = [measurement.counted(PEAK, "generate", 100.0, peak, "counted", "measured")]
    offload = measurement.informative("decode_tokens_per_second", "decode", 1.0, 1.7, "timed", ci=offload_ci)
    texts = LongTexts(late_over_early={window_quality.WINDOWED: 1.0}, climb=climb)
    equal = {"all together": {"same_top": 1.0}}
    answers = experiment.answers(compared, exact, equal, peaks, {"disk": offload}, texts)
    assert [claim for claim, *_ in answers] == list(experiment.CLAIMS)
    return [refuted for _, refuted, _ in answers]


def test_nothing_is_refuted_where_all_holds():
    assert _answers([1, 2]) == [False, False, False, False]


def test_each_claim_can_be_refuted():
    assert _answers([1, 3], 100.0, (0.5, 0.8), (1.2, 1.5)) == [True, True, True, True]


def test_what_cannot_be_told_is_left_open():
    assert _answers([1, 3], 50.0, (0.8, 1.2), (0.9, 1.2), exact=False) == [None, False, None, None]
    assert _answers([1, 2], climb=None)[3] is None


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.5])
def test_the_climb_of_perplexity_is_that_of_the_losses(slope):
    random = np.random.default_rng(0)
    losses_NT = 3 + slope * np.linspace(0, 1, 800) + 0.01 * random.standard_normal((12, 800))
    low, high = window_quality.climb_interval(losses_NT, 100)
    assert (low + high) / 2 == pytest.approx(np.exp(slope * 600 / 799), abs=0.005) and 0 < high - low < 0.02
