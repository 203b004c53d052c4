"""Interactive figures of a result set: the reader chooses model, metrics, and the margin within which quality is kept.

An executed notebook shows each figure once, for all models and the metrics passed in. Where a person has the notebook
open, widgets appear below that figure, and the figure they select below them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lib.measure.metrics.catalogue import METRICS, SCORE_MARGIN, metric
from lib.measure.metrics.measurement import Measurement
from lib.report import tables
from lib.report.analysis import advice
from lib.report.analysis.noise import discoveries
from lib.report.figures import small_multiples, style
from lib.report.records.record import Record
from lib.report.text import brief
from lib.report.text.quantities import counted
from lib.report.text.wording import label, title

ALL = "all models"
MOST_NAMED = 6  # runs


def person_present() -> bool:
    """Return whether a person has this kernel's notebook open: a Jupyter server sets JPY_SESSION_NAME, papermill and
    nbconvert do not.
    """
    return bool(os.environ.get("JPY_SESSION_NAME"))


def measured(records: Sequence[Record]) -> list[Record]:
    """Return the records with a result, their verdicts corrected over the whole set, so that the text agrees with the
    figures.
    """
    return [run for run in discoveries.settled(records) if run.status == "ok"]


def forest(records: Sequence[Record], name: str) -> None:
    """Display the metric `name` of all records with its intervals; let a person choose model and metric below. Verdicts
    are corrected over the whole set.
    """
    records = discoveries.settled(records)
    draw = functools.partial(draw_forest, records)
    draw(ALL, name)
    if person_present():
        offer(draw, model=_models(records), metric=_metrics(_judged(records), name))


def trade_offs(records: Sequence[Record], speed: str, quality: str) -> None:
    """Display quality against speed for all records; let a person choose model, both metrics and the margin below.
    Verdicts are corrected over the whole set.
    """
    records = discoveries.settled(records)
    draw_trade_offs(records, ALL, speed, quality, None)
    if not person_present():
        return
    scores = [name for name in _in_order(records) if METRICS[name].unit == "share" and METRICS[name].margin]
    judged = [name for name in _judged(records) if METRICS[name].dimension != "accuracy"]
    metrics = {"speed": _metrics(judged, speed, "gain"), "quality": _metrics(scores, quality, "quality")}
    draw = functools.partial(_chosen_trade_offs, records)
    offer(draw, model=_models(records), **metrics, margin=_margin(quality))


def draw_forest(records: Sequence[Record], model: str, metric: str) -> None:
    """Display one metric of the records of `model` (or of ALL) with its intervals and noise floors."""
    runs = _of(records, model)
    frame = tables.across(runs, metric)
    zeros = sum(m.metric == metric and m.ratio == 0 for run in runs for m in run.measurements)
    fell = f" {counted(zeros, 'measurement')} fell to 0 and cannot be drawn on an axis of ratios." if zeros else ""
    shown = tables.extremes(frame)
    if frame.empty:
        tables.show_text(f"{label(metric)}:{fell}" if zeros else f"No record has {label(metric)}.")
        return
    figure = style.forest(shown, group="model", title=label(metric))
    better = (frame["verdict"] == "better").sum()
    drawn = f"{label(metric)}: {len(shown)} of {counted(len(frame), 'measurement')}"
    style.show(figure, f"{drawn}; {better} of all are better.{fell}")


def draw_trade_offs(records: Sequence[Record], model: str, speed: str, quality: str, margin: float | None) -> None:
    """Display quality against speed; `margin` is in points for a share, else in percent; None: the metric's own."""
    points = tables.speed_and_quality(_of(records, model), speed, quality)
    if points.empty:
        tables.show_text(f"No record has both {speed} and {quality}.")
        return
    own = metric(quality)
    width = 100 * own.margin if margin is None and own.margin else margin
    unit = "points" if own.unit == "share" else "%"
    shown, rest = tables.few(points, "label")
    y_label = f"{label(quality)}: change ({unit})"
    figure = small_multiples.trade_offs(
        shown,
        x_label=f"{label(speed)}: gain (×)",
        y_label=y_label,
        margin=(-width, width) if width else None,
    )
    elsewhere = lost_elsewhere(_of(records, model), quality)
    style.show(figure, f"{y_label} against speed of {counted(len(points), 'run')}.{elsewhere}{rest}")


def lost_elsewhere(records: Iterable[Record], quality: str) -> str:
    """Return a sentence on how many runs lose a score other than `quality` beyond its margin; empty where none."""
    scores = [first(run, quality) for run in records if run.verdict.accuracy == "not_maintained"]
    lost = sum(score is not None and score.verdict != "not_maintained" for score in scores)
    lose = "loses" if lost == 1 else "lose"
    return f" {counted(lost, 'run')} {lose} another score beyond its margin." if lost else ""


def _chosen_trade_offs(records: Sequence[Record], model: str, speed: str, quality: str, margin: float) -> None:
    draw_trade_offs(records, model, speed, quality, margin if METRICS[quality].unit == "share" else None)
    tables.show_text(within_margin(_of(discoveries.settled(records), model), speed, quality, margin))


def within_margin(records: Iterable[Record], speed: str, quality: str, margin: float) -> str:
    """Return a text: which runs keep `quality` within `margin` points, and which of these are better in `speed`.

    A run keeps it if the one-sided 95 % bound of its change lies within the margin, as in its own verdict. A score that
    is not a share, such as perplexity, has no points: it is judged by its own margin, and the text says so.
    """
    limit = f"within {margin:g} points" if METRICS[quality].unit == "share" else "within its own margin"
    words, better = [], []
    for run in records:
        gained, score = first(run, speed), first(run, quality)
        if gained is None or score is None:
            continue
        word = advice.judged_with(score, margin / 100)
        words.append("maintained" if word == "better" else word)  # a score that rose is kept
        if words[-1] == "maintained" and gained.verdict == "better":
            better.append(f"{title(run.optimization)} on {run.model}")
    lost, maintained = words.count("not_maintained"), words.count("maintained")
    summary = f"{label(quality)} {limit}: {maintained} of {counted(len(words), 'run')} keep it; "
    summary += f"lost: {lost}, cannot tell: {len(words) - maintained - lost}."
    if not better:
        return f"{summary} No run that keeps it is better in {label(speed)}."
    more = [f"{len(better) - MOST_NAMED} more"] if len(better) > MOST_NAMED else []
    named = brief.joined([*better[:MOST_NAMED], *more], f"Kept, and better in {label(speed)}:")
    return f"{summary} {named}"


def first(run: Record, name: str) -> Measurement | None:
    """Return the first valid measurement of the metric `name` that has a ratio (0 counts); None if there is none."""
    known = (m for m in run.measurements if m.metric == name and m.ratio is not None)
    return next((m for m in known if m.verdict != "invalid"), None)


def offer(draw: Callable[..., None], **controls: Any) -> Any:
    """Display widgets, and below them the output of `draw` for their values, on every change; return the box."""
    import ipywidgets  # slow to import, and only needed when a person is present
    from IPython.display import display

    drawn = ipywidgets.Output()

    def redraw(_: Any) -> None:
        with drawn:
            drawn.clear_output(wait=True)
            draw(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(redraw, names="value")
    box = ipywidgets.VBox([ipywidgets.HTML("Choose for yourself:"), ipywidgets.HBox([*controls.values()]), drawn])
    box.children[1].layout.flex_flow = "row wrap"
    display(box)
    return box


def _models(records: Sequence[Record]) -> Any:
    import ipywidgets

    return ipywidgets.Dropdown(options=[ALL, *sorted({run.model for run in records})], value=ALL, description="model")


def _metrics(names: Sequence[str], chosen: str, description: str = "metric") -> Any:
    import ipywidgets

    listed = [*names] if chosen in names else [chosen, *names]
    return ipywidgets.Dropdown(options=[(label(name), name) for name in listed], value=chosen, description=description)


def _margin(quality: str) -> Any:
    import ipywidgets

    own = metric(quality)
    value = 100 * (own.margin or 0) if own.unit == "share" else 100 * SCORE_MARGIN
    return ipywidgets.BoundedFloatText(value=value, min=0, max=100, step=0.5, description="margin, pts")


def _of(records: Iterable[Record], model: str) -> list[Record]:
    return [run for run in records if model in (ALL, run.model)]


def _in_order(records: Iterable[Record]) -> list[str]:
    """Return the metrics for which at least one record has a ratio, in the catalogue's order."""
    known = {m.metric for run in records for m in run.measurements if m.ratio}
    return [name for name in METRICS if name in known]


def _judged(records: Iterable[Record]) -> list[str]:
    return [name for name in _in_order(records) if METRICS[name].margin is not None]
