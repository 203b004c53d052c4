"""Dense scores compared with published ones: the difference in standard errors, and nothing if nothing was measured."""

import pytest

from lib.measure.metrics import measurement
from lib.report.analysis import published
from lib.report.records import record


def of(model: str, task: str, metric: str, baseline: float, n: int) -> record.Record:
    """A record with one score of a public task."""
    score = measurement.informative(metric, task, baseline, baseline, "test", n=n)
    return record.build("x", model, "full", "quick", {}, [score])


def test_the_difference_is_in_standard_errors_of_the_measured_score():
    frame = published.table([of("smollm2-135m-instruct", "arc_easy", "accuracy", 0.5, 400)])
    (line,) = frame.to_dict("records")
    assert line["standard error"] == pytest.approx(0.025) and line["items"] == 400
    assert line["difference in standard errors"] == pytest.approx((0.5 - line["published"]) / 0.025)
    assert "lm-evaluation-harness" in line["source"]


def test_the_most_items_count_and_other_models_have_no_row():
    few, many = (of("smollm2-135m-instruct", "piqa", "accuracy_norm", score, n) for score, n in ((0.9, 48), (0.6, 400)))
    frame = published.table([few, many, of("another", "piqa", "accuracy_norm", 0.5, 48)])
    assert set(frame["here"]) == {0.6} and len(frame) == 2  # two protocols
    assert published.table([of("another", "piqa", "accuracy_norm", 0.5, 48)]).empty and published.table([]).empty


def test_every_published_score_is_a_share_with_its_source():
    for score in published.scores():
        assert 0 < score.score < 1 and len(score.source) > 10
        assert score.metric in ("accuracy", "accuracy_norm")
