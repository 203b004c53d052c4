"""Verdicts that differ from the previous build are found, among runs of the same effort only."""

import pytest

from lib.report.analysis.noise import flips
from lib.report.pages import index, run_page
from lib.report.records import history, record
from tests.report import samples


def _with_word(word: str, started: str, effort: str = "quick"):
    run = samples.whole("structured_pruning", samples.MODELS[0])
    verdict = run.verdict.model_copy(update={"performance": word})
    about = {"verdict": verdict, "started": started, "key": f"sha256:{started}", "effort": effort}
    return run.model_copy(update=about)


@pytest.fixture
def folder(tmp_path):
    """A result folder beside a history with two builds."""
    store = tmp_path / history.NAME
    history.keep(store, [_with_word("inconclusive", "2026-01-29T10:00:00+00:00")], "proxy", "run")
    history.keep(store, [_with_word("better", "2026-01-30T10:00:00+00:00")], "proxy", "run")
    (tmp_path / "proxy").mkdir()
    return tmp_path / "proxy"


def test_the_newest_earlier_run_counts(folder):
    now = _with_word("worse", "2026-01-31T10:00:00+00:00")
    assert flips.since_last(folder, [now]) == {now.stem: {"performance": ("better", "2026-01-30")}}
    assert flips.contradicts("better", "worse") and not flips.contradicts("better", "inconclusive")
    before = _with_word("worse", "2026-01-30T09:00:00+00:00")
    assert flips.since_last(folder, [before])[now.stem]["performance"] == ("inconclusive", "2026-01-29")


def test_an_unchanged_verdict_or_no_comparable_run_is_not_a_flip(folder):
    assert flips.since_last(folder, [_with_word("better", "2026-01-31T10:00:00+00:00")]) == {}
    assert flips.since_last(folder, [_with_word("worse", "2026-01-31T10:00:00+00:00", "standard")]) == {}
    assert flips.since_last(folder.parent / "nowhere" / "proxy", [_with_word("worse", "2026-01-31T10:00:00")]) == {}


def test_a_flip_is_marked_on_the_index_and_on_the_page(folder):
    now = _with_word("worse", "2026-01-31T10:00:00+00:00")
    record.write(now, folder / f"{now.stem}.json")
    text = "performance was better on 2026-01-30, now worse"
    page = index.write(folder).read_text(encoding="utf-8")
    assert f'class="flip contradicts">changed: {text}' in page
    assert [flip["text"] for flip in run_page.view(now, (), folder)["flips"]] == [text]


def test_the_index_marks_no_flip_for_a_verdict_that_the_set_withholds(folder):
    before = _with_word("inconclusive", "2026-01-30T12:00:00+00:00")
    history.keep(folder.parent / history.NAME, [before], "proxy", "run")
    rate = samples.timed("prefill_tokens_per_second", 1.05, 0.06)  # better, but by chance in the set
    now = _with_word("better", "2026-01-31T10:00:00+00:00")
    now = now.model_copy(update={"measurements": [rate if m.metric == rate.metric else m for m in now.measurements]})
    record.write(now, folder / f"{now.stem}.json")
    [flip] = run_page.view(now, (), folder)["flips"]
    assert flip["text"] == "performance was inconclusive on 2026-01-30, now better"
    page = index.write(folder).read_text(encoding="utf-8")
    assert "over the 1 primaries of performance" in page and "changed: performance" not in page


def test_a_run_with_another_parameter_value_has_not_flipped(folder):
    now = _with_word("worse", "2026-01-31T10:00:00+00:00")
    other = now.model_copy(update={"parameters": now.parameters | {"seed": 1}})
    assert flips.since_last(folder, [other]) == {}
    more = now.model_copy(update={"parameters": now.parameters | {"added": 1, "studies": "/elsewhere"}})
    assert flips.since_last(folder, [more]) == {now.stem: {"performance": ("better", "2026-01-30")}}


def test_a_dimension_that_was_not_measured_has_not_flipped(folder):
    """Previously a run limited to one dimension turned the other verdicts into "now unavailable"."""
    now = _with_word("better", "2026-01-31T10:00:00+00:00")
    silent = dict.fromkeys(("accuracy", "resources", "efficiency"), "unavailable")
    verdict = now.verdict.model_copy(update=silent)
    part = now.model_copy(update={"dimensions": ["performance"], "verdict": verdict})
    assert flips.since_last(folder, [part]) == {}
    history.keep(folder.parent / history.NAME, [part], "proxy", "run")
    assert flips.since_last(folder, [_with_word("better", "2026-02-01T10:00:00+00:00")]) == {}


def test_a_run_on_another_machine_has_not_flipped(folder):
    now = _with_word("worse", "2026-01-31T10:00:00+00:00")
    elsewhere = now.model_copy(update={"environment": now.environment | {"cores_given": 1}})
    assert flips.since_last(folder, [elsewhere]) == {}
