"""Writes `advice.html` of a result folder: what to use on which model for which goal, with a filter in plain script.

The decisions are those of `lib.report.analysis.advice`, computed here for several margins of quality, so that the page
needs no rule of its own and works from a disk. Without script every decision at the usual margin is shown.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lib.files import write_atomically
from lib.report.analysis import advice
from lib.report.analysis.advice import Advice
from lib.report.analysis.noise import discoveries
from lib.report.pages.html import TEMPLATES
from lib.report.records import stand_in
from lib.report.records.record import Record
from lib.report.text.quantities import figures
from lib.report.text.sentence import gain, ratio
from lib.report.text.wording import label, title

NAME = "advice.html"
MARGINS = (0.01, 0.02, 0.05, 0.10)
DECISIONS = {"use": "better", "undecided": "inconclusive", "do not use": "worse", "not applicable": "unavailable"}


def write(folder: Path, records: Sequence[Record]) -> Path:
    """Write the page from the records; return its path. Raises OSError."""
    pages = {path.name for path in Path(folder).glob("*--*.html")}
    return write_atomically(Path(folder) / NAME, text(records, pages))


def text(records: Sequence[Record], pages: Collection[str] = ()) -> str:
    """Return the page; the verdicts are those that hold for all records together."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    records = discoveries.settled(records)
    models = sorted({record.model for record in records})
    scales = sorted({record.scale for record in records})
    return environment.get_template("advice.html.j2").render(
        rows=[row for model in models for keep in MARGINS for row in rows(records, model, keep)],
        models=models,
        goals=list(advice.GOALS),
        margins=[(keep, f"{100 * keep:g} points") for keep in MARGINS],
        usual=advice.KEEP,
        pages=pages,
        scales=scales,
        about=" ".join(stand_in.several(s, stand_in.sizes(r for r in records if r.scale == s)) for s in scales),
        title="What to use on which model" + (", from stand-ins" if stand_in.PROXY in scales else ""),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "advice.js").read_text(encoding="utf-8"),
    )


def rows(records: Sequence[Record], model: str, keep: float) -> list[dict[str, Any]]:
    """Return the decisions on one model at one margin as the template shows them."""
    goals = [advice.Goal(name) for name in advice.GOALS]
    return [_row(model, keep, item) for item in advice.advise(records, model, goals, keep)]


def _row(model: str, keep: float, item: Advice) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model,
        "goal": item.goal,
        "keep": f"{keep:g}",
        "decision": item.decision,
        "class": DECISIONS[item.decision],
        "optimization": title(item.optimization),
        "href": f"{item.optimization}--{model}.html",
        "reason": item.reason,
        "command": item.command,
        "numbers": "",
        "where": "",
        "quality": ", ".join(_score(m) for m in item.quality),
    }
    if item.evidence:
        shown, ends = ratio(*gain(item.evidence.measurement))
        row["numbers"] = f"{label(item.evidence.measurement.metric)} {shown}" + (f" ({ends})" if ends else "")
        row["where"] = item.evidence.where
    return row


def _score(measured: Any) -> str:
    name = f"{label(measured.metric)} {measured.verdict.replace('_', ' ')}"
    if measured.baseline is None or measured.optimized is None:
        return name
    return f"{name} ({figures(measured.baseline)} → {figures(measured.optimized)})"
