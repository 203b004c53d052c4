"""Which weights of a matrix are kept, drawn: one panel per mask, a square per weight. In the style of `figures`."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lib.report.figures.style import BLUE, WIDTH_INCHES, _axes, _style


def masks(kept: Mapping[str, np.ndarray], *, x_label: str, y_label: str, title: str = "") -> Figure:
    """Return masks [rows, columns] (true: kept, drawn dark) side by side, each under its name."""
    names = list(kept)
    shape = np.shape(kept[names[0]])
    height = WIDTH_INCHES / len(names) * shape[0] / shape[1] + 0.9
    with _style():
        figure, panels = _axes(height, columns=len(names), sharey=True)
        for axes, name in zip(panels, names):
            axes.imshow(np.asarray(kept[name]), cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1, aspect="equal")
            axes.set(title=name, xlabel=x_label)
            axes.grid(visible=False)
        panels[0].set_ylabel(y_label)
        figure.suptitle(title)
    return figure
