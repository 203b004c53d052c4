"""Impact curves: the effect of an optimization at several strengths, as stored by the templates in a record's details.

An entry of `details` is a curve if its value is a list of rows with a `strength` each; `arm` names the line, `value`
with `low` and `high` is the metric, and further numbers are kept. `x` and `y`, next to `provenance` and `source`, name
the axes. Knows no optimization and draws nothing.
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
    """Return stem → fault for each measured record without a curve, or whose curve has fewer than FEWEST strengths.

    Records without quality (random weights) or limited to some dimensions need no curve and are left out.
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
            faults[record.stem] = f"{len(strengths(curve))} strengths, at least {FEWEST} are needed"
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
    """Return the rows of an entry that is a curve (labelled, every row with a strength); else an empty list."""
    if not isinstance(entry, Mapping) or not entry.get("source") or not entry.get("provenance"):
        return []
    rows = entry.get("value", entry.get("rows"))
    if not isinstance(rows, list) or not rows:
        return []
    sound = all(isinstance(row, Mapping) and _number(row.get("strength")) is not None for row in rows)
    return rows if sound else []


def _number(value: Any) -> float | None:
    """Return `value` as a float; None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(value)


def _first_clause(source: str) -> str:
    return source.split(",")[0].split(";")[0].split(" with ")[0]
