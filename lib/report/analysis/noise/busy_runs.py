"""Which runs of a result folder were measured on a busy machine, and the evidence."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lib.errors import UserError
from lib.measure.metrics import busy
from lib.report.records import record
from lib.report.records.verdicts.in_words import PREVIEW


def reasons(folder: Path, stems: Iterable[str]) -> dict[str, str]:
    """Return stem → why its timings are not judged. Quiet, missing and damaged runs are left out, and so are previews,
    whose few rounds are noisy on any machine.
    """
    reasons_by_stem = {}
    for stem in stems:
        path = folder / f"{stem}.json"
        with suppress(UserError):  # a damaged or missing record is reported elsewhere
            run = record.read(path)
            if run.effort != PREVIEW and (reason := busy.why_busy(run.measurements)):
                reasons_by_stem[stem] = reason
    return reasons_by_stem
