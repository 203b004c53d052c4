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
    for name in ENTRIES:
        entry = record.details.get(name)
        value = entry.get("value") if isinstance(entry, Mapping) else entry
        if isinstance(value, list) and all(isinstance(step, Mapping) and "optimization" in step for step in value):
            return [(str(step["optimization"]), dict(step.get("knobs") or {})) for step in value]
    return []


def in_words(record: Record) -> str:
    """Return the steps as `structured pruning (ratio 0.2) → tensor decomposition`; empty where there are none."""
    return " → ".join(f"{words(name)}{_knobs(knobs)}" for name, knobs in steps(record))


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{words(name)} {value}' for name, value in knobs.items())})" if knobs else ""
