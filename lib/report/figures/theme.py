"""The style of every figure: colours, fonts, sizes, and the parts that several charts share.

Colours are Okabe and Ito's, safe for the colour-blind; no meaning rests on colour alone. Knows no chart.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

WIDTH_INCHES, DPI = 7.6, 160
LETTER, BESIDE = 0.6, 5.0  # widths in a legend, in font sizes: an average letter (at most), a column's mark and gaps
PLAIN = (1e-3, 1e4)  # within these limits a logarithmic axis has plain numbers
INK, GREY, BAND = "#1a1a1a", "#6b6b6b", "#d9dde2"
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
ARMS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
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
def applied() -> Iterator[None]:
    """Apply this style inside the block."""
    with sns.axes_style("ticks", rc={}), matplotlib.rc_context(STYLE):
        yield


def new_axes(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure of the page's width and `height` inches, and its axes as a flat array."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
    return figure, np.atleast_1d(figure.subplots(rows, columns, **options)).ravel()


def look(index: int) -> tuple[str, str]:
    """Return colour and marker of the arm at `index`; the pair repeats only after 36 arms."""
    return ARMS[index % len(ARMS)], MARKERS[(index + index // len(ARMS)) % len(MARKERS)]


class LogNumbers(LogFormatterSciNotation):
    """Tick labels of a logarithmic axis: 0.6, 2, 10 if the whole axis lies within PLAIN, else powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label at `x`; empty where matplotlib writes none."""
        text = super().__call__(x, pos)
        assert self.axis is not None, "a formatter belongs to an axis before it writes"
        low, high = sorted(self.axis.get_view_interval())
        return f"{x:g}" if text and PLAIN[0] <= low and high <= PLAIN[1] else text


def log_y_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with readable tick labels (`LogNumbers`)."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogNumbers())
    axes.yaxis.set_minor_formatter(LogNumbers())


def legend_columns(names: Iterable[str], fontsize: float, most: int) -> int:
    """Return how many legend columns fit into the page's width: at most `most`, fewer where the names are long.

    A legend wider than its figure would be cut off on both sides.
    """
    room = 72 * WIDTH_INCHES / fontsize
    return max(1, min(most, int(room // (LETTER * max(map(len, names), default=0) + BESIDE))))


def whiskers(axes: Axes, frame: pd.DataFrame, x: str, y: str, low: str, high: str, **options: Any) -> None:
    """Draw vertical intervals where the frame has them."""
    if low in frame and high in frame:
        has = frame.dropna(subset=[low, high])
        if len(has):
            below = (has[y] - has[low]).clip(lower=0)
            axes.errorbar(has[x], has[y], yerr=[below, (has[high] - has[y]).clip(lower=0)], **options)


def margin_and_baseline(
    span: Callable,
    line: Callable,
    margin: tuple[float, float] | None,
    reference: float | None,
    reference_name: str = "baseline",
) -> None:
    """Draw across the axes the band of values that count as maintained, and a line at `reference`."""
    if margin is not None:
        span(*margin, color=BAND, alpha=0.6, linewidth=0, label="within the margin", zorder=0)
    if reference is not None:
        line(reference, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=reference_name, zorder=1)


def bar_interval(axes: Axes, row: pd.Series, name: str, at: float) -> None:
    """Draw a bar's interval, `low` to `high`, where it has one."""
    if pd.notna(row.get("low")) and pd.notna(row.get("high")):
        spread = [[max(row[name] - row["low"], 0)], [max(row["high"] - row[name], 0)]]
        axes.errorbar(row[name], at, xerr=spread, color=INK, capsize=3, linewidth=1.2)
