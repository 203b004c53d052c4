"""This run beside the last one: the headline numbers of a notebook's record, of the run before it here, and of the
last build.

A run in JupyterLab enters no result folder: its record is kept among the copies, for the next one. Judges nothing:
`build.py compare` does.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import UserError
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement
from lib.report import tables
from lib.report.analysis import headlines
from lib.report.records import record
from lib.report.records.record import Process, Record
from lib.report.records.setting import facts
from lib.report.text.wording import label, title

NOT_COMPARED = "Side by side, not compared: build.py compare judges two builds."


def record_of(namespace: Mapping[str, Any]) -> Record | None:
    """Return the record that a notebook made, None where it made none."""
    records = [value for name, value in namespace.items() if isinstance(value, Record) and not name.startswith("_")]
    return records[-1] if records else None


def keep(run: Record, path: Path, cell_seconds: Mapping[int, float]) -> Record | None:
    """Store the record of a run that has just ended; return the one that lay there, None without one."""
    before = stored(path)
    took = {str(index): round(seconds, 3) for index, seconds in sorted(cell_seconds.items())}
    total = sum(cell_seconds.values())
    began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=total)
    update = {
        "started": began.astimezone().isoformat(timespec="seconds"),
        "seconds": round(total, 2),
        "process": Process(cell_seconds=took, source="the clock of the kernel"),
    }
    record.write(run.model_copy(update=update), path)
    return before


def stored(path: Path) -> Record | None:
    """Return the record in a file, None where there is none that can be read."""
    try:
        run = record.read(path)
    except UserError:
        return None
    return run if run.status == "ok" else None


def show(run: Record, here: Record | None, built: Record | None) -> None:
    """Display the table of a run beside the last one here and that of the last build; either may be missing."""
    earlier = [(name, other) for name, other in (("last run here", here), ("last build", built)) if other]
    if not earlier:
        what = f"{title(run.optimization)} on {run.model}, scale {run.scale}"
        tables.show_text(f"This is the first run of {what}; the next one will stand beside it.")
        return
    caption = " ".join([*(difference(name, run, other) for name, other in earlier), NOT_COMPARED])
    tables.show(table(run, earlier), caption)


def table(run: Record, earlier: Sequence[tuple[str, Record]]) -> pd.DataFrame:
    """Return a row per headline number: dimension, metric, this run, and each of the earlier ones by its name."""
    lines = []
    for dimension in DIMENSIONS:
        for m in headlines.chosen(run.measurements, dimension):
            line = {"dimension": dimension, "metric": f"{label(m.metric)} [{m.workload}]"}
            line["this run"] = headlines.shown(m).text
            lines.append(line | {name: _same(other, m) for name, other in earlier})
    return pd.DataFrame(lines, columns=["dimension", "metric", "this run", *(name for name, _ in earlier)])


def _same(other: Record, m: Measurement) -> str:
    measurement = next((o for o in other.measurements if (o.metric, o.workload) == (m.metric, m.workload)), None)
    return headlines.shown(measurement).text if measurement else "–"


def difference(name: str, run: Record, other: Record) -> str:
    """Return when the other run was, and what it did otherwise, as a sentence."""
    pairs = [("effort", run.effort, other.effort), ("machine", *map(_machine, (run, other)))]
    names = dict.fromkeys([*run.parameters, *other.parameters])
    both = [key for key in names if key in run.parameters and key in other.parameters]
    pairs += [(key, run.parameters[key], other.parameters[key]) for key in both if key != "effort"]
    changed = [f"{what} {theirs} (now {ours})" for what, ours, theirs in pairs if ours != theirs]
    what = f" with {', '.join(changed)}" if changed else ", set alike"
    when = facts.day(other.started)
    return f"{name[:1].upper()}{name[1:]}{f' ({when})' if when else ''}{what}."


def _machine(run: Record) -> str:
    return facts.machine(run.environment) or "unknown"
