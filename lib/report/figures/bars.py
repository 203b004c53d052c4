"""Horizontal bars: measured times with their physical bounds, and arms next to their controls.

Takes tidy frames (one row per bar) and returns matplotlib Figures; knows no records.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report.figures.theme import (
    ARMS,
    BLUE,
    GREY,
    INK,
    ORANGE,
    applied,
    bar_interval,
    margin_and_baseline,
    new_axes,
)  # fmt: skip


def bound(frame: pd.DataFrame, *, unit: str = "ms", title: str = "") -> Figure:
    """Return measured time as bars, with the physical bound as a marker on each.

    `frame` has a row per workload and arm: columns `workload`, `arm`, `time`, `bound` (both in `unit`), optionally
    `low`, `high` (the interval of the time) and `limit` ("compute" or "bandwidth"). The text at each bar is time ÷
    bound. Each workload has its own axis: next to the time of a long prompt, that of one token would be invisible.
    """
    rows = frame.reset_index(drop=True)
    arms = list(dict.fromkeys(rows["arm"]))
    workloads = [part for _, part in rows.groupby("workload", sort=False)] or [rows]
    with applied():
        height = 1.1 + 0.42 * len(rows) + 0.3 * (len(workloads) - 1)
        sizes = [max(len(part), 1) for part in workloads]
        figure, panels = new_axes(height, rows=len(workloads), height_ratios=sizes)
        for axes, part in zip(panels, workloads):
            _bound_panel(axes, part, arms)
        name = "physical bound: larger of FLOPs ÷ peak, bytes ÷ bandwidth"
        panels[0].plot([], [], color=ORANGE, linewidth=3.5, label=name)
        panels[0].set_title(title)
        panels[-1].set_xlabel(f"time ({unit})")
        figure.legend(loc="outside lower center", fontsize=8.5)
    return figure


def _bound_panel(axes: Axes, rows: pd.DataFrame, arms: Sequence[str]) -> None:
    """Draw the bars of one workload; the colour of an arm depends on its index in `arms`."""
    for at, (_, row) in enumerate(rows.iterrows()):
        colour = GREY if row["arm"] == "baseline" else ARMS[max(arms.index(row["arm"]) - ("baseline" in arms), 0)]
        axes.barh(at, row["time"], color=colour, height=0.62, alpha=0.9)
        bar_interval(axes, row, "time", at)
        if pd.notna(row["bound"]):
            axes.plot([row["bound"]] * 2, [at - 0.4, at + 0.4], color=ORANGE, linewidth=3.5, solid_capstyle="butt")
            limit = f", limit: {row['limit']}" if "limit" in rows and pd.notna(row["limit"]) else ""
            edge = max(row["time"], row.get("high", 0) if pd.notna(row.get("high", np.nan)) else 0, row["bound"])
            text = f"  {row['time'] / row['bound']:.1f}× its bound{limit}"
            axes.text(edge, at, text, va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(rows)), [f"{row.workload}, {row.arm}" for row in rows.itertuples()])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    ends = rows.reindex(columns=["time", "bound", "high"]).astype(float).max().max()
    axes.set_xlim(0, (ends if len(rows) else 1) * 1.45)


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
    with applied():
        figure, (axes,) = new_axes(1.1 + 0.4 * len(rows))
        margin_and_baseline(axes.axvspan, axes.axvline, margin, reference)
        for at, (_, row) in enumerate(rows.iterrows()):
            control, base = row["arm"] in controls, row["arm"] == "baseline"
            colour = GREY if base else ORANGE if control else BLUE
            style = dict(facecolor="white", edgecolor=colour, hatch="////") if control else dict(color=colour)
            axes.barh(at, row["value"], height=0.62, **style)
            bar_interval(axes, row, "value", at)
        names = [f"{name} (control)" if name in controls else name for name in rows["arm"]]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=y_label, title=title)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    return figure
