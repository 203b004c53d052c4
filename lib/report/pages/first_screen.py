"""The first screen of a run's page: decision, setting, six numbers, a forest plot, its trade-off among the other runs,
and the machine's noise and load, as plain values and two small charts for the template.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import summary
from lib.report.analysis.advice import Advice
from lib.report.analysis.noise import flips
from lib.report.figures.inline import forest_svg, trade_off_svg
from lib.report.figures.inline.forest_svg import ForestLine
from lib.report.pages import views
from lib.report.records import record as records
from lib.report.records.record import Record
from lib.report.records.setting import facts, stack
from lib.report.text import brief, commands
from lib.report.text.quantities import about, duration
from lib.report.text.sentence import subject
from lib.report.text.wording import one_line, signed, words

DECISIONS = {
    "use": "better",
    "use if": "mixed",
    "undecided": "inconclusive",
    "do not use": "worse",
    "not applicable": "unavailable",
}
HIDDEN = ("model", "scale", "effort", "device", "checkpoints", "random_weights", "text", "results", "history")
LONGEST = 28  # letters of a name with workload in the forest plot


def of(record: Record, out: Path) -> dict[str, Any]:
    """Return the values of a run's first screen; `out` is the folder of its page and of the same model's records."""
    measured = record.status == "ok"
    near = _of_model(out, record) if measured else []
    return {
        "sentence": summary.sentence(record),
        "decision": summary.decision(record) if measured else "",
        "decisions": [_decision(row, out) for row in summary.decisions(record)] if measured else [],
        "stack": stack.in_words(record) if measured else "",
        "setting": setting(record),
        "numbers": summary.numbers(record) if measured else [],
        "forest": forest(record) if measured else "",
        "trade_off": trade_off(record, near) if measured else None,
        "machine": summary.machine(record) if measured else [],
        "busy": summary.busy(record),
        "flips": flipped(record, out),
    }


def _decision(row: Advice, out: Path) -> dict[str, Any]:
    item = {"goal": row.goal, "decision": row.decision, "class": DECISIONS[row.decision], "reason": row.reason}
    command = commands.leading_to(row.command, commands.out_of(out))
    return item | {"command": command, "took": about(row.seconds) if command else ""}


def setting(record: Record) -> list[tuple[str, str]]:
    """Return a run's setting as (label, text): parameters, stack, scale, effort, weights, machine, date, duration."""
    own = [(name, value) for name, value in record.parameters.items() if name not in HIDDEN]
    shown = ", ".join(f"{words(name)} {value}" for name, value in own if value not in ("", [], None))
    rows = [
        ("Setting", one_line(shown, 160)),
        ("Stack", one_line(stack.in_words(record), 240)),
        ("Scale, effort", f"{record.scale}, {record.effort}"),
        ("Weights", "random: times and bytes are real, answers mean nothing" if _random_weights(record) else ""),
        ("Machine", facts.machine(record.environment)),
        ("Measured", facts.day(record.started)),
        ("Took", duration(record.seconds) if record.seconds else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _random_weights(record: Record) -> bool:
    """Return whether the real model was built without its weights; for other scales the page's notice says so."""
    return record.scale == "full" and bool(record.parameters.get("random_weights"))


def forest(record: Record) -> str:
    """Return the forest plot of the six numbers; empty where none has a ratio. Numbers of the same name are
    distinguished by their workloads, cut to LONGEST letters.
    """
    members, names = summary.chosen(record), [number.name for number in summary.numbers(record)]
    shown = [subject(m) if name == subject(m) else one_line(name, LONGEST) for m, name in zip(members, names)]
    return forest_svg.forest([line for m, name in zip(members, shown) if (line := _line(m, name))], "Changes")


def _line(measurement: Measurement, name: str = "") -> ForestLine | None:
    """Return a measurement as a line of the forest plot; None where there is no ratio."""
    if measurement.ratio is None:
        return None
    turn = 100.0 if measurement.higher_is_better else -100.0
    low, high = sorted((end - 1) * turn for end in measurement.ci) if measurement.ci else (None, None)
    floor = 100 * measurement.noise_floor if measurement.noise_floor else None
    value, state = (measurement.ratio - 1) * turn, summary.state(measurement)
    return ForestLine(name or subject(measurement), brief.outcome(measurement), value, low, high, floor, state)


def trade_off(record: Record, near: Sequence[Record]) -> dict[str, Any] | None:
    """Return the chart of quality against speed on this model, with this run's point marked, and its legend. None where
    this run has no point.
    """
    known = sorted({r.optimization: r for r in [*near, record]}.items())
    marks = {name: str(number) for number, (name, _) in enumerate(known, 1)}
    points = [point for name, run in known if (point := views.point(run, marks, own=name == record.optimization))]
    if not any(point.own for point in points):
        return None
    margin = 100 * (METRICS[views.QUALITY].margin or 0)
    svg = trade_off_svg.trade_off(points, f"Quality against speed, {record.model}", margin)
    return {"svg": svg, "own": marks[record.optimization], "legend": ", ".join(f"{p.mark} {p.name}" for p in points)}


def _of_model(out: Path, record: Record) -> list[Record]:
    """Return the other measured runs of the model at the same scale and effort; a chart never mixes efforts."""
    others = [path for path in sorted(out.glob(f"*--{record.model}.json")) if path.name != f"{record.stem}.json"]
    runs = [run for path in others if path.is_file() and (run := _read(path, path.stat().st_mtime_ns))]
    return [r for r in runs if r.status == "ok" and (r.scale, r.effort) == (record.scale, record.effort)]


@lru_cache(maxsize=256)
def _read(path: Path, modified_ns: int) -> Record | None:
    """Return a record, cached until its file changes; None where it is damaged."""
    try:
        return records.read(path)
    except UserError:
        return None


def flipped(record: Record, out: Path) -> list[dict[str, Any]]:
    """Return the verdicts that differ from the previous build's."""
    try:
        changed = flips.since_last(out, [record]).get(record.stem, {})
    except UserError:
        return []  # a history that cannot be read is reported when the build ends
    return [shown_flip(name, *change, record.verdict.words()[name]) for name, change in changed.items()]


def shown_flip(name: str, before: str, day: str, now: str) -> dict[str, Any]:
    """Return a changed verdict for the template."""
    text = f"{name} was {words(before)} on {day}, now {words(now)}"
    return {"name": name, "text": text, "before": signed(before), "contradicts": flips.contradicts(before, now)}
