"""A notebook's run next to earlier ones: headline numbers of its record, of the previous run here, and of the last
build.

A run in JupyterLab enters no result folder: its record is stored next to the working copies, for the next run. Does
not judge differences; `build.py compare` does.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
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

NOT_COMPARED = "Shown side by side, not judged: build.py compare judges two builds."


def record_of(namespace: Mapping[str, Any]) -> Record | None:
    """Return the last record among a notebook's public variables, None where there is none."""
    records = [value for name, value in namespace.items() if isinstance(value, Record) and not name.startswith("_")]
    return records[-1] if records else None


def keep(run: Record, path: Path, cell_seconds: Mapping[int, float]) -> Record | None:
    """Store the record of a run that has just ended at `path`; return the previous record there, None without one."""
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
    """Return the record in the file `path`, None where it cannot be read or its status is not ok."""
    try:
        run = record.read(path)
    except UserError:
        return None
    return run if run.status == "ok" else None


def show(run: Record, here: Record | None, built: Record | None) -> None:
    """Display the headline numbers of a run next to those of the last run here and of the last build, where known."""
    earlier = [(name, other) for name, other in (("last run here", here), ("last build", built)) if other]
    if not earlier:
        name = f"{title(run.optimization)} on {run.model}, scale {run.scale}"
        tables.show_text(f"This is the first run of {name}; there is no earlier one to show next to it.")
        return
    caption = " ".join([*(difference(name, run, other) for name, other in earlier), NOT_COMPARED])
    tables.show(table(run, earlier), caption)


def table(run: Record, earlier: Sequence[tuple[str, Record]]) -> pd.DataFrame:
    """Return a row per headline number: dimension, metric, this run, and a column per earlier run, by its name."""
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


def as_requested(run: Record, namespace: Mapping[str, Any], declared: Iterable[str]) -> Record:
    """Return a record with the values of the `declared` parameters in the notebook's `namespace`, as builds store them;
    notebooks store the values that follow from them.
    """
    requested = {name: namespace[name] for name in declared if name in namespace}
    return run.model_copy(update={"parameters": requested or run.parameters})


def difference(name: str, run: Record, other: Record) -> str:
    """Return a sentence on an earlier run: its time, and the settings in which it differs from this one."""
    pairs = [("effort", run.effort, other.effort), ("machine", *map(_machine, (run, other)))]
    names = dict.fromkeys([*run.parameters, *other.parameters])
    both = [key for key in names if key in run.parameters and key in other.parameters]
    pairs += [(key, run.parameters[key], other.parameters[key]) for key in both if key != "effort"]
    changed = [f"{key} {theirs} (now {ours})" for key, ours, theirs in pairs if ours != theirs]
    settings = f" with {', '.join(changed)}" if changed else ", same settings"
    when = facts.day(other.started)
    return f"{name[:1].upper()}{name[1:]}{f' ({when})' if when else ''}{settings}."


def _machine(run: Record) -> str:
    return facts.machine(run.environment) or "unknown"
