"""Tidy tables for notebooks and figures, computed from records.

`tidy` returns numbers, one row per measurement, for figures and further computation; `measurements` returns the same as
text with interval, noise floor, MDE, verdict and provenance. `show` displays any frame legibly in JupyterLab, HTML and
Markdown. Independent of how numbers are measured.
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
MOST_LINES = 400  # shown by `show`: a page with thousands of lines opens slowly, and nobody reads them
MOST_POINTS = 60  # in a figure that draws one line per point
MOST_PANELS = 12  # in a figure that draws one panel per model


def _of(source: Source) -> list[Measurement]:
    members = source.measurements if isinstance(source, Record) else list(source)
    return sorted(members, key=lambda m: DIMENSIONS.index(m.dimension))


def tidy(source: Source) -> pd.DataFrame:
    """Return one row of numbers per measurement (columns `TIDY`); `gain` is the ratio, inverted where lower is better:
    above 1 is better.
    """
    return _frame(_lines(source), TIDY)


def _all_lines(records: Iterable[Record], keep: Callable[[Measurement], bool] = lambda _: True) -> list[dict]:
    """Return the rows of several records, for a single frame: building a frame per record is slow."""
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
    """Return one row of text per measurement: values with units, interval, noise floor, MDE, verdict, provenance."""
    lines = [item for item in rows.rows(_of(source)) if dimension in (None, item["dimension"])]
    chosen = list(columns or (("dimension", *rows.COLUMNS) if dimension is None else rows.COLUMNS))
    return pd.DataFrame(lines, columns=chosen)


def sources(source: Source) -> pd.DataFrame:
    """Return where each number comes from: metric, workload, provenance, source, and the reason if it is missing."""
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
    """Return one row per record: status, the four verdicts as signs and words, duration, day.

    Verdicts are corrected over all these records together (`lib.report.analysis.noise.discoveries`).
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
    """Return how many records of each model have a number for each metric: what can be compared across models."""
    known = (dict.fromkeys(m.metric for m in r.measurements if m.provenance != "unavailable") for r in records)
    pairs = [(metric, r.model) for r, metrics in zip(records, known) for metric in metrics]  # once per record
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
    """Return the frame; if it has more than `most` rows, only those with the smallest and largest values of `column`,
    in their order.
    """
    ranked = frame[column].sort_values(kind="stable").index
    half = most // 2
    return frame if len(frame) <= most else frame.loc[frame.index.isin([*ranked[:half], *ranked[-half:]])]


def few(frame: pd.DataFrame, column: str, most: int = MOST_PANELS) -> tuple[pd.DataFrame, str]:
    """Return the rows of the first `most` names in `column`, and a sentence on what was left out; empty if nothing."""
    names = list(dict.fromkeys(frame[column]))
    if len(names) <= most:
        return frame, ""
    return frame[frame[column].isin(names[:most])], f" Only the first {most} of {len(names)} are drawn."


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
    """Return a row per record that has both metrics, for `figures.trade_off`: `x` is the speed-up, `y` the change in
    quality.

    Shares are in points (hundredths), other scores in percent of the baseline, signed so that above 0 is better. `arm`
    is the optimization's title, `label` the model. Of several workloads of a metric the first counts. A score of 0, of
    a model that answers nothing correctly, is a score too.
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
    """Return the environment card as a table of text; package versions come last."""
    packages = card.get("packages")
    flat = {name: value for name, value in card.items() if not isinstance(value, dict)}
    flat |= packages if isinstance(packages, dict) else {}
    return pd.DataFrame([(name, str(value)) for name, value in flat.items()], columns=["what", "value"])


def refutations(answers: Sequence[Refutation], claims: Sequence[str]) -> pd.DataFrame:
    """Return the answers to "What would refute it" as rows. Raises ValueError unless they match `claims` in order."""
    answered = [answer.claim for answer in answers]
    if answered != list(claims):
        missing = [claim for claim in claims if claim not in answered]
        fault = f"no answer to {missing}" if missing else f"answered in the order {answered}"
        raise ValueError(f"expected one answer per claim, in the claims' order: {fault}")
    return pd.DataFrame(refutation.rows(answers), columns=list(refutation.COLUMNS))


def answers(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per answer to "What would refute it": optimization, model, `refutation.COLUMNS`; refuted first."""
    pairs = [(r, answer) for r in records for answer in r.refutations]
    return _outcomes(pairs, ("refuted", "cannot tell", "not refuted"), refutation.rows, refutation.COLUMNS)


def relations(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per published relation: optimization, model and `relation.COLUMNS`; those not held first."""
    pairs = [(r, line) for r in records for line in r.relations]
    return _outcomes(pairs, ("not held", "cannot tell", "held"), relation.rows, relation.COLUMNS)


def _outcomes(
    pairs: Iterable[tuple[Record, Any]], order: Sequence[str], to_rows: Callable[..., list], columns: Sequence[str]
) -> pd.DataFrame:
    """Return a row per (record, entry): optimization, model, the entry's columns; sorted by outcome as in `order`."""
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
    """Display a frame without its index, as HTML and as a Markdown table; end notebook cells with this call.

    Shows at most MOST_LINES rows; the caption says how many there are.
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
