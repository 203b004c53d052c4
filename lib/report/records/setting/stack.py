"""The stack of a run: the optimizations, in order, that a search, a rule or a bisection chose to apply together.

Read from the record's details. Independent of what an optimization does with its knobs.
"""

from collections.abc import Mapping
from typing import Any

from lib.report.records.record import Record
from lib.report.records.verdicts.unchanged import stored, value_of
from lib.report.text.quantities import counted
from lib.report.text.wording import words

APPLIED = ("works", "invalid")  # states of a candidate that could be applied, even if its output degenerated


def steps(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Return (optimization, knobs) of every step, in order; empty where the run has no stack or an empty one."""
    return stored(record.details) or []


def nothing_pays(record: Record) -> str:
    """Return a phrase for a run with an empty stack, whose optimized model is a copy; empty for any other run.

    A rule that lists the candidates it considered also accepts smaller ones; a search accepts faster ones only.
    Candidates that could not be applied are not counted; the others are only known not to be a sure gain.
    """
    if stored(record.details) != []:
        return ""
    considered = value_of(record.details, "considered")
    if not isinstance(considered, list) or not considered:
        return "nothing pays here: no candidate is surely within the margins and faster"
    tried = sum(row.get("state", "works") in APPLIED for row in considered if isinstance(row, Mapping))
    if not tried:
        return "nothing pays here: no candidate could be applied"
    candidates = counted(tried, "candidate")
    return f"nothing pays here: of {candidates} none is surely within the margins and faster or smaller"


def in_words(record: Record) -> str:
    """Return the steps as `structured pruning (ratio 0.2) → tensor decomposition`; empty where there are none."""
    return " → ".join(f"{words(name)}{_knobs(knobs)}" for name, knobs in steps(record))


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{words(name)} {value}' for name, value in knobs.items())})" if knobs else ""
