"""A record's measurements as rows of text, the single source of the tables in notebooks, pages and Markdown files.

Knows measurements and the format of their numbers; knows no pandas and no HTML.
"""

from collections.abc import Iterable, Sequence

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.digits import DASH, interval, with_ends
from lib.measure.metrics.measurement import Measurement
from lib.report.text import sentence
from lib.report.text.quantities import quantity, share, times
from lib.report.text.wording import label, one_line, signed, untagged

COLUMNS = (
    "metric", "workload", "baseline", "optimized", "ratio", "95 % interval", "noise floor", "MDE", "n",
    "verdict", "provenance",
)  # fmt: skip


def row(measurement: Measurement) -> dict[str, str]:
    """Return one measurement as column → text: `COLUMNS`, and `dimension`, `name` (the metric's identifier), `source`,
    `reason`, `state` (the verdict's identifier), `predicted` and `realised`.
    """
    low, high = sentence.ends(measurement)
    ratio, ends = sentence.ratio(measurement.ratio, low, high)
    if measurement.ratio is None:  # the interval is then that of the optimized value
        ends = interval(low, high, form=".3g") if low == high else with_ends(0.0, low, high)[1]
    return {
        "dimension": measurement.dimension,
        "metric": label(measurement.metric),
        "name": measurement.metric,
        "workload": measurement.workload,
        "baseline": quantity(measurement.baseline, measurement.unit),
        "optimized": quantity(measurement.optimized, measurement.unit),
        "ratio": ratio,
        "95 % interval": ends or DASH,
        "noise floor": share(measurement.noise_floor),
        "MDE": share(measurement.mde),
        "n": DASH if measurement.n is None else str(measurement.n),
        "verdict": signed(measurement.verdict),
        "provenance": measurement.provenance,
        "source": one_line(measurement.source, 400),
        "reason": one_line(_reason(measurement), 400),
        "state": measurement.verdict,
        "predicted": times(measurement.predicted) if measurement.predicted else "",
        "realised": share(measurement.realised) if measurement.realised is not None else "",
    }


def _reason(measurement: Measurement) -> str:
    """Return a measurement's own reason, preceded by the gate that an inconclusive one did not pass."""
    gate = sentence.why(measurement) if measurement.verdict == "inconclusive" else ""
    own = measurement.reason or ""
    if gate and own.startswith(gate):  # the reason names the gate itself, and may say more
        gate = ""
    return "; ".join(dict.fromkeys(part for part in (gate, own.rstrip(".") if gate else own) if part))


def rows(measurements: Iterable[Measurement]) -> list[dict[str, str]]:
    """Return the measurements as rows, in the order of the four dimensions."""
    return [row(measurement) for measurement in sorted(measurements, key=lambda m: DIMENSIONS.index(m.dimension))]


def groups(measurements: Sequence[Measurement]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return (dimension, rows) for each of the four dimensions, in order; without measurements the list is empty."""
    lines = rows(measurements)
    return [(name, [item for item in lines if item["dimension"] == name]) for name in DIMENSIONS]


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; vertical bars and starts of HTML tags are escaped in its cells."""
    cells = [[untagged(str(cell)).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    table = [[untagged(str(column)) for column in columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)
