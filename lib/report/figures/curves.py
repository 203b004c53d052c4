"""A metric over an optimization's strength, and quality against speed: lines and points with their intervals.

Takes tidy frames (one row per point) and returns matplotlib Figures; knows no records.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.report.figures.theme import (
    INK,
    applied,
    legend_columns,
    log_y_axis,
    look,
    margin_and_baseline,
    new_axes,
    whiskers,
)

MOST_NAMED = 60  # points or arms whose names remain legible
MOST_INSIDE = 6  # names of a legend inside the axes; a longer legend goes below them


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
    reference_name: str = "baseline",
    margin: tuple[float, float] | None = None,
    title: str = "",
    log_y: bool = False,
    steps: bool = False,
) -> Figure:
    """Return a metric over an optimization's strength, one line per arm, with intervals.

    `frame` has a row per arm and strength: columns `x`, `y`, `arm` and, where known, the interval's ends `low`, `high`.
    Arms named in `controls` are dashed and hollow. `reference` is the baseline's value, or another one that
    `reference_name` names, such as an objective; `margin` is the band of values that count as maintained. Labels carry
    the units. With `steps` a value holds until the next point, as on a Pareto front, where nothing lies between two
    points. The legend is inside the axes, or below them if it has more than MOST_INSIDE names.
    """
    with applied():
        figure, (axes,) = new_axes(3.6)
        margin_and_baseline(axes.axhspan, axes.axhline, margin, reference, reference_name)
        for index, (name, rows) in enumerate(frame.groupby(arm, sort=False, observed=True)):
            rows = rows.sort_values(x)
            (colour, marker), control = look(index), name in controls
            line = dict(color=colour, linestyle="--" if control else "-", linewidth=1.3 if control else 2)
            line["drawstyle"] = "steps-post" if steps else "default"
            face = "white" if control else colour
            axes.plot(rows[x], rows[y], marker=marker, markerfacecolor=face, label=name, **line)
            whiskers(axes, rows, x, y, low, high, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, alpha=0.8)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if log_y:
            log_y_axis(axes)
        handles, names = axes.get_legend_handles_labels()
        if len(names) > MOST_INSIDE:
            columns = legend_columns(names, 8.5, most=3)
            figure.set_figheight(3.6 + 0.17 * -(-len(names) // columns))
            figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5)
        elif names:
            axes.legend(loc="best", fontsize=8.5)
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

    Colour and marker are by `arm`; `label` is a column written next to each point, unless there are more than
    MOST_NAMED; `reference` is the baseline's point and `margin` the band of y that counts as maintained.
    """
    with applied():
        figure, (axes,) = new_axes(4.2)
        margin_and_baseline(axes.axhspan, axes.axhline, margin, None)
        if reference is not None:
            axes.axvline(reference[0], color=INK, linewidth=0.8)
            axes.axhline(reference[1], color=INK, linewidth=0.8)
        for index, (name, rows) in enumerate(frame.groupby(arm, sort=False, observed=True)):
            colour, marker = look(index)
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
        handles, names = axes.get_legend_handles_labels()
        if 0 < len(names) <= MOST_NAMED:
            columns = legend_columns(names, 8.5, most=3)
            figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure
