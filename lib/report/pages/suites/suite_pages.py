"""The suites' reports as Markdown for a code host: tables, and figures as relative links.

Each function returns the text and its pictures by file name, for the folder next to it. Independent of how records and
curves are measured; `lib.report.pages.suites.suite_files` writes the files.
"""

import math

import pandas as pd

from lib.measure.metrics.catalogue import DIMENSIONS, METRICS, SCORE_MARGIN
from lib.report import tables
from lib.report.analysis import headlines, result_set, strength_curves
from lib.report.analysis.result_set import Results
from lib.report.figures import small_multiples, style
from lib.report.pages.suites.file_names import FILES
from lib.report.records.record import Record
from lib.report.records.rows import markdown
from lib.report.records.setting import facts, reproduce, stand_in
from lib.report.text import commands
from lib.report.text.quantities import duration, times
from lib.report.text.quantities import figures as digits
from lib.report.text.wording import label, one_line, signed, title, untagged, words

Pictures = dict[str, bytes]
LEGEND = (
    "▲ better · ▼ worse · = equivalent · ✓ maintained · ✗ not maintained · ○ not exercised · ? inconclusive · "
    "· informative. "
    "A dimension's verdict is that of its primary measurement, shown first; “but …”: another one got worse. "
    "A change is called better or worse only where its interval excludes zero and the effect exceeds both the margin "
    "and the noise floor. The noise floor comes from a copy of the baseline. A change must also survive the correction "
    "over all runs of the set: at most one false call in twenty (Benjamini and Hochberg)."
)


def comprehensive(results: Results, folder: str) -> tuple[str, Pictures]:
    """Return the report of every optimization on every model."""
    pictures: Pictures = {}
    parts = [
        "# Comprehensive optimization benchmark",
        _about(results),
        _counts(results),
        _conditions(results),
        "## Verdicts",
        LEGEND,
    ]
    parts.append(_verdicts(results))
    parts += ["## Headline numbers", "For speed, the gain over the baseline: above 1× is faster. For the rest, the "
              "change. In parentheses: the 95 % interval, or a score's bound and margin."]  # fmt: skip
    parts.append(_headlines(results.measured))
    frame = tables.across(results.measured, "prefill_tokens_per_second")
    if len(frame):
        shown = tables.extremes(frame)
        pictures["prefill.png"] = style.png(style.forest(shown, group="model", title="prefill rate"))
        verdicts = ", ".join(f"{count} {words(str(word))}" for word, count in frame["verdict"].value_counts().items())
        alt = f"Prefill rate of {len(frame)} runs with intervals: {verdicts}."
        if len(shown) < len(frame):
            alt += f" Only the {len(shown)} with the smallest and largest gains are drawn."
        parts += ["## Speed", _picture(alt, folder, "prefill")]
    points = tables.speed_and_quality(results.measured)
    if len(points):
        shown, note = tables.few(points, "label")
        drawn = small_multiples.trade_offs(
            shown, x_label="prefill rate: gain (×)", y_label="F1 (macro): change (points)",
            margin=(-100 * SCORE_MARGIN, 100 * SCORE_MARGIN),
        )  # fmt: skip
        pictures["quality_against_speed.png"] = style.png(drawn)
        verdicts = ", ".join(f"{count} {words(str(word))}" for word, count in points["verdict"].value_counts().items())
        alt = f"Change of F1 against the gain of prefill, {len(points)} runs; F1: {verdicts}.{note}"
        parts += ["## Quality against speed", _picture(alt, folder, "quality_against_speed")]
    parts += [
        "## In words",
        _sentences(results.records),
        "## By optimization",
        _aggregate(results),
        *_failures(results),
    ]
    parts += [*_again("comprehensive", results), _machine_readable("comprehensive")]
    return _text(parts), pictures


def enhanced(results: Results, folder: str) -> tuple[str, Pictures]:
    """Return the report on impact over strength: a figure and a table per optimization."""
    curves, short = strength_curves.curves(results.records), strength_curves.short(results.records)
    pictures: Pictures = {}
    parts = ["# Impact of each optimization over its strength", _about(results), _counts(results), _conditions(results)]
    parts.append(
        f"{len(curves)} runs have an impact curve; {len(short)} measured runs lack one with at least "
        f"{strength_curves.FEWEST} strengths" + (", listed at the end." if short else ".")
    )
    for name in dict.fromkeys(curve["optimization"] for curve in curves):
        members = [curve for curve in curves if curve["optimization"] == name]
        first = members[0]
        drawn, note = tables.few(_drawn(members), "model")
        parts += [f"## {title(name)}", f"{first['provenance'].capitalize()}: {first['source']}."]
        if len(drawn):
            figure = small_multiples.panels(drawn, x_label=first["x"], y_label=first["y"], log_y=_wide(drawn["value"]))
            pictures[f"{name}.png"] = style.png(figure)
            arms = ", ".join(dict.fromkeys(drawn["arm"]))
            ends = f"strengths {digits(drawn['strength'].min())} to {digits(drawn['strength'].max())}"
            alt = (
                f"{title(name)}: {first['y']} over {first['x']} for {len(members)} models, {ends}; lines: {arms}.{note}"
            )
            parts.append(_picture(alt, folder, name))
        parts.append(_points(members))
    if short:
        parts += ["## Without a curve", markdown(["run", "why"], short.items())]
    parts += [*_again("enhanced", results), _machine_readable("enhanced")]
    return _text(parts), pictures


def coverage(results: Results, folder: str) -> tuple[str, Pictures]:
    """Return the coverage report: which run is covered by which record."""
    lines = result_set.coverage(results)
    cells = {(line["optimization"], line["model"]): line for line in lines}
    head = ["optimization", *results.models]
    matrix = [
        [title(name), *(_link(cells[name, model], name, model) for model in results.models)]
        for name in results.optimizations
    ]
    detail = [
        [title(line["optimization"]), line["model"], words(line["status"]), *line["numbers"].values(),
         *line["provenance"].values(), line["controls"]]
        for line in lines
    ]  # fmt: skip
    columns = ["optimization", "model", "status", *DIMENSIONS, "measured", "derived", "estimated", "unavailable",
               "controls"]  # fmt: skip
    metrics = [
        [METRICS[name].dimension, label(name), *("✓" if model in models else "–" for model in results.models)]
        for name, models in result_set.comparable(results.measured).items()
    ]
    parts = [
        "# Coverage", _about(results), _counts(results), "## Which run is covered by which record",
        markdown(head, matrix), "## Numbers in each record",
        "By dimension: metrics with a number; by provenance: all metrics, including missing ones.",
        markdown(columns, detail), "## What can be compared across models",
        "A tick means that at least one record of the model has a number for the metric.",
        markdown(["dimension", "metric", *results.models], metrics), *_failures(results),
        *_again("coverage", results),
    ]  # fmt: skip
    return _text(parts), {}


def _about(results: Results) -> str:
    """Return the notice on proxy models and slices in italics; empty for real models."""
    text = stand_in.of_records(results.records)
    return f"*{untagged(text)}*" if text else ""


def _text(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(alt: str, folder: str, name: str) -> str:
    return f"![{alt.replace('[', '(').replace(']', ')')}]({folder}/{name}.png)"


def _again(command: str, results: Results) -> list[str]:
    line = commands.at(reproduce.of_set(command, results.scale), results.folder)
    return ["## Run again", f"```sh\n{line}\n```"]


def _machine_readable(kind: str) -> str:
    return f"For programs: [{FILES[kind][0]}]({FILES[kind][0]}). All runs: [index.html](index.html)."


def _counts(results: Results) -> str:
    summary = result_set.summary(results)
    parts = [f"{summary['ok']} of {summary['expected']} runs measured"]
    named = {
        "failed": summary["failed"],
        "not applicable": summary["not_applicable"],
        "damaged": len(summary["damaged"]),
    }
    named |= {"never run": len(summary["missing"]), "measured in part": len(summary["partial"])}
    return "; ".join([*parts, *(f"{number} {what}" for what, number in named.items() if number)]) + "."


def _conditions(results: Results) -> str:
    summary = result_set.summary(results)
    first, last = facts.day(summary["first_started"])[:10], facts.day(summary["last_started"])[:10]
    span = first if first == last else f"{first} to {last}"
    lines = [
        ("scale", results.scales), ("effort", ", ".join(summary["efforts"])),
        ("machine", "; ".join(summary["machines"])), ("measured", span), ("run time", duration(summary["seconds"])),
    ]  # fmt: skip
    return markdown(["", ""], [line for line in lines if line[1]])


def _link(cell: dict, optimization: str, model: str) -> str:
    if cell["status"] in ("missing", "damaged"):
        return signed(cell["status"])
    total = sum(cell["numbers"].values())
    text = f"{signed(cell['status'])}, {total} numbers" if cell["status"] == "ok" else signed(cell["status"])
    return f"[{text}]({optimization}--{model}.md)"


def _verdicts(results: Results) -> str:
    lines = []
    for name in results.optimizations:
        for model in results.models:
            record = results.of(name, model)
            status = "damaged" if f"{name}--{model}" in results.damaged else record.status if record else "missing"
            verdicts = [headlines.state(record, d) if record and status == "ok" else "" for d in DIMENSIONS]
            where = f"[{model}]({name}--{model}.md)" if record else model
            lines.append([title(name), where, signed(status), *verdicts])
    return markdown(["optimization", "model", "status", *DIMENSIONS], lines)


def _headlines(records: list[Record]) -> str:
    lines = []
    for record in records:
        cells = []
        for dimension in DIMENSIONS:
            shown = headlines.of(record, dimension)
            cells.append("; ".join(f"{number.what} {number.text}, {number.provenance}" for number in shown) or "–")
        lines.append([title(record.optimization), record.model, *cells])
    return markdown(["optimization", "model", *DIMENSIONS], lines)


def _sentences(records: list[Record]) -> str:
    lines = [[title(r.optimization), r.model, one_line(r.verdict.sentence or r.reason or "", 900)] for r in records]
    return markdown(["optimization", "model", "in words"], lines)


def _aggregate(results: Results) -> str:
    lines = [
        [title(line["optimization"]), _aggregated(line), str(len(line["models"])),
         times(line["geometric_mean_gain"]),
         f"{times(line['least'])} to {times(line['most'])}",
         ", ".join(f"{number} {words(word)}" for word, number in line["verdicts"].items())]
        for line in result_set.aggregate(results.measured)
        if METRICS[line["metric"]].margin is not None
    ]  # fmt: skip
    table = markdown(["optimization", "metric", "models", "mean gain", "range", "verdicts"], lines)
    about = "Geometric means, derived, over the models and a metric's workloads; a gain above 1 is better."
    return f"{about}\n\n{table}"


def _aggregated(line: dict) -> str:
    return label(line["metric"]) + (", estimated" if line["provenance"] == "estimated" else "")


def _failures(results: Results) -> list[str]:
    lines = [[r.stem, words(r.status), one_line(r.reason or "", 400)] for r in results.records if r.status != "ok"]
    lines += [[stem, "damaged", fault] for stem, fault in results.damaged.items()]
    lines += [[stem, "never run", ""] for stem in results.missing]
    lines += [[r.stem, "measured in part", ", ".join(r.dimensions)] for r in results.records if r.dimensions]
    return ["## What is missing", markdown(["run", "state", "why"], lines)] if lines else []


def _drawn(members: list[dict]) -> pd.DataFrame:
    rows = [
        {"model": curve["model"], "arm": arm} | {k: point[k] for k in ("strength", "value", "low", "high")}
        for curve in members
        for arm, points in curve["arms"].items()
        for point in points
        if point["value"] is not None
    ]
    frame = pd.DataFrame(rows, columns=["model", "arm", "strength", "value", "low", "high"])
    return frame.astype(dict.fromkeys(["strength", "value", "low", "high"], float))


def _wide(values: pd.Series) -> bool:
    """Return whether positive values span a range so wide that they need a logarithmic axis."""
    return bool((values > 0).all() and math.log10(values.max() / values.min()) > 1.5)


def _points(members: list[dict]) -> str:
    lines = []
    for curve in members:
        for arm, points in curve["arms"].items():
            for point in points:
                ends = "" if point["low"] is None else f"{digits(point['low'])} to {digits(point['high'])}"
                others = "; ".join(f"{name} {digits(value)}" for name, value in point["more"].items())
                value = "–" if point["value"] is None else digits(point["value"])
                lines.append([curve["model"], arm, digits(point["strength"]), value, ends, others])
    head = ["model", "arm", members[0]["x"], members[0]["y"], "95 % interval", "other numbers"]
    return f"<details><summary>The numbers</summary>\n\n{markdown(head, lines)}\n\n</details>"
