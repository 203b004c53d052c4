"""Small multiples in the style of `lib.report.figures.theme`: the same axes once per model.

Takes tidy frames and returns matplotlib Figures; knows no records.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.report.figures.theme import (
    BAND,
    INK,
    applied,
    legend_columns,
    log_y_axis,
    look,
    margin_and_baseline,
    new_axes,
    whiskers,
)

MOST_LOOKS = 24  # pairs of colour and marker that readers can distinguish


def panels(frame: pd.DataFrame, *, x_label: str, y_label: str, log_y: bool = False) -> Figure:
    """Return small multiples of `impact`: a panel per model with shared axes, at most two per row, and one legend.

    `frame` has columns `model`, `arm`, `strength`, `value`, `low`, `high`.
    """
    models, arms = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["arm"]))
    columns, more = _legend(arms, most=4)
    with applied():
        figure, axes = _grid(len(models), x_label, y_label, height=2.5, more=more)
        for panel, model in zip(axes, models):
            for index, arm in enumerate(arms):
                rows = frame[(frame["model"] == model) & (frame["arm"] == arm)].sort_values("strength")
                colour, marker = look(index)
                panel.plot(rows["strength"], rows["value"], color=colour, marker=marker, markersize=5, label=arm)
                whiskers(panel, rows, "strength", "value", "low", "high", fmt="none", ecolor=colour, capsize=2)
            panel.set_title(model)
            if log_y:
                log_y_axis(panel)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def trade_offs(
    frame: pd.DataFrame,
    *,
    x_label: str,
    y_label: str,
    margin: tuple[float, float] | None = None,
    log_y: bool = False,
) -> Figure:
    """Return quality against speed: a panel per model (column `label`), a colour and marker per `arm`; more than
    MOST_LOOKS arms would be indistinguishable, so they all get the same.

    `frame` comes from `tables.speed_and_quality` or `quality_over_bytes.points`; the baseline is at (1, 0), which is
    not drawn on a `log_y` axis, and `margin` is the band of y that counts as maintained.
    """
    models, arms = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["arm"]))
    if len(arms) > MOST_LOOKS:
        arms = ["every optimization"]
        frame = frame.assign(arm=arms[0])
    names = arms if margin is None else [*arms, "within the margin"]
    columns, more = _legend(names, most=3)
    with applied():
        figure, axes = _grid(len(models), x_label, y_label, height=2.7, more=more)
        for panel, model in zip(axes, models):
            margin_and_baseline(panel.axhspan, panel.axhline, margin, None)
            panel.axvline(1, color=INK, linewidth=0.8)
            if log_y:
                log_y_axis(panel)
            else:
                panel.axhline(0, color=INK, linewidth=0.8)
            for name, rows in frame[frame["label"] == model].groupby("arm", sort=False):
                colour, marker = look(arms.index(name))
                for low, high, along, across in (
                    ("x_low", "x_high", "y", panel.hlines),
                    ("y_low", "y_high", "x", panel.vlines),
                ):
                    has = rows.dropna(subset=[low, high])
                    across(has[along], has[low], has[high], color=colour, linewidth=1, alpha=0.6)
                panel.scatter(rows["x"], rows["y"], color=colour, marker=marker, s=42, zorder=3)
            panel.set_title(model)
        looks = [look(index) for index in range(len(arms))]
        handles: list[Artist] = [Line2D([], [], color=colour, marker=mark, linestyle="") for colour, mark in looks]
        if margin is not None:
            handles.append(Patch(color=BAND, alpha=0.6))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def _legend(names: Sequence[str], most: int) -> tuple[int, float]:
    """Return the number of columns of the legend below the panels, at most `most`, and its height in inches."""
    columns = legend_columns(names, 8.5, most)
    return columns, 0.25 + 0.17 * -(-len(names) // columns)


def _grid(count: int, x_label: str, y_label: str, *, height: float, more: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels with shared axes, at most two per row; only the lowest ones have an x label.
    `height` is that of a row, `more` that of the legend, in inches.
    """
    columns = min(count, 2)
    lines = -(-count // columns)
    figure, axes = new_axes(height * lines + more, columns, lines, sharex=True, sharey=True, squeeze=False)
    for unused in axes[count:]:
        unused.set_axis_off()
    for panel in axes[max(count - columns, 0) : count]:
        panel.set_xlabel(x_label)
        panel.tick_params(labelbottom=True)  # shared axes omit them above an unused panel
    figure.supylabel(y_label, fontsize=9.5)
    return figure, list(axes[:count])
