"""The stack of a run: which optimizations it applied together, in order, where a search, a rule or a bisection chose.

Read from the record's details. Knows nothing of what an optimization does with its knobs.
"""

from collections.abc import Mapping
from typing import Any

from lib.report.records.record import Record
from lib.report.records.verdicts.unchanged import stored, value_of
from lib.report.text.wording import words


def steps(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Return (optimization, knobs) of every step, in order; empty where the run has no stack, or an empty one."""
    return stored(record.details) or []


def nothing_pays(record: Record) -> str:
    """Return what is said of a run whose stack is empty, so that its optimized model is a copy; empty elsewhere.

    A rule that names what it considered takes what is smaller, too; a search takes what is faster.
    """
    if stored(record.details) != []:
        return ""
    tried = value_of(record.details, "considered")
    if isinstance(tried, list) and tried:
        return f"nothing pays here: of {len(tried)} candidates none is within the margins and faster or smaller"
    return "nothing pays here: no candidate is within the margins and faster"


def in_words(record: Record) -> str:
    """Return the steps as `structured pruning (ratio 0.2) → tensor decomposition`; empty where there are none."""
    return " → ".join(f"{words(name)}{_knobs(knobs)}" for name, knobs in steps(record))


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{words(name)} {value}' for name, value in knobs.items())})" if knobs else ""
