"""p-values from stored intervals, and Holm's correction."""

import math

import pytest

from lib.measure.metrics import measurement, significance
from tests.report import samples


@pytest.mark.parametrize("ratio", [0.7, 0.95, 1.04, 1.5])
@pytest.mark.parametrize("metric", ["prefill_tokens_per_second", "time_to_first_token_ms", "peak_memory_bytes"])
def test_p_is_below_the_level_exactly_where_the_interval_excludes_no_change(metric, ratio):
    for half in (abs(ratio - 1) * factor for factor in (0.5, 0.99, 1.01, 2.0)):
        p = significance.p_value(samples.timed(metric, ratio, half))
        assert (p < 0.05) == (half < abs(ratio - 1))


@pytest.mark.parametrize(("lost", "beyond"), [(0.05, True), (0.03, False), (-0.05, True), (-0.01, False)])
def test_a_score_loss_is_tested_against_its_margin_and_a_gain_against_zero(lost, beyond):
    score = samples.scored("f1_macro", 0.9, 0.9 - lost, "inconclusive", half=0.02 / 0.9)
    assert (significance.p_value(score) < 0.05) == beyond


def test_results_without_sampling_error_have_no_p_value():
    assert significance.p_value(measurement.counted("weights_bytes", "load", 10.0, 5.0, "counted")) is None
    assert significance.p_value(samples.timed("peak_memory_bytes", 0.5, 0.0)) is None
    once = samples.timed("peak_memory_bytes", 0.5, 0.1).model_copy(update={"n": 1})
    assert significance.p_value(once) is None


def test_a_wider_interval_is_less_significant():
    ps = [
        significance.p_value(samples.timed("prefill_tokens_per_second", 1.2, half)) for half in (0.02, 0.1, 0.19, 0.5)
    ]
    assert ps == sorted(ps) and all(0 <= p <= 1 for p in ps)
    assert significance.p_value(samples.timed("prefill_tokens_per_second", 1.0, 0.1)) == 1.0


def test_few_documents_are_less_significant_than_their_many_items():
    """The interval is over documents; p previously counted their windows, and fell as if these were independent."""
    lost = samples.scored("perplexity", 41.0, 44.0, "not_maintained", half=0.02)
    of_few = lost.model_copy(update={"documents": 8})
    assert (significance.freedom_of(lost), significance.freedom_of(of_few)) == (399, 7)
    alone, together = significance.p_value(lost), significance.p_value(of_few)
    assert alone < 1e-4 < 1e-3 < together < 0.05
    assert significance.freedom_of(lost.model_copy(update={"documents": 1})) == 1


def test_holm():
    assert significance.holm([]) == []
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert math.isclose(significance.holm([0.02])[0], 0.02)
