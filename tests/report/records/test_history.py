"""The history of builds: each run once, each build whole, named by date or commit."""

import sqlite3
import zlib

import pytest

from lib.errors import UserError
from lib.report.records import history, record
from tests.report import samples


def _runs(seed=0, count=2):
    return [samples.whole("structured_pruning", model, seed=seed) for model in samples.MODELS[:count]]


def test_a_build_is_kept_once_and_found_again(tmp_path):
    path = tmp_path / history.NAME
    assert history.keep(path, _runs(), "proxy", "complete", "abc123def456")
    assert not history.keep(path, _runs(), "proxy", "run", "abc123def456")  # nothing new
    assert history.keep(path, [*_runs()[:1], *_runs(1)[1:]], "proxy", "run", "fedcba987654")
    first, second = history.builds(path, "proxy")
    assert (first.commit, first.runs, second.command) == ("abc123def456", 2, "run")
    for name in ("abc1", "abc123def456789", "abc123def456"):
        assert history.find(path, name, "proxy") == first
    assert history.find(path, second.ended[:10], "proxy") == second == history.find(path, second.ended[:16])
    again = history.records(path, first)
    assert [run.stem for run in again] == sorted(run.stem for run in _runs())
    bare = [run.model_copy(update={"process": None, "log": None}) for run in _runs()]
    assert [record.to_json(run) for run in again] == [record.to_json(run) for run in bare]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (3,)  # the kept run is stored once


def test_scales_are_kept_apart(tmp_path):
    path = tmp_path / history.NAME
    history.keep(path, _runs(), "proxy", "complete")
    with pytest.raises(UserError, match="Known: none yet"):
        history.find(path, "2026", "slice")
    assert history.keep(path, _runs(), "slice", "complete")


@pytest.mark.parametrize("name", ["1999-01-01", "abcdef", "", "2", "%", "'; DROP TABLE runs"])
def test_an_unknown_build_name(name, tmp_path):
    path = tmp_path / history.NAME
    history.keep(path, _runs(), "proxy", "complete", "0123456789ab")
    with pytest.raises(UserError, match=r"begins with .* Known: 20\d\d-.* 0123456789ab \(proxy, 2 runs\)"):
        history.find(path, name)


def test_over_time_has_a_row_for_each_build_and_ratio(tmp_path):
    path = tmp_path / history.NAME
    assert history.over_time(path, "proxy") == []
    history.keep(path, _runs(), "proxy", "complete")
    history.keep(path, _runs(3), "proxy", "complete")
    rows = history.over_time(path, "proxy")
    with_ratio = sum(bool(m.ratio) for run in _runs() for m in run.measurements)
    assert len(rows) == 2 * with_ratio
    assert {row["model"] for row in rows} == set(samples.MODELS[:2])
    assert all(row["gain"] > 0 for row in rows)


def test_a_file_that_is_not_a_history(tmp_path):
    path = tmp_path / history.NAME
    path.write_text("not a database, but long enough to be taken for one" * 40)
    with pytest.raises(UserError, match=r"history\.sqlite: cannot be used .* move it away"):
        history.keep(path, _runs(), "proxy", "complete")


def test_a_damaged_run_inside_the_file(tmp_path):
    path = tmp_path / history.NAME
    history.keep(path, _runs(), "proxy", "complete")
    for blob in (b"half", zlib.compress(b"{"), None):
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE runs SET record = ?", [blob])
        with pytest.raises(UserError, match=r"history\.sqlite: a run in the history of builds is damaged .* move it"):
            history.records(path, history.builds(path, "proxy")[0])
        later = [run.model_copy(update={"started": "2999-01-01T00:00:00"}) for run in _runs()]
        with pytest.raises(UserError, match="is damaged"):
            history.words_before(path, later)


def test_a_build_that_dies_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / history.NAME
    monkeypatch.setattr(history.datetime, "datetime", None)  # fails after the runs were inserted
    with pytest.raises(AttributeError):
        history.keep(path, _runs(), "proxy", "complete")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)
