"""Pruning masks of a matrix as a figure: one panel per mask, a square per weight. In the style of `theme`."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lib.report.figures.theme import BLUE, WIDTH_INCHES, applied, new_axes


def masks(matrices: Mapping[str, np.ndarray], *, x_label: str, y_label: str, title: str = "") -> Figure:
    """Return a figure of masks [rows, columns] (true: kept, drawn dark) side by side, each titled with its name."""
    names = list(matrices)
    shape = np.shape(matrices[names[0]])
    height = WIDTH_INCHES / len(names) * shape[0] / shape[1] + 0.9
    with applied():
        figure, panels = new_axes(height, columns=len(names), sharey=True)
        for axes, name in zip(panels, names):
            axes.imshow(
                np.asarray(matrices[name]), cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1, aspect="equal"
            )
            axes.set(title=name, xlabel=x_label)
            axes.grid(visible=False)
        panels[0].set_ylabel(y_label)
        figure.suptitle(title)
    return figure
