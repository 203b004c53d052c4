"""A record against earlier builds: compared with the newest comparable run, or the reason why there is none."""

from dataclasses import replace

import pytest

from lib.errors import UserError
from lib.report.analysis import regression
from lib.report.records import history
from tests.report import samples


def _record(**changes):
    whole = samples.whole("structured_pruning", samples.MODELS[0], seed=changes.pop("seed", 0))
    return whole.model_copy(update=changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / history.NAME


def test_without_a_history_nothing_is_claimed(path):
    earlier = regression.against(_record(), path)
    assert earlier.changes == [] == earlier.regressions and "No earlier run" in earlier.summary


def test_the_newest_comparable_run_is_used_and_the_others_are_named(path):
    assert history.keep(path, [_record(started="2026-01-01T00:00:00", key="a")], "proxy", "run", "aaaa1111")
    elsewhere = _record(started="2026-01-02T00:00:00", key="b", environment=samples.ENVIRONMENT | {"cpu": "Other 1"})
    assert history.keep(path, [elsewhere], "proxy", "run", "bbbb2222")
    earlier = regression.against(_record(started="2026-01-03T00:00:00", key="c"), path)
    assert "aaaa1111" in earlier.against and len(earlier.builds) == 2
    assert "1 newer ones are not comparable (different environment: cpu" in earlier.summary
    assert earlier.rows() and all(row["verdict"] != "not comparable" for row in earlier.rows())


def test_only_primary_metrics_with_an_answer_count_as_decided(path):
    """Previously everything compared counted, so a claim with only open comparisons was called not refuted."""
    history.keep(path, [_record(started="2026-01-01T00:00:00", key="a")], "proxy", "run")
    earlier = regression.against(_record(started="2026-01-03T00:00:00", key="c"), path)
    primaries = [change for change in earlier.changes if change.primary and change.verdict != "not comparable"]
    assert 0 < earlier.decided <= len(primaries) < len(earlier.rows())
    opened = [replace(change, verdict="inconclusive") for change in earlier.changes]
    assert replace(earlier, changes=opened).decided == 0


def test_another_scale_effort_or_machine_is_not_compared(path):
    history.keep(path, [_record(started="2026-01-01T00:00:00", key="a")], "proxy", "run")
    for change, says in (
        ({"scale": "slice"}, "different scale: proxy, slice"),
        ({"effort": "thorough"}, "different effort"),
        ({"environment": samples.ENVIRONMENT | {"cores_given": 64}}, "different environment: cores given"),
    ):
        earlier = regression.against(_record(started="2026-01-02T00:00:00", key="b", **change), path)
        assert earlier.against is None and says in earlier.summary and earlier.rows() == []


def test_a_planted_regression_is_found(path):
    old = _record(started="2026-01-01T00:00:00", key="a")
    history.keep(path, [old], "proxy", "run")
    heavier = [
        m.model_copy(update={"optimized": m.optimized * 2, "ratio": m.ratio * 2}) if m.metric == "weights_bytes" else m
        for m in old.measurements
    ]
    earlier = regression.against(_record(started="2026-01-02T00:00:00", key="b", measurements=heavier), path)
    assert [m.metric for m in earlier.regressions] == ["weights_bytes"]
    assert not regression.against(_record(started="2026-01-03T00:00:00", key="c"), path).regressions


def test_a_damaged_history_gives_one_clear_line(path):
    path.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(UserError, match="cannot be used as the history"):
        regression.against(_record(), path)
