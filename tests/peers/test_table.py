"""Tests the peers' table: ratios and intervals computed by hand, the better side, and one row for a peer that fails."""

import json
import math
from pathlib import Path

import pytest
from scipy.stats import t

from tests.peers import table
from tests.peers.comparisons import COMPARISONS, Arm, Comparison, Metric, ways
from tests.peers.running import Result

PEER, OURS = Arm("peer", "peer"), Arm("workbench, as loaded", "ours", own=False)
RATE, MINUTES, BITS = (
    Metric("rate", "rate", "1/s", True),
    Metric("min", "time", "min", False),
    Metric("b", "b", "", None),
)
PAIR = Comparison("peer", "the same file", (PEER, OURS), (RATE, MINUTES, BITS))


def results(theirs: list[dict], ours: list[dict]) -> list[Result]:
    """Return the results of both arms, turn by turn."""
    pairs = [(PEER, values) for values in theirs], [(OURS, values) for values in ours]
    return [Result(arm, turn, values) for arms in pairs for turn, (arm, values) in enumerate(arms)]


def test_ratio_and_interval_are_those_of_the_turns():
    theirs, ours = [100.0, 110.0, 90.0], [210.0, 215.0, 190.0]
    (row,) = table.rows(PAIR, results([{"rate": value} for value in theirs], [{"rate": value} for value in ours]))
    logs = [math.log(b / a) for a, b in zip(theirs, ours)]
    mean = sum(logs) / 3
    half = t.ppf(0.975, 2) * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    assert row.ratio == pytest.approx(math.exp(mean)) and row.turns == 3 and row.better == "other"
    assert row.ci == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    assert row.theirs == pytest.approx(math.exp(sum(map(math.log, theirs)) / 3))


@pytest.mark.parametrize(
    "key, ours, better", [("rate", 2.0, "other"), ("rate", 0.5, "peer"), ("min", 2.0, "peer"), ("min", 0.5, "other")]
)
def test_the_better_side_depends_on_the_metric(key, ours, better):
    (row,) = table.rows(PAIR, results([{key: 1.0}] * 2, [{key: ours}, {key: ours * 1.0001}]))
    assert row.better == better


def test_an_interval_containing_one_cannot_tell_and_a_condition_is_not_judged():
    theirs, ours = [{"rate": 100.0, "b": 5.0}] * 2, [{"rate": 90.0, "b": 16.0}, {"rate": 120.0, "b": 16.0}]
    rate, bits = table.rows(PAIR, results(theirs, ours))
    assert rate.better == "cannot tell" and rate.ci[0] < 1 < rate.ci[1]
    assert bits.better is None and bits.ratio == pytest.approx(3.2)


def test_turns_are_paired_and_one_turn_has_no_interval():
    (row,) = table.rows(PAIR, results([{"rate": 100.0}, {"rate": 50.0}], [{"rate": 200.0}]))
    assert row.turns == 1 and row.ci is None and row.ratio == pytest.approx(2)
    assert row.theirs == pytest.approx(100)


def test_values_equal_as_displayed_are_called_equal():
    (row,) = table.rows(PAIR, results([{"min": 1.0}], [{"min": 1.0001}]))
    assert row.better == "equal"
    (row,) = table.rows(PAIR, results([{"min": 1.0}], [{"min": 1.01}]))
    assert row.better == "peer" and "| peer, one turn |" in table.markdown([row], {}, [])


def test_zero_has_no_ratio():
    (row,) = table.rows(PAIR, results([{"b": 0.0}], [{"b": 0.5}]))
    assert row.ratio is None and row.theirs == 0 and row.better is None


def test_a_failing_peer_gives_one_row_and_a_failing_arm_its_own_row():
    failed = Result(PEER, 0, reason="with peer==1: the index offers none | of them")
    (row,) = table.rows(PAIR, [failed])
    assert row.reason and row.ratio is None
    page = table.markdown([row], {"date": "today"}, [])
    assert page.count("the index offers none / of them") == 1 and "- date: today" in page
    broken = [Result(PEER, 0, {"rate": 1.0}), Result(OURS, 0, {"rate": 1.0}), Result(OURS, 1, reason="ended early")]
    assert [row.reason for row in table.rows(PAIR, broken)] == ["ended early"]
    assert [row.reason for row in table.rows(PAIR, [Result(PEER, 0, {"rate": 1.0})])] == ["was not run"]


def test_the_page_holds_every_row_and_json_keeps_every_number():
    rows = table.rows(PAIR, results([{"rate": 1234.2, "min": 2.0}] * 2, [{"rate": 2468.4, "min": 1.0}] * 2))
    page = table.markdown(rows, {"machine": "this one"}, ["peer: built without", "peer: built without"])
    lines = [line for line in page.splitlines() if line.startswith("| peer ")][1:]
    assert len(lines) == 2 and "2.000× (2.000 to 2.000, 2 turns)" in lines[0] and "1,234" in lines[0]
    assert lines[0].endswith("| workbench |") and page.count("built without") == 1
    assert json.loads(json.dumps(table.plain(rows)))[0]["others"] == pytest.approx(2468.4)


def test_the_stored_table_has_these_columns_and_every_peer():
    page = (Path(__file__).resolve().parents[2] / ".github" / "PEERS.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(table.COLUMNS)} |" in page and "- date: " in page
    assert {comparison.peer for comparison in COMPARISONS} <= {line.split(" | ")[0][2:] for line in page.splitlines()}


def test_every_comparison_is_distinguishable_and_every_peer_installable():
    for comparison in COMPARISONS:
        assert comparison.arms[0].own and not any(arm.own for arm in comparison.arms[1:])
        assert len({(arm.script, arm.options) for arm in comparison.arms}) == len(comparison.arms)
        assert all(any(text.startswith("torch==") for text in way.requirements) for way in ways(comparison.peer)) or (
            comparison.peer == "llama.cpp"
        )
