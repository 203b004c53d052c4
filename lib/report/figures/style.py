"""The figures of notebooks and reports, in one style: colour-blind safe, units on the axes, intervals drawn.

Every function takes a tidy frame (one row per point) and returns a matplotlib Figure; `show` displays it with an
alternative text that reaches HTML and Markdown. Knows nothing of records, metrics or models; `lib.report.tables` makes
the frames from a record. Colours are Okabe and Ito's; no meaning rests on colour alone.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.report.text.quantities import counted

WIDTH_INCHES, DPI = 7.6, 160
INK, GREY, BAND = "#1a1a1a", "#6b6b6b", "#d9dde2"
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
ARMS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_NAMED = 60  # points or arms whose names can still be read beside one another
VERDICTS = {  # verdict: colour, marker, filled
    "better": (BLUE, ">", True),
    "worse": (VERMILLION, "<", True),
    "maintained": (BLUE, "o", True),
    "not_maintained": (VERMILLION, "X", True),
    "equivalent": (INK, "o", True),
    "inconclusive": (GREY, "o", False),
    "informative": (GREY, "d", False),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "report",
}


@contextmanager
def _style() -> Iterator[None]:
    with sns.axes_style("ticks", rc={}), matplotlib.rc_context(STYLE):
        yield


def _axes(height: float, columns: int = 1, rows: int = 1, **options: object) -> tuple[Figure, np.ndarray]:
    """Return a figure of the page's width and `height` inches, and its axes as a flat array."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
    return figure, np.atleast_1d(figure.subplots(rows, columns, **options)).ravel()


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes, at twice the page's resolution."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Display the figure in a notebook; `alt` says the finding and reaches HTML and Markdown. Raises ValueError
    without it.
    """
    if not alt.strip():
        raise ValueError("a figure needs an alternative text that says its finding")
    from IPython.display import display

    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": f"[figure] {alt}"}
    display(data, metadata={"image/png": {"alt": alt, "width": round(WIDTH_INCHES * 100)}}, raw=True)


def _look(index: int) -> tuple[str, str]:
    """Return colour and marker of the arm at `index`; the pair repeats only after 36 arms."""
    return ARMS[index % len(ARMS)], MARKERS[(index + index // len(ARMS)) % len(MARKERS)]


def _whiskers(axes: Axes, frame: pd.DataFrame, x: str, y: str, low: str, high: str, **options: object) -> None:
    """Draw vertical intervals where the frame has them."""
    if low in frame and high in frame:
        has = frame.dropna(subset=[low, high])
        if len(has):
            below = (has[y] - has[low]).clip(lower=0)
            axes.errorbar(has[x], has[y], yerr=[below, (has[high] - has[y]).clip(lower=0)], **options)


def _lines(span: Callable, line: Callable, margin: tuple[float, float] | None, reference: float | None) -> None:
    """Draw, across the axes, the band of what still counts as maintained, and the baseline's value."""
    if margin is not None:
        span(*margin, color=BAND, alpha=0.6, linewidth=0, label="within the margin", zorder=0)
    if reference is not None:
        line(reference, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="baseline", zorder=1)


def _spread(axes: Axes, row: pd.Series, name: str, at: float) -> None:
    """Draw a bar's interval, `low` to `high`, where it has one."""
    if pd.notna(row.get("low")) and pd.notna(row.get("high")):
        spread = [[max(row[name] - row["low"], 0)], [max(row["high"] - row[name], 0)]]
        axes.errorbar(row[name], at, xerr=spread, color=INK, capsize=3, linewidth=1.2)


def impact(
    frame: pd.DataFrame,
    *,
    x_label: str,
    y_label: str,
    x: str = "strength",
    y: str = "value",
    low: str = "low",
    high: str = "high",
    arm: str = "arm",
    controls: Sequence[str] = (),
    reference: float | None = None,
    margin: tuple[float, float] | None = None,
    title: str = "",
    log_y: bool = False,
) -> Figure:
    """Return a metric over an optimization's strength, one line per arm, with intervals.

    `frame` has a row per arm and strength: columns `x`, `y`, `arm` and, where known, the interval's ends `low`, `high`.
    Arms named in `controls` are dashed and hollow. `reference` is the baseline's value, `margin` the band of values
    that still counts as maintained. Labels carry the units.
    """
    with _style():
        figure, (axes,) = _axes(3.6)
        _lines(axes.axhspan, axes.axhline, margin, reference)
        for index, (name, rows) in enumerate(frame.groupby(arm, sort=False, observed=True)):
            rows = rows.sort_values(x)
            (colour, marker), control = _look(index), name in controls
            line = dict(color=colour, linestyle="--" if control else "-", linewidth=1.3 if control else 2)
            face = "white" if control else colour
            axes.plot(rows[x], rows[y], marker=marker, markerfacecolor=face, label=name, **line)
            _whiskers(axes, rows, x, y, low, high, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, alpha=0.8)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if log_y:
            axes.set_yscale("log")
        axes.legend(loc="best", fontsize=8.5)
    return figure


def forest(frame: pd.DataFrame, *, title: str = "", label: str = "label", group: str = "dimension") -> Figure:
    """Return every metric's ratio with its interval, turned so that right of 1 is better, over its noise floor.

    `frame` is what `tables.tidy` gives: columns `label`, `dimension`, `gain` (≥ 1 is better), `gain_low`, `gain_high`,
    `noise_floor` (a relative half-width, or missing) and `verdict`. Rows without a ratio are left out.
    """
    rows = frame.dropna(subset=["gain"]).reset_index(drop=True)
    rows = rows[rows["gain"] > 0].reset_index(drop=True)
    with _style():
        figure, (axes,) = _axes(1.3 + 0.3 * max(len(rows), 1) + 0.22 * rows[group].nunique())
        position, ticks = 0.0, []
        for name, members in rows.groupby(group, sort=False, observed=True):
            axes.text(
                0.0,
                position - 0.05,
                f" {name}",
                transform=axes.get_yaxis_transform(),
                color=GREY,
                fontsize=8.5,
                va="center",
            )
            position += 0.8
            for _, row in members.iterrows():
                ticks.append((position, row[label]))
                _forest_row(axes, row, position)
                position += 1
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.set_ylim(max(position - 0.2, 1), -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _ratio_axis(axes)
        axes.set(xlabel="optimized against baseline, turned so that right of 1 is better", title=title)
        _verdict_legend(figure, rows["verdict"], floor=bool((rows["noise_floor"] > 0).any()))
    return figure


def _forest_row(axes: Axes, row: pd.Series, position: float) -> None:
    colour, marker, filled = VERDICTS.get(row["verdict"], (GREY, "o", False))
    floor = row.get("noise_floor")
    if pd.notna(floor) and floor > 0:
        axes.barh(position, (1 + floor) - 1 / (1 + floor), left=1 / (1 + floor), height=0.8, color=BAND, zorder=0)
    if row.get("gain_low", 0) > 0 and row.get("gain_high", 0) > 0:
        axes.plot([row["gain_low"], row["gain_high"]], [position] * 2, color=colour, linewidth=2, solid_capstyle="butt")
    face = colour if filled else "white"
    axes.plot(
        row["gain"],
        position,
        marker=marker,
        color=colour,
        markerfacecolor=face,
        markersize=7,
        linestyle="none",
        zorder=3,
    )


def _ratio_axis(axes: Axes) -> None:
    """Put a logarithmic axis of plain ratios under the plot, never narrower than ±10 %."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 1.1)
    axes.set_xlim(low, high)
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100]
    inside = [step for step in steps if low <= step <= high]
    if len(inside) > 9:
        inside = [step for step in inside if step in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100)]
    axes.set_xticks(inside, [f"{step:g}×" for step in inside])
    axes.minorticks_off()


def _verdict_legend(figure: Figure, verdicts: pd.Series, floor: bool) -> None:
    present = [name for name in VERDICTS if name in set(verdicts)]
    marks: list[object] = []
    for colour, marker, filled in (VERDICTS[name] for name in present):
        face = colour if filled else "white"
        marks.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markerfacecolor=face))
    names = [name.replace("_", " ") for name in present]
    if floor:
        marks, names = [*marks, Patch(color=BAND)], [*names, "noise floor"]
    if marks:
        figure.legend(marks, names, loc="outside lower center", ncols=min(len(marks), 5), fontsize=8.5)


def bound(frame: pd.DataFrame, *, unit: str = "ms", title: str = "") -> Figure:
    """Return measured time as bars, with the physical bound as a marker on each.

    `frame` has a row per workload and arm: columns `workload`, `arm`, `time`, `bound` (both in `unit`), optionally
    `low`, `high` (the interval of the time) and `limit` ("compute" or "bandwidth"). The text at each bar is time ÷
    bound.
    """
    rows = frame.reset_index(drop=True)
    with _style():
        figure, (axes,) = _axes(1.1 + 0.42 * len(rows))
        arms = list(dict.fromkeys(rows["arm"]))
        for at, row in rows.iterrows():
            colour = GREY if row["arm"] == "baseline" else ARMS[max(arms.index(row["arm"]) - ("baseline" in arms), 0)]
            axes.barh(at, row["time"], color=colour, height=0.62, alpha=0.9)
            _spread(axes, row, "time", at)
            if pd.notna(row["bound"]):
                axes.plot([row["bound"]] * 2, [at - 0.4, at + 0.4], color=ORANGE, linewidth=3.5, solid_capstyle="butt")
                limit = f", limit: {row['limit']}" if "limit" in rows and pd.notna(row["limit"]) else ""
                edge = max(row["time"], row.get("high", 0) if pd.notna(row.get("high", np.nan)) else 0, row["bound"])
                axes.text(
                    edge,
                    at,
                    f"  {row['time'] / row['bound']:.1f}× its bound{limit}",
                    va="center",
                    fontsize=8.5,
                    color=INK,
                )
        axes.set_yticks(range(len(rows)), [f"{row.workload}, {row.arm}" for row in rows.itertuples()])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, (rows[["time", "bound"]].max().max() if len(rows) else 1) * 1.45)
        axes.plot(
            [], [], color=ORANGE, linewidth=3.5, label="physical bound: larger of FLOPs ÷ peak, bytes ÷ bandwidth"
        )
        axes.set(xlabel=f"time ({unit})", title=title)
        figure.legend(loc="outside lower center", fontsize=8.5)
    return figure


def bars(
    frame: pd.DataFrame,
    *,
    y_label: str,
    controls: Sequence[str] = (),
    reference: float | None = None,
    margin: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Return one horizontal bar per arm with its interval; arms named in `controls` are hatched and pale.

    `frame` has a row per arm: columns `arm`, `value` and, where known, `low`, `high`. `reference` and `margin` as in
    `impact`, drawn across the bars. `y_label` carries the unit.
    """
    rows = frame.reset_index(drop=True)
    with _style():
        figure, (axes,) = _axes(1.1 + 0.4 * len(rows))
        _lines(axes.axvspan, axes.axvline, margin, reference)
        for at, row in rows.iterrows():
            control, base = row["arm"] in controls, row["arm"] == "baseline"
            colour = GREY if base else ORANGE if control else BLUE
            style = dict(facecolor="white", edgecolor=colour, hatch="////") if control else dict(color=colour)
            axes.barh(at, row["value"], height=0.62, **style)
            _spread(axes, row, "value", at)
        names = [f"{name} (control)" if name in controls else name for name in rows["arm"]]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=y_label, title=title)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def trade_off(
    frame: pd.DataFrame,
    *,
    x_label: str,
    y_label: str,
    x: str = "x",
    y: str = "y",
    arm: str = "arm",
    label: str | None = None,
    reference: tuple[float, float] | None = None,
    margin: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Return one point per row, quality against speed, with both intervals (`x_low`, `x_high`, `y_low`, `y_high`).

    Colour and marker by `arm`; `label` names a column written beside each point, unless there are too many to be read;
    `reference` is the baseline's point and `margin` the band of y that still counts as maintained.
    """
    with _style():
        figure, (axes,) = _axes(4.2)
        _lines(axes.axhspan, axes.axhline, margin, None)
        if reference is not None:
            axes.axvline(reference[0], color=INK, linewidth=0.8)
            axes.axhline(reference[1], color=INK, linewidth=0.8)
        for index, (name, rows) in enumerate(frame.groupby(arm, sort=False, observed=True)):
            colour, marker = _look(index)
            for along, option in ((x, "xerr"), (y, "yerr")):
                if {f"{along}_low", f"{along}_high"} <= set(rows):
                    spread = np.abs([rows[along] - rows[f"{along}_low"], rows[f"{along}_high"] - rows[along]])
                    spread = np.nan_to_num(spread.astype(float))
                    axes.errorbar(
                        rows[x], rows[y], fmt="none", ecolor=colour, elinewidth=1, alpha=0.7, **{option: spread}
                    )
            axes.scatter(rows[x], rows[y], color=colour, marker=marker, s=42, label=name, zorder=3)
            if label is not None and len(frame) <= MOST_NAMED:
                for _, row in rows.iterrows():
                    axes.annotate(
                        str(row[label]), (row[x], row[y]), xytext=(6, 5), textcoords="offset points", fontsize=8
                    )
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if 0 < len(axes.get_legend_handles_labels()[0]) <= MOST_NAMED:
            figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def process(frame: pd.DataFrame, *, cores: int | None = None, title: str = "") -> Figure:
    """Return processor and memory use over a run: columns `seconds`, `cpu_percent` (100 is one core),
    `memory_bytes`.
    """
    with _style():
        figure, (above, below) = _axes(3.0, rows=2, sharex=True)
        above.plot(frame["seconds"], frame["cpu_percent"], color=BLUE, linewidth=1.3)
        if cores:
            above.axhline(100 * cores, color=GREY, linestyle="--", linewidth=1)
            above.text(1, 100 * cores, f"{counted(cores, 'core')} given", transform=above.get_yaxis_transform(),
                       ha="right", va="bottom", fontsize=8, color=GREY)  # fmt: skip
            above.set_ylim(0, 100 * cores * 1.25)
        above.set(ylabel="processor (%)", title=title)
        below.fill_between(frame["seconds"], frame["memory_bytes"] / 1e6, color=SKY, alpha=0.5, linewidth=0)
        below.plot(frame["seconds"], frame["memory_bytes"] / 1e6, color=BLUE, linewidth=1.3)
        below.set(ylabel="memory (MB)", xlabel="time since the start (s)")
        below.set_ylim(bottom=0)
    return figure
