"""Metrics over the builds of the history: what is read, what is reported as changed, and what may not be compared."""

import pandas as pd
import pytest

from lib.report.figures import style, trends
from lib.report.records import history
from tests.report import samples

STEM = "structured_pruning"


def _store(path, gains, **changes):
    """Store a build per gain, each with different runs; `changes` apply to the last one's records."""
    for seed, gain in enumerate(gains):
        runs = [samples.whole(STEM, model, gain, seed=seed) for model in samples.MODELS[:2]]
        if seed == len(gains) - 1:
            runs = [run.model_copy(update=changes) for run in runs]
        history.keep(path, runs, "proxy", "complete", f"{seed:012x}")
    return path


@pytest.fixture
def dated(tmp_path, monkeypatch):
    """Return a history path; each build stored in it ends a second later than the one before."""
    import datetime

    times = iter(range(60))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 1, 31, 14, 5, next(times), tzinfo=datetime.timezone.utc)

    monkeypatch.setattr(history.datetime, "datetime", Clock)
    return tmp_path / history.NAME


def test_without_a_history_there_is_no_trend(tmp_path):
    course = trends.read(tmp_path / history.NAME, "proxy")
    assert course.empty and trends.of(course, "performance").empty


def test_a_trend_has_each_judged_metric_of_each_build(dated):
    frame = trends.read(_store(dated, [1.2, 1.2, 1.5]), "proxy")
    assert set(frame["dimension"]) == {"performance", "accuracy", "resources", "efficiency"}
    assert len(frame) == 3 * 2 * 8 and list(frame["at"].unique()) == [0, 1, 2]
    speed = frame[(frame["metric"] == "prefill_tokens_per_second") & (frame["model"] == samples.MODELS[0])]
    assert list(speed["gain"].round(1)) == [1.2, 1.2, 1.5] and trends.read(dated, "slice").empty
    assert style.png(trends.draw(frame[frame["dimension"] == "performance"])).startswith(b"\x89PNG")


def test_only_changed_metrics_are_named(dated):
    frame = trends.read(_store(dated, [1.2, 1.5]), "proxy")
    text = trends.words(frame[frame["metric"] == "prefill_tokens_per_second"])
    assert f"prefill rate of Structured pruning on {samples.MODELS[0]} 1.2" in text and "over 2 builds" in text
    assert trends.words(frame[frame["dimension"] == "resources"]).endswith("no longer overlap: none.")


def test_another_effort_is_not_compared(dated):
    frame = trends.read(_store(dated, [1.2, 1.5], effort="standard"), "proxy")
    assert "no longer overlap: none" in trends.words(frame)


def test_one_build_has_nothing_to_compare(dated):
    frame = trends.read(_store(dated, [1.2]), "proxy")
    assert trends.words(frame).endswith("nothing to compare.")
    assert style.png(trends.draw(frame)).startswith(b"\x89PNG")


def test_only_the_last_builds_are_drawn(dated, monkeypatch):
    monkeypatch.setattr(trends, "MOST", 2)
    frame = trends.read(_store(dated, [1.2, 1.3, 1.4]), "proxy")
    assert list(frame["at"].unique()) == [0, 1] and frame["gain"].max() < 1.5


def test_only_the_first_of_many_models_are_drawn_with_a_note(dated):
    """Previously a column for each of a dozen models left their panels no width."""
    frame = trends.read(_store(dated, [1.2, 1.3]), "proxy")
    speed = frame[(frame["dimension"] == "performance") & (frame["model"] == samples.MODELS[0])]
    many = pd.concat([speed.assign(model=f"model-{number:02}") for number in range(9)], ignore_index=True)
    figure = trends.draw(many)
    assert len(figure.axes) == trends.MOST_MODELS * speed["metric"].nunique()
    assert style.png(figure).startswith(b"\x89PNG")
    assert trends.words(many).endswith("Only the first 6 of 9 models are drawn.") and "drawn" not in trends.words(speed)


def test_another_workload_is_not_compared(dated):
    """The best fixed size is chosen anew in every build and named in the workload."""
    for seed, (gain, size) in enumerate([(1.2, 8), (1.5, 12)]):
        run = samples.whole(STEM, samples.MODELS[0], gain, seed=seed)
        members = [m.model_copy(update={"workload": f"{m.workload}, fixed {size}"}) for m in run.measurements]
        history.keep(dated, [run.model_copy(update={"measurements": members})], "proxy", "complete", f"{seed:012x}")
    frame = trends.read(dated, "proxy")
    assert "no longer overlap: none" in trends.words(frame)
    assert style.png(trends.draw(frame[frame["dimension"] == "performance"])).startswith(b"\x89PNG")
