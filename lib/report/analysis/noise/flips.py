"""Which verdicts of a run differ from those of the build before: one that flipped deserves a second look.

Compares what the records themselves say, of runs with the same optimization, model, scale, effort and parameters; the
verdicts within a whole set (`lib.report.analysis.noise.discoveries`) depend on its other runs.
"""

from collections.abc import Sequence
from pathlib import Path

from lib.report.records import history
from lib.report.records.record import Record
from lib.report.records.setting import facts

OPPOSITE = ({"better", "worse"}, {"maintained", "not_maintained"}, {"better", "not_maintained"})
OLD_WORDS = ("mixed",)  # of records without a primary: no word of today is the same


def since_last(folder: Path, records: Sequence[Record]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return stem → dimension → (the word before, its day) of the words that changed; empty without a history.

    `folder` is the result folder, beside which the history lies. Raises UserError where that cannot be read.
    """
    before = history.words_before(Path(folder).resolve().parent / history.NAME, records)
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
    """Return whether two verdicts contradict each other, rather than one of them saying less."""
    return {before, now} in OPPOSITE
