"""The figures that notebooks draw, in one namespace: the charts, `show` and `png`.

Each chart takes a tidy frame (one row per point) and returns a matplotlib Figure; `show` displays it with an
alternative text for HTML and Markdown. `lib.report.tables` builds the frames from a record. The charts are defined in
`bars`, `curves`, `ratios` and `machine_use`, their common parts in `theme`.
"""

import base64
import io

from matplotlib.figure import Figure

from lib.report.figures.bars import bars, bound
from lib.report.figures.curves import impact, trade_off
from lib.report.figures.machine_use import process
from lib.report.figures.ratios import forest
from lib.report.figures.theme import DPI, WIDTH_INCHES, applied

__all__ = ["bars", "bound", "forest", "impact", "png", "process", "show", "trade_off"]


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes, at twice the page's resolution."""
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Display the figure in a notebook; `alt` states the finding, as the alternative text in HTML and Markdown. Raises
    ValueError where it is empty.
    """
    if not alt.strip():
        raise ValueError("a figure needs an alternative text that states its finding")
    from IPython.display import display

    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": f"[figure] {alt}"}
    display(data, metadata={"image/png": {"alt": alt, "width": round(WIDTH_INCHES * 100)}}, raw=True)
