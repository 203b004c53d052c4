"""Builds one table from the arms' results: a row for each number that is compared with the peer's, with their ratio.

Numbers are geometric means over turns; the interval is Student's over the turns' log-ratios; a single turn has none.
Does not depend on how an arm was run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lib.measure.metrics import paired_stats
from tests.peers.comparisons import Arm, Comparison, Metric
from tests.peers.running import Result

SAME = 5e-4  # displayed precision of a ratio
COLUMNS = ("peer", "beside it", "number", "peer's", "the other's", "ratio, other / peer", "better")


@dataclass(frozen=True)
class Row:
    """One number of the peer and of another arm; `reason` replaces the numbers if there are none.

    `ratio` is the arm's over the peer's, `ci` its 95 % interval, `better` the better side: "peer", "other", "equal" (at
    the displayed precision), "cannot tell", or None where neither direction is better.
    """

    peer: str
    about: str
    beside: str
    metric: str
    unit: str
    theirs: float | None = None
    others: float | None = None
    ratio: float | None = None
    ci: tuple[float, float] | None = None
    turns: int = 0
    better: str | None = None
    reason: str | None = None


def rows(comparison: Comparison, results: Sequence[Result]) -> list[Row]:
    """Return the rows of a comparison, arm by arm; a failed arm gets one row with the reason."""
    peer, *others = comparison.arms
    by_arm = {arm: [result for result in results if result.arm == arm] for arm in comparison.arms}
    if failed := _reason(by_arm[peer]):
        return [Row(comparison.peer, comparison.about, peer.title, "", "", reason=failed)]
    table_rows = []
    for arm in others:
        if failed := _reason(by_arm[arm]):
            table_rows.append(Row(comparison.peer, comparison.about, arm.title, "", "", reason=failed))
            continue
        table_rows += [row for metric in comparison.metrics if (row := _row(comparison, arm, metric, by_arm))]
    return table_rows


def _reason(results: Sequence[Result]) -> str | None:
    if not results:
        return "was not run"
    return next((result.reason for result in results if result.reason is not None), None)


def _row(comparison: Comparison, arm: Arm, metric: Metric, by_arm: Mapping[Arm, Sequence[Result]]) -> Row | None:
    """Return the row of one metric, or None if either arm does not report it."""
    theirs, others = (_values(by_arm[key], metric.key) for key in (comparison.arms[0], arm))
    turns = sorted(set(theirs) & set(others))
    if not turns:
        return None
    common: dict[str, Any] = {"metric": metric.title, "unit": metric.unit, "turns": len(turns)}
    means = [_mean([values[turn] for turn in turns]) for values in (theirs, others)]
    common |= {"theirs": means[0], "others": means[1]}
    if any(values[turn] <= 0 for values in (theirs, others) for turn in turns):
        return Row(comparison.peer, comparison.about, arm.title, **common)
    logs = [math.log(others[turn] / theirs[turn]) for turn in turns]
    ratio = math.exp(sum(logs) / len(logs))
    ci = None
    if len(turns) > 1:
        low, high = paired_stats.student_interval(logs)
        ci = math.exp(low), math.exp(high)
    better = _better(metric, ratio, ci)
    return Row(comparison.peer, comparison.about, arm.title, **common, ratio=ratio, ci=ci, better=better)


def _values(results: Iterable[Result], key: str) -> dict[int, float]:
    """Return turn → value of one metric."""
    return {result.turn: result.values[key] for result in results if key in result.values}


def _mean(values: Sequence[float]) -> float:
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def _better(metric: Metric, ratio: float, ci: tuple[float, float] | None) -> str | None:
    if metric.higher_is_better is None:
        return None
    low, high = ci or (ratio, ratio)
    if abs(low - 1) < SAME and abs(high - 1) < SAME:
        return "equal"
    if low <= 1 <= high:
        return "cannot tell"
    return "other" if (ratio > 1) == metric.higher_is_better else "peer"


def plain(table_rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values for JSON."""
    return [asdict(row) for row in table_rows]


def markdown(table_rows: Sequence[Row], facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """Return the page: what was run where and when, the table, and its notes."""
    lines = ["# Peers on the same file", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |" for row in table_rows]
    lines += [
        "",
        "Ratios over several turns carry their 95 % interval; a single turn has none, and proves no difference.",
    ]
    lines += ["", *(f"- {note}" for note in dict.fromkeys(notes))] if notes else []
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    if row.reason is not None:
        return row.peer, row.beside, "none", "", "", "", row.reason
    unit = f", {row.unit}" if row.unit else ""
    ratio = "" if row.ratio is None else f"{_ratio(row.ratio)}×"
    if row.ci is not None:
        ratio += f" ({_ratio(row.ci[0])} to {_ratio(row.ci[1])}, {row.turns} turns)"
    better = {None: "–", "peer": row.peer, "other": row.beside.partition(",")[0]}.get(row.better, row.better or "")
    better += ", one turn" if row.better in ("peer", "other") and row.turns == 1 else ""
    return row.peer, row.beside, row.metric + unit, number(row.theirs), number(row.others), ratio, better


def _ratio(value: float) -> str:
    return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.3g}"


def number(value: float | None) -> str:
    """Return a value with four digits and separated thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
