"""Verdicts of a run that differ from those of the previous build: a flipped verdict deserves a second look.

Compares the verdicts in the records of runs with the same optimization, model, scale, effort and parameters, not the
verdicts within a set (`lib.report.analysis.noise.discoveries`), which depend on its other runs.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from lib.report.records import history
from lib.report.records.record import Record
from lib.report.records.setting import facts

OPPOSITE = ({"better", "worse"}, {"maintained", "not_maintained"}, {"better", "not_maintained"})
OLD_WORDS = ("mixed",)  # of records without a primary: no present verdict corresponds to it


def since_last(folder: Path, records: Sequence[Record]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return stem → dimension → (earlier verdict, its day) for the verdicts that changed; empty without a history.

    `folder` is the result folder; the history lies next to it. Raises UserError where the history cannot be read.
    """
    before = history.words_before(Path(os.path.abspath(folder)).parent / history.NAME, records)
    flipped = {}
    for record in records:
        started, words = before.get(record.stem, ("", {}))
        now = record.verdict.words()
        changed = {
            name: (word, facts.day(started)[:10])
            for name, word in words.items()
            if word != now[name] and word not in OLD_WORDS
        }
        if changed:
            flipped[record.stem] = changed
    return flipped


def contradicts(before: str, now: str) -> bool:
    """Return whether two verdicts contradict each other; a weaker verdict is not a contradiction."""
    return {before, now} in OPPOSITE
