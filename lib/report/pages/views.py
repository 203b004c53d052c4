"""The content of the index's tabs: quality against speed, ranks, curves, provenance of the numbers.

Plain values for the template, computed from a result set. The only markup is that of the charts.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import ranking
from lib.report.analysis.result_set import Results
from lib.report.figures.inline import trade_off_svg
from lib.report.figures.inline.trade_off_svg import TradeOff
from lib.report.records.record import Record
from lib.report.records.verdicts import verdict
from lib.report.text import sentence
from lib.report.text.quantities import counted, times
from lib.report.text.wording import label, one_line, title

KINDS = ("measured", "derived", "estimated", "unavailable")
WORST_FIRST = ("invalid", "not_maintained", "inconclusive", "not_exercised", "unavailable")
JUDGED = ("better", "worse", "equivalent")
SPEED, QUALITY = "prefill_tokens_per_second", "f1_macro"
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def pareto(results: Results) -> dict[str, Any] | None:
    """Return the charts of quality against speed: means over all models, and one chart per model.

    Speed is the prefill rate; for an optimization without one (such as a server's policy) it is the first speed
    headline, named in the legend. Runs without a point are listed.
    """
    marks = _marks(results)
    single = {
        model: [p for r in results.measured if r.model == model and (p := point(r, marks))] for model in results.models
    }
    if not any(single.values()):
        return None
    margin = 100 * (METRICS[QUALITY].margin or 0)
    points_by_title = {"All models, means": means(results), **single}
    drawn = [
        {
            "title": name,
            "svg": trade_off_svg.trade_off(points, name, margin),
            "front": trade_off_svg.front(points, margin),
        }
        for name, points in points_by_title.items()
        if points
    ]
    absent = [
        f"{title(r.optimization)} on {r.model}" for r in results.measured if r.model in single and not _numbers(r)
    ]
    about = {"speed": label(SPEED), "quality": label(QUALITY), "absent": absent}
    return {"charts": drawn, "legend": legend(results)} | about


def means(results: Results) -> list[TradeOff]:
    """Return a point per optimization: its mean over the models."""
    marks = _marks(results)
    return [point for name in results.optimizations if (point := _mean(name, results, marks))]


def legend(results: Results) -> list[tuple[str, str, str]]:
    """Return (mark, title, speed metric if it is not the prefill rate) of each optimization."""
    return [(mark, _titled(name, results), _other_speed(name, results)) for name, mark in _marks(results).items()]


def _titled(name: str, results: Results) -> str:
    """Return an optimization's title, with its number of models if others have a point on more of them."""
    drawn = {(r.optimization, r.model) for r in results.measured if _numbers(r)}
    own, every = sum(pair[0] == name for pair in drawn), len({model for _, model in drawn})
    return title(name) if own in (0, every) else f"{title(name)}, {own} of {counted(every, 'model')}"


def _marks(results: Results) -> dict[str, str]:
    return {name: str(number) for number, name in enumerate(results.optimizations, 1)}


def _other_speed(name: str, results: Results) -> str:
    """Return the labels of an optimization's speed metrics other than the prefill rate; empty if there are none."""
    drawn = [both[0].metric for r in results.measured if r.optimization == name and (both := _numbers(r))]
    return ", ".join(label(metric) for metric in dict.fromkeys(drawn) if metric != SPEED)


def _numbers(record: Record) -> tuple[Measurement, Measurement] | None:
    """Return the measurements of speed and quality for a record's point; None where one is missing."""
    members = [m for m in record.measurements if m.ratio is not None and m.verdict != "invalid"]
    timed = [m for m in members if m.dimension == "performance" and sentence.gain(m)[0] is not None]
    speed = next((m for m in timed if m.metric == SPEED), None) or next(
        (m for m in verdict.headline(timed, "performance") if m.metric in verdict.HEADLINES["performance"]), None
    )
    quality = next((m for m in members if m.metric == QUALITY), None)
    return None if speed is None or quality is None else (speed, quality)


def point(record: Record, marks: dict[str, str], own: bool = False) -> TradeOff | None:
    """Return a record's point, None where speed or quality is missing; `own` marks the run that a page is about."""
    both = _numbers(record)
    if both is None:
        return None
    speed, quality = both
    scale = 100 * (quality.baseline or 1)
    y_low, y_high = ((end - 1) * scale for end in quality.ci) if quality.ci else (None, None)
    x, x_low, x_high = sentence.gain(speed)
    if x is None or quality.ratio is None:
        return None
    mark, name, state = marks[record.optimization], title(record.optimization), record.verdict.accuracy
    judged = speed.verdict in JUDGED and speed.provenance != "estimated"
    y = (quality.ratio - 1) * scale
    return TradeOff(mark, name, x, y, x_low, x_high, y_low, y_high, state, own, judged)


def _mean(name: str, results: Results, marks: dict[str, str]) -> TradeOff | None:
    """Return the mean over the models; its spread is their range, its state the worst of theirs. It is judged if the
    speed of at least one model is, and if it is over all models: a mean over fewer cannot be compared.
    """
    points = [p for r in results.measured if r.optimization == name and (p := point(r, marks))]
    if not points:
        return None
    x = ranking.geometric_mean([p.x for p in points])
    y = sum(p.y for p in points) / len(points)
    states = {p.state for p in points}
    state = next((s for s in WORST_FIRST if s in states), "maintained")
    xs, ys = [p.x for p in points], [p.y for p in points]
    named = _titled(name, results)
    judged = any(p.judged for p in points) and named == title(name)
    ends = min(xs), max(xs), min(ys), max(ys)
    return TradeOff(marks[name], named, x, y, *ends, state, judged=judged, of_several=len(points) > 1)


def rankings(results: Results) -> list[dict[str, Any]]:
    """Return the rankings over all models and per model: the rank of each optimization in each metric."""
    sets = [("All models", results.measured)]
    sets += [(model, [r for r in results.measured if r.model == model]) for model in results.models]
    return [ranked for name, records in sets if (ranked := _ranked(name, records))]


def _ranked(name: str, records: Sequence[Record]) -> dict[str, Any] | None:
    models = len({r.model for r in records})
    by_metric = {metric: {p.optimization: p for p in ranking.places(records, metric)} for metric in ranking.METRICS}
    metrics = [metric for metric, places in by_metric.items() if places]
    if not metrics:
        return None
    order = [p for metric in metrics for p in by_metric[metric]]
    rows = []
    for optimization in dict.fromkeys(order):
        cells = []
        for metric in metrics:
            place = by_metric[metric].get(optimization)
            spread = f"{place.low}–{place.high}" if place and place.low != place.high else ""
            gain = times(place.gain) if place else ""
            fewer = counted(place.models, "model") if place and place.models < models else ""
            called = f"judged in {place.called} of {place.models}" if place and place.called < place.models else ""
            cell = {"rank": place.rank if place else None, "spread": spread, "gain": gain, "models": fewer}
            cells.append(cell | {"called": called})
        rows.append((title(optimization), cells))
    heads = [
        {"text": label(metric), "provenance": ", ".join(sorted({p.provenance for p in by_metric[metric].values()}))}
        for metric in metrics
    ]
    return {"title": name, "heads": heads, "rows": rows}


def provenance(results: Results) -> dict[str, Any] | None:
    """Return the counts of measured, derived, estimated and unavailable numbers of each run, and their sources."""
    if not results.measured:
        return None
    counts: list[tuple[str, str, str, list[int]]] = []
    kinds: dict[str, dict[tuple[str, str], set[str]]] = {kind: {} for kind in KINDS}
    for record in results.measured:
        every: list[str] = [m.provenance for m in record.measurements]
        counts.append((record.stem, title(record.optimization), record.model, [every.count(kind) for kind in KINDS]))
        for m in record.measurements:
            about = m.reason if m.provenance == "unavailable" else m.source
            key = (label(m.metric), one_line(re.sub(r"\d[\d,.]*", "…", about or ""), 160))
            kinds[m.provenance].setdefault(key, set()).add(record.stem)
    total = [sum(numbers[at] for *_, numbers in counts) for at in range(len(KINDS))]
    sources = {
        kind: sorted((metric, about, len(stems)) for (metric, about), stems in kinds[kind].items()) for kind in KINDS
    }
    return {"kinds": KINDS, "total": list(zip(KINDS, total)), "counts": counts, "sources": sources}


def curves(folder: Path) -> list[tuple[str, str]]:
    """Return the pictures of the impact report in the folder, as (alternative text, path)."""
    path = folder / "enhanced_optimization_impact_benchmark_report.md"
    if not path.is_file():
        return []
    return [(alt, at) for alt, at in PICTURE.findall(path.read_text(encoding="utf-8")) if (folder / at).is_file()]
