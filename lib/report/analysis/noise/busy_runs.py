"""Which runs of a result folder were measured on a busy machine, and what was seen there."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lib.errors import UserError
from lib.measure.metrics import busy
from lib.report.records import record


def reasons(folder: Path, stems: Iterable[str]) -> dict[str, str]:
    """Return stem → why nothing timed is judged; quiet, missing and damaged runs are left out."""
    reasons_by_stem = {}
    for stem in stems:
        path = folder / f"{stem}.json"
        with suppress(UserError):  # a damaged or missing record is reported elsewhere
            reason = busy.why_busy(record.read(path).measurements)
            if reason:
                reasons_by_stem[stem] = reason
    return reasons_by_stem
