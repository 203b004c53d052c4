"""The stack of a run: which optimizations it applied together, in order, where a search, a rule or a bisection chose.

Read from the record's details. Knows nothing of what an optimization does with its knobs.
"""

from collections.abc import Mapping
from typing import Any

from lib.report.records.record import Record
from lib.report.text.wording import words

ENTRIES = ("stack", "order")  # of the details, in which such a run keeps its steps


def steps(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Return (optimization, knobs) of every step, in order; empty where the run has no stack, or an empty one."""
    return _stored(record) or []


def nothing_pays(record: Record) -> str:
    """Return what is said of a run whose stack is empty, so that its optimized model is a copy; empty elsewhere."""
    if _stored(record) != []:
        return ""
    tried = _value(record, "considered")
    number = f"of {len(tried)} candidates none" if isinstance(tried, list) and tried else "no candidate"
    return f"nothing pays here: {number} is within the margins and faster or smaller"


def _stored(record: Record) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the steps that a record keeps; None where it keeps none."""
    for name in ENTRIES:
        value = _value(record, name)
        if isinstance(value, list) and all(isinstance(step, Mapping) and "optimization" in step for step in value):
            return [(str(step["optimization"]), dict(step.get("knobs") or {})) for step in value]
    return None


def _value(record: Record, name: str) -> Any:
    """Return the value of a detail, labelled or not; None where there is none."""
    entry = record.details.get(name)
    return entry.get("value") if isinstance(entry, Mapping) else entry


def in_words(record: Record) -> str:
    """Return the steps as `structured pruning (ratio 0.2) → tensor decomposition`; empty where there are none."""
    return " → ".join(f"{words(name)}{_knobs(knobs)}" for name, knobs in steps(record))


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{words(name)} {value}' for name, value in knobs.items())})" if knobs else ""
