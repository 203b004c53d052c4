"""The stack of a run: which optimizations it applied together, in order, where a search, a rule or a bisection chose.

Read from the record's details. Knows nothing of what an optimization does with its knobs.
"""

from collections.abc import Mapping
from typing import Any

from lib.report.records.record import Record
from lib.report.records.verdicts.unchanged import stored, value_of
from lib.report.text.quantities import counted
from lib.report.text.wording import words

APPLIED = ("works", "invalid")  # states of a candidate that could be applied, if only with a degenerate output


def steps(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Return (optimization, knobs) of every step, in order; empty where the run has no stack, or an empty one."""
    return stored(record.details) or []


def nothing_pays(record: Record) -> str:
    """Return what is said of a run whose stack is empty, so that its optimized model is a copy; empty elsewhere.

    A rule that names what it considered takes what is smaller, too; a search takes what is faster. Candidates that
    could not be applied are not counted; of the others it is only known that none is surely a gain.
    """
    if stored(record.details) != []:
        return ""
    considered = value_of(record.details, "considered")
    if not isinstance(considered, list) or not considered:
        return "nothing pays here: no candidate is surely within the margins and faster"
    tried = sum(row.get("state", "works") in APPLIED for row in considered if isinstance(row, Mapping))
    if not tried:
        return "nothing pays here: no candidate could be applied"
    of = counted(tried, "candidate")
    return f"nothing pays here: of {of} none is surely within the margins and faster or smaller"


def in_words(record: Record) -> str:
    """Return the steps as `structured pruning (ratio 0.2) → tensor decomposition`; empty where there are none."""
    return " → ".join(f"{words(name)}{_knobs(knobs)}" for name, knobs in steps(record))


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{words(name)} {value}' for name, value in knobs.items())})" if knobs else ""
