"""The results of one scale as Markdown tables with one metric per column, for `executed/README.md`.

A row per run. A cell has the verdict's sign, the change and its interval, as on every other page
(`lib.report.analysis.headlines`). The README's matrix uses the same cells, shortened. Knows no files.
"""

from collections.abc import Mapping, Sequence

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.digits import DASH
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import headlines
from lib.report.records.record import Record
from lib.report.records.rows import markdown
from lib.report.records.setting import facts, stand_in
from lib.report.records.verdicts import primary, verdict
from lib.report.text.sentence import SUBJECTS
from lib.report.text.wording import SIGNS, label, one_line, signed, title, untagged

HEADS = {
    "performance": ("Speed", "The gain over the baseline: above 1× is faster."),
    "accuracy": ("Quality", "The change against the baseline, with its bound and the margin."),
    "resources": ("Resources", "The change against the baseline: below 0 is less."),
    "efficiency": ("Efficiency", "The change against the baseline: below 0 is less."),
}
LEGEND = (
    "▲ better, ▼ worse, = equivalent, ✓ maintained, ✗ not maintained, ○ not exercised, ? inconclusive, ! invalid, "
    "· informative, not judged, – not available; “but …”: the verdict is the primary measurement's, and another "
    "one got worse. In parentheses: the 95 % interval, or the bound and the margin. In brackets: the workload, where "
    "a metric has several."
)


def ordered(records: Sequence[Record]) -> list[Record]:
    """Return the records sorted by optimization and model."""
    return sorted(records, key=lambda record: (record.optimization, record.model))


def columns(records: Sequence[Record], dimension: str) -> list[str]:
    """Return the headline metrics of a dimension for which some record has a change, in the order of HEADLINES."""
    known = {m.metric for record in records for m in record.measurements if _changed(m)}
    return [metric for metric in verdict.HEADLINES[dimension] if metric in known]


def _changed(m: Measurement) -> bool:
    return m.ratio is not None or (m.dimension == "accuracy" and m.optimized is not None and m.baseline is not None)


def cells(record: Record, metric: str) -> list[tuple[str, str]]:
    """Return (workload, text) of each measurement of `metric` with a change, in the record's order."""
    members = [m for m in record.measurements if m.metric == metric and _changed(m)]
    return [(m.workload, _text(m)) for m in members]


def _text(m: Measurement) -> str:
    """Return sign, change and interval of a measurement; an estimate is marked as one."""
    shown = headlines.shown(m)
    note = ", ".join(part for part in (shown.spread, m.provenance if m.provenance == "estimated" else "") if part)
    return f"{shown.sign} {shown.value}" + (f" ({note})" if note else "")


def name(metric: str) -> str:
    """Return the column header of a metric."""
    return SUBJECTS.get(metric) or label(metric)


def _cell(record: Record, metric: str) -> str:
    members = cells(record, metric)
    if len(members) < 2:
        return members[0][1] if members else DASH
    return "; ".join(f"{text} [{workload}]" for workload, text in members)


def status(record: Record) -> str:
    """Return the status of a run without a result; empty for a run with one."""
    return "" if record.status == "ok" else signed(record.status)


def section(records: Sequence[Record]) -> str:
    """Return the tables of a scale: verdicts, one table per dimension, the verdicts in words, and the conditions."""
    if not records:
        return "No results yet: run `python build.py`."
    records = ordered(records)
    parts = [about(records), conditions(records), LEGEND, "#### Verdicts", _verdicts(records)]
    for dimension in DIMENSIONS:
        metrics = columns(records, dimension)
        if metrics:
            heading, reading = HEADS[dimension]
            parts += [f"#### {heading}", reading, _table(records, metrics)]
    sentences = [[title(r.optimization), r.model, r.verdict.sentence or r.reason or ""] for r in records]
    in_words = markdown(["optimization", "model", "in words"], sentences)
    return "\n\n".join(
        [*filter(None, parts), f"<details><summary>Each run in words</summary>\n\n{in_words}\n\n</details>"]
    )


def about(records: Sequence[Record]) -> str:
    """Return the notice on proxy models and slices in italics; empty for real models."""
    text = stand_in.of_records(records)
    return f"*{untagged(text)}*" if text else ""


def _verdicts(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        words = [headlines.state(record, dimension) for dimension in DIMENSIONS]
        if status(record):
            words = [status(record), *[""] * (len(DIMENSIONS) - 1)]
        lines.append([title(record.optimization), record.model, *words])
    return markdown(["optimization", "model", *DIMENSIONS], lines)


def _table(records: Sequence[Record], metrics: Sequence[str]) -> str:
    lines = [
        [title(record.optimization), record.model, *(_cell(record, metric) for metric in metrics)]
        for record in records
        if record.status == "ok"
    ]
    return markdown(["optimization", "model", *map(name, metrics)], lines)


def conditions(records: Sequence[Record]) -> str:
    """Return scale, effort, machine and dates of the records as one line."""
    machines = sorted({facts.machine(r.environment) for r in records} - {""}) or ["not recorded"]
    days = sorted({facts.day(r.started)[:10] for r in records} - {""}) or ["not recorded"]
    scales, efforts = sorted({r.scale for r in records}), sorted({r.effort for r in records})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Scale {', '.join(scales)}; effort {', '.join(efforts)}; machine: {'; '.join(machines)}; measured: {span}."


def matrix(records: Sequence[Record]) -> str:
    """Return the README's matrix, optimizations by models with a short cell each, and the conditions below it.

    A cell has the gains in speed named by the second column, in bold where they are judged better or worse, and the
    sign of the verdict on quality.
    """
    if not records:
        return "No results yet: run `python build.py`."
    records = ordered(records)
    models = sorted({record.model for record in records})
    groups: dict[str, dict[str, Record]] = {}
    for record in records:
        groups.setdefault(record.optimization, {})[record.model] = record
    lines = [_matrix_line(stem, runs, models) for stem, runs in groups.items()]
    table = markdown(["optimization", "speed of", *models], lines)
    return f"{table}\n\n{one_line(conditions(records), 400)}"


def _matrix_line(stem: str, runs: Mapping[str, Record], models: Sequence[str]) -> list[str]:
    metrics = speeds(list(runs.values()))
    heads = ", ".join(map(name, metrics)) or DASH
    return [title(stem), heads, *(_short(runs.get(model), metrics) for model in models)]


def speeds(records: Sequence[Record]) -> list[str]:
    """Return the speed metrics of an optimization for the matrix: its first two headlines with a verdict."""
    judged = {m.metric for record in records for m in record.measurements if m.verdict != "informative"}
    shown = [m for m in columns(records, "performance") if m in judged and m not in primary.TWINS]
    return shown[: verdict.SHOWN["performance"]]


def _short(record: Record | None, metrics: Sequence[str]) -> str:
    if record is None:
        return DASH
    if status(record):
        return status(record)
    gains = [_gain(record, metric) for metric in metrics]
    return f"{', '.join(gains) or DASH} {signed(record.verdict.accuracy)[0]}"


def _gain(record: Record, metric: str) -> str:
    """Return the gain in `metric` on its first workload, in bold if it is judged better or worse."""
    members = cells(record, metric)
    if not members:
        return DASH
    sign, gain = members[0][1].split(" ")[:2]
    return f"**{gain}**" if sign in (SIGNS["better"], SIGNS["worse"]) else gain
