"""How likely a stored result would be by chance: p-values from ratio, interval and number of samples, and Holm's
correction. Knows nothing of how a number was made.

A record stores intervals, not p-values; they are inverted. The standard error is the distance from the estimate to the
end of the interval that is nearer to the null hypothesis, in units of that interval's Student quantile: p is below 0.05
exactly where the 95 % interval excludes the null hypothesis, however lopsided it is. For a score the null hypothesis of
a loss is the margin, as for its verdict; everywhere else it is "no change".
"""

import math
from collections.abc import Sequence

from scipy.special import stdtr, stdtrit

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_stats import MINIMUM_PROCESSES

LEVEL = 0.05
LEAST = 1e-9  # a ratio that stands for none: its logarithm is finite
SINGLE = (None, 1)  # numbers of samples that tell nothing of chance

# Measured once, and the same in every process: bytes of live tensors, bytes of the files that were written.
DETERMINISTIC = ("peak_tensor_bytes", "checkpoint_bytes")


def is_counted(measurement: Measurement) -> bool:
    """Whether chance has no part in a single number: it follows from shapes, or is the same each time it is read."""
    exact = measurement.provenance == "derived" or measurement.metric in DETERMINISTIC
    return exact and measurement.n in SINGLE


def p_value(measurement: Measurement) -> float | None:
    """Return the two-sided p of a measurement; None where it has no interval (counted, read once, equal answers) or one
    without width.
    """
    known = gains(measurement)
    if known is None or measurement.n in SINGLE:
        return None
    gain, low, high = known
    if low is None or high is None or high <= low:
        return None
    null = 0.0
    if measurement.dimension == "accuracy" and gain < 0:
        null = -_margin(measurement)
    beyond = gain - null if gain > 0 else null - gain
    error = gain - low if gain > 0 else high - gain
    if beyond <= 0:
        return 1.0
    if error <= 0 or math.isinf(error):
        return 0.0 if error <= 0 else 1.0
    freedom = freedom_of(measurement)
    quantile = float(stdtrit(freedom, 1 - LEVEL / 2))
    return min(1.0, 2 * float(stdtr(freedom, -beyond / error * quantile)))


def gains(measurement: Measurement) -> tuple[float, float | None, float | None] | None:
    """Return (gain, low, high), above 0 is better: a logarithm of the ratio, for scores with an absolute margin the
    difference in the metric's unit. None where no change is defined.
    """
    base, value, ci = measurement.baseline, measurement.optimized, measurement.ci
    sign = 1.0 if measurement.higher_is_better else -1.0
    if measurement.dimension == "accuracy" and measurement.metric != "perplexity":
        if base is None or value is None:
            return None
        # Without a baseline above zero the interval is of `optimized` itself.
        ends = [end * (base or 1.0) - base for end in ci] if ci else [None, None]
        return _turned(value - base, ends, sign)
    ratio = measurement.ratio
    if ratio is None or ratio <= 0:
        return None
    return _turned(
        math.log(ratio), [math.log(end) if end > 0 else -math.inf for end in ci] if ci else [None, None], sign
    )


def ratio_ends(measurement: Measurement) -> tuple[float, float] | None:
    """Return the interval of a measurement's ratio. Of two arms that gave the same answers it is what their bound
    leaves open, in both directions; a point where they are one model.
    """
    if measurement.ci or measurement.dimension != "accuracy" or measurement.ratio != 1:
        return measurement.ci
    bound = abs(measurement.bound or 0.0)
    if METRICS[measurement.metric].margin_kind == "absolute":
        bound /= measurement.baseline or 1.0
    return (max(1 - bound, LEAST), 1 + bound)


def _turned(change: float, ends: Sequence[float | None], sign: float) -> tuple[float, float | None, float | None]:
    low, high = ends
    if low is None or high is None:
        return sign * change, None, None
    turned = sorted((sign * low, sign * high))
    return sign * change, turned[0], turned[1]


def _margin(measurement: Measurement) -> float:
    margin = measurement.margin or 0.0
    return math.log1p(margin) if measurement.metric == "perplexity" else margin


def freedom_of(measurement: Measurement) -> int:
    """Return the degrees of freedom behind the interval: processes where it is over processes, documents where items
    share them, else samples; one at least.
    """
    processes = measurement.processes or 1
    independent = processes if processes >= MINIMUM_PROCESSES else measurement.documents or measurement.n or 2
    return max(1, independent - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected over all of them (Holm 1979, A simple sequentially rejective multiple test
    procedure)."""
    ranked = sorted(range(len(p_values)), key=lambda at: p_values[at])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(ranked):
        largest = max(largest, min(1.0, p_values[at] * (len(p_values) - rank)))
        corrected[at] = largest
    return corrected
