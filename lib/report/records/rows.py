"""A record's measurements as rows of text: one place for what a table in a notebook, a page or a Markdown file says.

Knows measurements and how to write their numbers; knows no pandas and no HTML.
"""

from collections.abc import Iterable, Sequence

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement
from lib.report.text.quantities import DASH, interval, quantity, share, times
from lib.report.text.wording import label, one_line, signed

COLUMNS = (
    "metric", "workload", "baseline", "optimized", "ratio", "95 % interval", "noise floor", "MDE", "n",
    "verdict", "provenance",
)  # fmt: skip


def row(found: Measurement) -> dict[str, str]:
    """Return one measurement as text, by column, plus `dimension`, `name` (its stem), `source` and `reason`."""
    form = ".3f" if found.ratio is not None and abs(found.ratio - 1) < 0.1 else ".2f"
    return {
        "dimension": found.dimension,
        "metric": label(found.metric),
        "name": found.metric,
        "workload": found.workload,
        "baseline": quantity(found.baseline, found.unit),
        "optimized": quantity(found.optimized, found.unit),
        "ratio": times(found.ratio),
        "95 % interval": interval(*found.ci, form=form if found.ratio is not None else ".3g") if found.ci else DASH,
        "noise floor": share(found.noise_floor),
        "MDE": share(found.mde),
        "n": DASH if found.n is None else str(found.n),
        "verdict": signed(found.verdict),
        "provenance": found.provenance,
        "source": one_line(found.source, 400),
        "reason": one_line(found.reason, 400) if found.reason else "",
        "state": found.verdict,
        "predicted": times(found.predicted) if found.predicted else "",
        "realised": share(found.realised) if found.realised is not None else "",
    }


def rows(measurements: Iterable[Measurement]) -> list[dict[str, str]]:
    """Return the measurements as rows, in the order of the four dimensions."""
    return [row(found) for found in sorted(measurements, key=lambda m: DIMENSIONS.index(m.dimension))]


def groups(measurements: Sequence[Measurement]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the rows of each of the four dimensions, in order; a dimension with nothing has an empty list."""
    found = rows(measurements)
    return [(name, [item for item in found if item["dimension"] == name]) for name in DIMENSIONS]


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    table = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)
