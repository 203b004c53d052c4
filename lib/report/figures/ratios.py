"""A forest plot: every metric's ratio with its interval over its noise floor, one line each.

Takes a frame from `lib.report.tables.tidy` and returns a matplotlib Figure; judges nothing.
"""

import math

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.report.figures.theme import BAND, BLUE, GREY, INK, VERMILLION, applied, new_axes

VERDICTS = {  # verdict: colour, marker, filled
    "better": (BLUE, ">", True),
    "worse": (VERMILLION, "<", True),
    "maintained": (BLUE, "o", True),
    "not_maintained": (VERMILLION, "X", True),
    "equivalent": (INK, "o", True),
    "inconclusive": (GREY, "o", False),
    "not_exercised": (GREY, "s", False),
    "informative": (GREY, "d", False),
}


REACH = 5.0  # an interval is drawn at most this factor away from its ratio


def forest(frame: pd.DataFrame, *, title: str = "", label: str = "label", group: str = "dimension") -> Figure:
    """Return a forest plot of every metric's gain (right of 1 is better) with its interval, over its noise floor.

    `frame` comes from `tables.tidy`: columns `label`, `dimension`, `gain` (above 1 is better), `gain_low`, `gain_high`,
    `noise_floor` (a relative half-width, or missing) and `verdict`. Rows without a ratio are left out. An interval that
    reaches 0 (not on a logarithmic axis), extends beyond a factor of REACH, or has no upper end is dashed to the edge.
    """
    rows = frame.dropna(subset=["gain"]).reset_index(drop=True)
    rows = rows[rows["gain"] > 0].reset_index(drop=True)
    with applied():
        figure, (axes,) = new_axes(1.3 + 0.3 * max(len(rows), 1) + 0.22 * rows[group].nunique())
        position, placed = 0.0, []
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
                placed.append((position, row))
                _forest_row(axes, row, position)
                position += 1
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks([at for at, _ in placed], [row[label] for _, row in placed])
        axes.set_ylim(max(position - 0.2, 1), -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _ratio_axis(axes)
        for at, row in placed:
            _open_end(axes, row, at)
        axes.set_title(title)
        # Right-aligned: next to long names the axis is narrower than its label, which would be cut off.
        axes.set_xlabel("optimized against baseline, oriented so that right of 1 is better", loc="right")
        _verdict_legend(figure, rows["verdict"], floor=bool((rows["noise_floor"] > 0).any()))
    return figure


def _forest_row(axes: Axes, row: pd.Series, position: float) -> None:
    colour, marker, filled = VERDICTS.get(row["verdict"], (GREY, "o", False))
    floor = row.get("noise_floor")
    if pd.notna(floor) and floor > 0:
        axes.barh(position, (1 + floor) - 1 / (1 + floor), left=1 / (1 + floor), height=0.8, color=BAND, zorder=0)
    if known := _ends(row):
        ends = known if len(known) == 2 else [*known, row["gain"]]
        axes.plot(ends, [position] * 2, color=colour, linewidth=2, solid_capstyle="butt")
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


def _ends(row: pd.Series) -> list[float]:
    """Return the ends of a row's interval that can be drawn: none at 0 or infinity, and none so far from its ratio that
    the other rows would be squeezed.
    """
    ends = [row.get("gain_low"), row.get("gain_high")]
    known = [float(end) for end in ends if end is not None and 0 < end < math.inf]
    return [end for end in known if 1 / REACH <= end / row["gain"] <= REACH] or known


def _open_end(axes: Axes, row: pd.Series, position: float) -> None:
    """Draw the undrawable end of an interval as a dashed line to it or to the edge of the finished axis, whichever is
    nearer.
    """
    known = _ends(row)
    if len(known) == 1:
        colour, _, _ = VERDICTS.get(row["verdict"], (GREY, "o", False))
        side = int(known[0] == row.get("gain_low"))
        edge, end = axes.get_xlim()[side], row.get(("gain_low", "gain_high")[side])
        if end is not None and 0 < end < math.inf:
            edge = min(edge, end) if side else max(edge, end)
        axes.plot([row["gain"], edge], [position] * 2, color=colour, linewidth=2, linestyle=(0, (1.5, 1)))


def _ratio_axis(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, labelled with plain ratios, and at least ±10 % wide."""
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
    marks: list[Artist] = []
    for colour, marker, filled in (VERDICTS[name] for name in present):
        face = colour if filled else "white"
        marks.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markerfacecolor=face))
    names = [name.replace("_", " ") for name in present]
    if floor:
        marks, names = [*marks, Patch(color=BAND)], [*names, "noise floor"]
    if marks:
        figure.legend(marks, names, loc="outside lower center", ncols=min(len(marks), 5), fontsize=8.5)
