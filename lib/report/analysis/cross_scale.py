"""Quality from one scale next to speed from another: each number keeps its scale and provenance, none are merged.

A proxy model shows the effect of an optimization on answers, a slice its effect on time at the real dimensions. Knows
records only.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lib.measure.metrics.digits import DASH
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import headlines
from lib.report.analysis.noise import discoveries
from lib.report.records import record
from lib.report.records.record import Record
from lib.report.text.wording import label, title

QUALITY, SPEED = "proxy", "slice"
COLUMNS = ("optimization", "model")


def beside(folder: Path, scale: str) -> tuple[str, list[Record]]:
    """Return the other scale, and the measured records in the folder of that name next to `folder`, their verdicts
    corrected over that whole set; empty where there is none.
    """
    other = SPEED if scale == QUALITY else QUALITY
    where = Path(os.path.abspath(folder)).parent / other
    records, _ = record.read_folder(where) if where.is_dir() else ([], {})
    return other, [run for run in discoveries.settled(records) if run.status == "ok" and run.scale == other]


def table(
    records: Iterable[Record], quality: str = "f1_macro", speed: str = "prefill_tokens_per_second"
) -> pd.DataFrame:
    """Return a row per optimization and model that has `quality` on a proxy model and `speed` on a slice.

    Columns: the change in quality with its bound and verdict; the gain in speed with its interval and verdict; that
    gain at full depth, where it was derived. Each column names its scale, each cell its provenance.
    """
    of = {(record.scale, record.optimization, record.model): record for record in records}
    names = sorted({(optimization, model) for _, optimization, model in of})
    deep = f"full_depth_{speed}"
    heads = (f"{label(quality)} ({QUALITY})", f"{label(speed)} ({SPEED})", f"the same at full depth (from the {SPEED})")
    lines = []
    for optimization, model in names:
        answers, times_of = of.get((QUALITY, optimization, model)), of.get((SPEED, optimization, model))
        scored, timed = _first(answers, quality), _first(times_of, speed)
        if scored is None or timed is None:
            continue
        line = [title(optimization), model, *map(_text, (scored, timed, _first(times_of, deep)))]
        lines.append(dict(zip((*COLUMNS, *heads), line)))
    return pd.DataFrame(lines, columns=[*COLUMNS, *heads])


def why_empty(scale: str, other: str, records: Sequence[Record]) -> str:
    """Return why `table` has no row for the records of `scale`, and the command that makes those of the `other` scale
    (`records`), if that helps.
    """
    if scale not in (QUALITY, SPEED):
        return f"Only scales {QUALITY} and {SPEED} are shown together; these records are of scale {scale}."
    missing = f"No run has both. Records of scale {other}: {len(records)}; "
    return f"{missing}`python build.py run --scale {other}` makes them."


def _first(record: Record | None, metric: str) -> Measurement | None:
    known = (m for m in (record.measurements if record else ()) if m.metric == metric and m.provenance != "unavailable")
    return next(known, None)


def _text(measurement: Measurement | None) -> str:
    """Return value, interval or bound, verdict and provenance of a measurement as text."""
    if measurement is None:
        return DASH
    shown = headlines.shown(measurement)
    return f"{shown.text}, {shown.verdict}, {shown.provenance}"
