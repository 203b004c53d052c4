"""The CPU and memory use of a run over time."""

import pandas as pd
from matplotlib.figure import Figure

from lib.report.figures.theme import BLUE, GREY, SKY, applied, new_axes
from lib.report.text.quantities import counted


def process(frame: pd.DataFrame, *, cores: int | None = None, title: str = "") -> Figure:
    """Return a figure of CPU and memory use from the columns `seconds`, `cpu_percent` (100 is one core) and
    `memory_bytes`; `cores` draws the limit.
    """
    with applied():
        figure, (above, below) = new_axes(3.0, rows=2, sharex=True)
        above.plot(frame["seconds"], frame["cpu_percent"], color=BLUE, linewidth=1.3)
        if cores:
            above.axhline(100 * cores, color=GREY, linestyle="--", linewidth=1)
            above.text(1, 100 * cores, f"{counted(cores, 'core')} given", transform=above.get_yaxis_transform(),
                       ha="right", va="bottom", fontsize=8, color=GREY)  # fmt: skip
            above.set_ylim(0, 1.25 * max(100 * cores, frame["cpu_percent"].max()))
        above.set(ylabel="CPU (%)", title=title)
        below.fill_between(frame["seconds"], frame["memory_bytes"] / 1e6, color=SKY, alpha=0.5, linewidth=0)
        below.plot(frame["seconds"], frame["memory_bytes"] / 1e6, color=BLUE, linewidth=1.3)
        below.set(ylabel="memory (MB)", xlabel="time since the start (s)")
        below.set_ylim(bottom=0)
    return figure
