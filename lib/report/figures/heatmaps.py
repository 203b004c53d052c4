"""Values of ordered pairs as a matrix: the row is the first of the pair, the column the second; a cell without a number
says why. In the style of `theme`: colour-blind safe (purple to orange), the number in every cell.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.report.figures.theme import GREY, INK, WIDTH_INCHES, applied, new_axes

CELLS_BESIDE = 9  # cells with intervals that fit side by side into the page's width
_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def pairs(
    frame: pd.DataFrame,
    names: Sequence[str],
    values: Mapping[str, str],
    *,
    form: str = "{:+.3f}",
    title: str = "",
) -> Figure:
    """Return one panel per entry of `values` (column → heading) over all ordered pairs of `names`.

    `frame` has a row per pair: `first`, `second`, `state` (shown where there is no number) and the value's column, with
    `<column>_low` and `<column>_high` where known: a value whose interval includes zero is grey.
    """
    beside = len(names) * len(values) <= CELLS_BESIDE
    with applied():
        if beside:
            height = max(WIDTH_INCHES / len(values) * 0.9 + 0.4, 2.6)
            figure, panels = new_axes(height, columns=len(values), sharey=True)
        else:
            figure, panels = new_axes((0.62 * len(names) + 0.9) * len(values), rows=len(values))
        for axes, (column, heading) in zip(panels, values.items()):
            _panel(axes, frame, list(names), column, form, "equal" if beside else "auto")
            axes.set_title(heading)
        for axes in panels[:1] if beside else panels:
            axes.set_ylabel("first")
        figure.suptitle(title)
    return figure


def _panel(
    axes: Axes, frame: pd.DataFrame, names: list[str], column: str, form: str, aspect: Literal["equal", "auto"]
) -> None:
    matrix = np.full((len(names), len(names)), np.nan)
    cells = frame.to_dict("records")
    for cell in cells:
        matrix[names.index(cell["first"]), names.index(cell["second"])] = cell.get(column, np.nan)
    most = np.nanmax(np.abs(matrix)) if np.isfinite(matrix).any() else 1.0
    colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="white")
    limit = 2 * (most or 1)  # only the pale half of the colours, so that dark text is legible on every cell
    axes.imshow(np.ma.masked_invalid(matrix), cmap=colours, vmin=-limit, vmax=limit, aspect=aspect)
    for cell in cells:
        at = names.index(cell["second"]), names.index(cell["first"])
        value, low, high = (cell.get(column + end) for end in ("", "_low", "_high"))
        if value is None or pd.isna(value):
            axes.add_patch(Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#c9c9c9"))
            axes.text(*at, cell["state"], ha="center", va="center", fontsize=7.5, color=INK, bbox=_PLATE)
            continue
        open_, text = False, _number(value, form)
        if low is not None and high is not None and pd.notna(low):
            open_ = low <= 0 <= high
            text += f"\n{_number(low, form)} to\n{_number(high, form)}"
        axes.text(*at, text, ha="center", va="center", fontsize=7, color=GREY if open_ else INK)
    for index in range(len(names)):
        axes.text(index, index, "–", ha="center", va="center", color=GREY)
    labels = [name.replace("_", "\n") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=7.5)
    axes.set_yticks(range(len(names)), labels, fontsize=7.5)
    axes.set_xlabel("second")
    axes.grid(visible=False)
    axes.tick_params(length=0)


def _number(value: float, form: str) -> str:
    """Return a number as text, with a true minus sign; a number rounded to zero has no sign."""
    text = form.format(value)
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")
