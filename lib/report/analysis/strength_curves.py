"""Impact curves: what an optimization does at several strengths, as the templates leave it in a record's details.

An entry of `details` is a curve where its value is a list of rows with `strength` and at least one more number; `arm`
names the line, `value` with `low` and `high` the metric; further numbers are kept. `x` and `y` beside `provenance` and
`source` name the axes. Knows no optimization and draws nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.report.records.record import Record

FEWEST = 3
NAMED = ("arm", "strength", "value", "low", "high")


def curves(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return a curve per measured record that has one: its identity, axes, provenance and the points of each arm."""
    return [curve for record in records if record.status == "ok" and (curve := _of(record))]


def strengths(curve: Mapping[str, Any]) -> list[float]:
    """Return the different strengths of a curve, ascending."""
    return sorted({point["strength"] for points in curve["arms"].values() for point in points})


def short(records: Sequence[Record]) -> dict[str, str]:
    """Return stem → why, of each measured record whose curve has fewer than three strengths, or that has none.

    A record without quality (random weights) has nothing to draw over strength, and one of some dimensions alone need
    not: both are left out.
    """
    known = {(curve["optimization"], curve["model"]): curve for curve in curves(records)}
    faults = {}
    for record in records:
        if record.status != "ok" or record.dimensions or record.verdict.accuracy == "unavailable":
            continue
        curve = known.get((record.optimization, record.model))
        if curve is None:
            faults[record.stem] = "no impact curve in its details"
        elif len(strengths(curve)) < FEWEST:
            faults[record.stem] = f"{len(strengths(curve))} strengths, at least {FEWEST} are wanted"
    return faults


def _of(record: Record) -> dict[str, Any] | None:
    named = sorted(record.details.items(), key=lambda item: item[0] != "impact")
    entry = next((entry for _, entry in named if _rows(entry)), None)
    if entry is None:
        return None
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(entry):
        point = {name: _number(row.get(name)) for name in ("strength", "value", "low", "high")}
        others = {name: _number(value) for name, value in row.items() if name not in NAMED}
        known = {name: number for name, number in others.items() if number is not None}
        arms.setdefault(str(row.get("arm", record.optimization)), []).append(point | {"more": known})
    return {
        "optimization": record.optimization,
        "model": record.model,
        "effort": record.effort,
        "key": record.key,
        "x": str(entry.get("x") or "strength"),
        "y": str(entry.get("y") or _first_clause(entry["source"])),
        "provenance": entry["provenance"],
        "source": entry["source"],
        "arms": {name: sorted(points, key=lambda point: point["strength"]) for name, points in arms.items()},
    }


def _rows(entry: Any) -> list[Mapping[str, Any]]:
    """Return the rows of an entry that is a curve: labelled, and each row with a strength."""
    if not isinstance(entry, Mapping) or not entry.get("source") or not entry.get("provenance"):
        return []
    rows = entry.get("value", entry.get("rows"))
    if not isinstance(rows, list) or not rows:
        return []
    sound = all(isinstance(row, Mapping) and _number(row.get("strength")) is not None for row in rows)
    return rows if sound else []


def _number(value: Any) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(value)


def _first_clause(source: str) -> str:
    return source.split(",")[0].split(";")[0].split(" with ")[0]
