"""Tidy tables for notebooks and figures, computed from records.

`tidy` returns numbers, one row per measurement, for figures and further computation; `measurements` returns the same as
text with interval, noise floor, MDE, verdict and provenance. `show` displays any frame so that it reads well in
JupyterLab, HTML and Markdown. Knows nothing of how numbers are measured.
"""

import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lib.measure.metrics.catalogue import DIMENSIONS, METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import headlines
from lib.report.analysis.noise import discoveries
from lib.report.records import refutation, relation, rows
from lib.report.records.record import Control, Record
from lib.report.records.refutation import Refutation
from lib.report.text.quantities import duration
from lib.report.text.sentence import gain
from lib.report.text.wording import label, title, untagged, words

Source = Record | Iterable[Measurement]
TIDY = (
    "metric", "label", "workload", "dimension", "unit", "higher_is_better", "baseline", "optimized", "ratio", "low",
    "high", "gain", "gain_low", "gain_high", "n", "noise_floor", "mde", "verdict", "provenance", "source", "reason",
    "predicted", "realised",
)  # fmt: skip
OWN = tuple(name for name in TIDY if name not in ("label", "low", "high", "gain", "gain_low", "gain_high"))
RUN = ("optimization", "model", "scale", "effort")
MOST_LINES = 400  # that `show` displays; a page with thousands of them opens slowly and is not read
MOST_POINTS = 60  # that a figure with a line for each can hold
MOST_PANELS = 12  # of a figure with a panel for each model


def _of(source: Source) -> list[Measurement]:
    members = source.measurements if isinstance(source, Record) else list(source)
    return sorted(members, key=lambda m: DIMENSIONS.index(m.dimension))


def tidy(source: Source) -> pd.DataFrame:
    """Return one row of numbers per measurement (columns `TIDY`); `gain` is the ratio turned so that above 1 is
    better.
    """
    return _frame(_lines(source), TIDY)


def _all_lines(records: Iterable[Record], keep: Callable[[Measurement], bool] = lambda _: True) -> list[dict]:
    """Return the rows of several records; all go into one frame in the end, because a frame for each takes long."""
    return [{name: getattr(r, name) for name in RUN} | line for r in records for line in _lines(r, keep)]


def _lines(source: Source, keep: Callable[[Measurement], bool] = lambda _: True) -> list[dict]:
    members = _of(source)
    times = Counter(m.metric for m in members)
    lines = []
    for m in filter(keep, members):
        name = label(m.metric) if times[m.metric] == 1 else f"{label(m.metric)} [{m.workload}]"
        low, high = m.ci or (None, None)
        line = {column: getattr(m, column) for column in OWN} | {"label": name, "low": low, "high": high}
        lines.append(line | dict(zip(("gain", "gain_low", "gain_high"), gain(m))))
    return lines


def _frame(lines: Sequence[dict], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(lines, columns=list(columns))
    numbers = ["baseline", "optimized", "ratio", "low", "high", "gain", "gain_low", "gain_high", "noise_floor", "mde"]
    return frame.astype(dict.fromkeys([*numbers, "predicted", "realised"], float))


def measurements(source: Source, dimension: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the measurements as text, one row each: values with units, interval, noise floor, MDE, verdict,
    provenance.
    """
    lines = [item for item in rows.rows(_of(source)) if dimension in (None, item["dimension"])]
    chosen = list(columns or (("dimension", *rows.COLUMNS) if dimension is None else rows.COLUMNS))
    return pd.DataFrame(lines, columns=chosen)


def sources(source: Source) -> pd.DataFrame:
    """Return where each number comes from: metric, workload, provenance, source, and why one is missing."""
    return pd.DataFrame(rows.rows(_of(source)), columns=["metric", "workload", "provenance", "source", "reason"])


def provenance(records: Iterable[Record]) -> pd.DataFrame:
    """Return how many numbers of each record are measured, derived, estimated and unavailable."""
    kinds = ("measured", "derived", "estimated", "unavailable")
    lines = [
        {"optimization": title(r.optimization), "model": r.model}
        | {kind: sum(m.provenance == kind for m in r.measurements) for kind in kinds}
        for r in records
    ]
    return pd.DataFrame(lines, columns=["optimization", "model", *kinds])


def matrix(records: Iterable[Record]) -> pd.DataFrame:
    """Return a line per record: status or the four verdicts in signs and words, duration, day.

    The words are those that hold for all these records together (`lib.report.analysis.noise.discoveries`).
    """
    lines = []
    for record in discoveries.settled(list(records)):
        line = {"optimization": title(record.optimization), "model": record.model, "status": words(record.status)}
        line |= {name: headlines.state(record, name) if record.status == "ok" else "" for name in DIMENSIONS}
        lines.append(line | {"took": duration(record.seconds), "day": (record.started or "")[:10]})
    return pd.DataFrame(lines, columns=["optimization", "model", "status", *DIMENSIONS, "took", "day"])


def sentences(records: Iterable[Record]) -> pd.DataFrame:
    """Return the computed sentence of each record."""
    lines = [
        [title(record.optimization), record.model, record.verdict.sentence or record.reason]
        for record in discoveries.settled(list(records))
    ]
    return pd.DataFrame(lines, columns=["optimization", "model", "in words"])


def coverage(records: Sequence[Record]) -> pd.DataFrame:
    """Return in how many records of each model a metric has a number: what can be compared across models."""
    known = (dict.fromkeys(m.metric for m in r.measurements if m.provenance != "unavailable") for r in records)
    pairs = [(metric, r.model) for r, metrics in zip(records, known) for metric in metrics]  # each once a record
    frame = pd.DataFrame(pairs, columns=["metric", "model"])
    counts = pd.crosstab(frame["metric"], frame["model"]).astype(int) if len(frame) else pd.DataFrame()
    counts = counts.reindex([name for name in METRICS if name in counts.index])
    lines = [{"dimension": METRICS[name].dimension, "metric": label(name)} for name in counts.index]
    return pd.concat([pd.DataFrame(lines, columns=["dimension", "metric"]), counts.reset_index(drop=True)], axis=1)


def missing(records: Iterable[Record]) -> pd.DataFrame:
    """Return the metrics that are unavailable, with the reason and the number of records."""
    frame = _frame(_all_lines(records, lambda m: m.provenance == "unavailable"), (*RUN, *TIDY))
    counts = frame.groupby(["dimension", "label", "reason"], sort=True).size().reset_index(name="records")
    return counts.rename(columns={"label": "metric"})


def across(records: Iterable[Record], metric: str) -> pd.DataFrame:
    """Return one metric of several records for `figures.forest(frame, group="model")`, labelled by optimization."""
    frame = _frame(_all_lines(records, lambda m: m.metric == metric), (*RUN, *TIDY))
    frame = frame[frame["gain"].notna()]
    several = frame.duplicated(["optimization", "model"], keep=False)
    names = frame["optimization"].map(title)
    return frame.assign(label=names.where(~several, names + " [" + frame["workload"] + "]"))


def extremes(frame: pd.DataFrame, column: str = "gain", most: int = MOST_POINTS) -> pd.DataFrame:
    """Return the frame, or of one with more than `most` rows those with the least and the largest values, in its
    order.
    """
    ranked = frame[column].sort_values(kind="stable").index
    half = most // 2
    return frame if len(frame) <= most else frame.loc[frame.index.isin([*ranked[:half], *ranked[-half:]])]


def few(frame: pd.DataFrame, column: str, most: int = MOST_PANELS) -> tuple[pd.DataFrame, str]:
    """Return the rows of the first `most` names in a column, and a sentence that says so where there are more."""
    names = list(dict.fromkeys(frame[column]))
    if len(names) <= most:
        return frame, ""
    return frame[frame[column].isin(names[:most])], f" Drawn are the first {most} of {len(names)}."


def controls(arms: Iterable[Control], metric: str) -> pd.DataFrame:
    """Return one metric of each control as `arm`, `value`, `low`, `high` in the metric's unit, for `figures.bars`."""
    lines = []
    for control in arms:
        for member in (m for m in control.measurements if m.metric == metric and m.optimized is not None):
            scale = 1.0 if member.ratio is None or member.baseline is None else member.baseline
            low, high = (end * scale for end in member.ci) if member.ci else (None, None)
            lines.append({"arm": control.name, "value": member.optimized, "low": low, "high": high})
    return pd.DataFrame(lines, columns=["arm", "value", "low", "high"])


def speed_and_quality(
    records: Iterable[Record], speed: str = "prefill_tokens_per_second", quality: str = "f1_macro"
) -> pd.DataFrame:
    """Return a row per record that has both metrics, for `figures.trade_off`: `x` the speed-up, `y` the change of
    quality.

    Shares are in points (hundredths), other scores in percent of the baseline, turned so that above 0 is better. `arm`
    is the optimization's title, `label` the model. Where a metric stands for several workloads, the first counts. A
    score of 0, of a model that answers nothing right any more, is a score.
    """
    lines = []
    for record in records:
        valid = [m for m in reversed(record.measurements) if m.ratio is not None and m.verdict != "invalid"]
        speeds, scores = {m.metric: m for m in valid if m.ratio}, {m.metric: m for m in valid}
        if speed not in speeds or quality not in scores:
            continue
        line: dict[str, object] = {
            "arm": title(record.optimization),
            "label": record.model,
            "verdict": scores[quality].verdict,
        }
        line |= dict(zip(("x", "x_low", "x_high"), gain(speeds[speed])))
        lines.append(line | dict(zip(("y", "y_low", "y_high"), _change(scores[quality]))))
    columns = ["arm", "label", "verdict", "x", "x_low", "x_high", "y", "y_low", "y_high"]
    return pd.DataFrame(lines, columns=columns).astype(dict.fromkeys(columns[3:], float))


def _change(measurement: Measurement) -> tuple[float | None, float | None, float | None]:
    """Return the change with its interval: in points for a share, in percent otherwise; above 0 is better."""
    base = measurement.baseline if measurement.unit == "share" else 1.0
    if base is None or measurement.ratio is None:
        return None, None, None
    scale = 100 * base * (1 if measurement.higher_is_better else -1)
    low, high = sorted((end - 1) * scale for end in measurement.ci) if measurement.ci else (None, None)
    return (measurement.ratio - 1) * scale, low, high


def environment(card: Mapping[str, object]) -> pd.DataFrame:
    """Return the environment card as a table of text, the packages' versions after the rest."""
    packages = card.get("packages")
    flat = {name: value for name, value in card.items() if not isinstance(value, dict)}
    flat |= packages if isinstance(packages, dict) else {}
    return pd.DataFrame([(name, str(value)) for name, value in flat.items()], columns=["what", "value"])


def refutations(answers: Sequence[Refutation], claims: Sequence[str]) -> pd.DataFrame:
    """Return the answers to what would refute a claim. Raises ValueError unless each of `claims` has its own answer."""
    answered = [answer.claim for answer in answers]
    if answered != list(claims):
        missing = [claim for claim in claims if claim not in answered]
        raise ValueError(f"not every claim has its answer, in order; without: {missing or answered}")
    return pd.DataFrame(refutation.rows(answers), columns=list(refutation.COLUMNS))


def answers(records: Iterable[Record]) -> pd.DataFrame:
    """Return every answer to what would refute a claim: optimization, model, claim, answer, evidence; refuted first."""
    pairs = [(r, answer) for r in records for answer in r.refutations]
    return _outcomes(pairs, ("refuted", "cannot tell", "not refuted"), refutation.rows, refutation.COLUMNS)


def relations(records: Iterable[Record]) -> pd.DataFrame:
    """Return every published relation with its outcome: optimization, model and `relation.COLUMNS`; not held first."""
    pairs = [(r, line) for r in records for line in r.relations]
    return _outcomes(pairs, ("not held", "cannot tell", "held"), relation.rows, relation.COLUMNS)


def _outcomes(
    pairs: Iterable[tuple[Record, Any]], order: Sequence[str], to_rows: Callable[..., list], columns: Sequence[str]
) -> pd.DataFrame:
    """Return a row per (record, entry): optimization, model and the entry's own, by its outcome as in `order`."""
    ordered = sorted(pairs, key=lambda pair: order.index(pair[1].outcome))
    lines = [(title(r.optimization), r.model, *row) for r, entry in ordered for row in to_rows([entry])]
    return pd.DataFrame(lines, columns=["optimization", "model", *columns])


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table; numbers with four significant figures."""
    return rows.markdown(
        [str(name) for name in frame.columns], ([_cell(v) for v in line] for line in frame.values.tolist())
    )


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_html(frame: pd.DataFrame, caption: str = "") -> str:
    """Return a frame as an HTML table without index, inline styles or border; cells are escaped."""
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in frame.columns)
    body = "".join(f"<tr>{''.join(map(_html_cell, line))}</tr>" for line in frame.values.tolist())
    top = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<table class="dataframe">{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _html_cell(value: object) -> str:
    """Return one escaped cell; the style sheet does not wrap short text."""
    text = _cell(value)
    short = ' class="short"' if len(text) <= 18 else ""
    return f"<td{short}>{html.escape(text)}</td>"


def show(frame: pd.DataFrame, caption: str = "") -> None:
    """Display a frame without its index, as HTML and as a Markdown table; end cells with this rather than with a
    model.

    Of a frame with more than MOST_LINES rows only the first are shown, and the caption says how many there are.
    """
    from IPython.display import display

    if len(frame) > MOST_LINES:
        caption = f"{caption} (the first {MOST_LINES} of {len(frame)} lines)".strip()
        frame = frame.head(MOST_LINES)

    above = f"*{untagged(caption)}*\n\n" if caption else ""
    data = {
        "text/html": to_html(frame, caption),
        "text/markdown": above + markdown(frame),
        "text/plain": frame.to_string(index=False),
    }
    display(data, raw=True)


def show_text(text: str, strong: bool = False) -> None:
    """Display one computed sentence, such as `record.verdict.sentence`; `strong` sets it in bold."""
    from IPython.display import display

    escaped = html.escape(text, quote=False)
    marked, bold = (f"<strong>{escaped}</strong>", f"**{untagged(text)}**") if strong else (escaped, untagged(text))
    display({"text/html": f"<p>{marked}</p>", "text/markdown": bold, "text/plain": text}, raw=True)
