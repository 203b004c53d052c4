"""p-values of stored measurements, from ratio, interval and number of samples, and Holm's correction. Knows nothing
about how a number was measured.

A record stores intervals, not p-values, so the intervals are inverted. The standard error is the distance from the
estimate to the end of the interval nearer to the null hypothesis, in units of that interval's Student quantile. So p is
below 0.05 exactly where the 95 % interval excludes the null hypothesis, even for an asymmetric interval. For a loss in
a score the null hypothesis is the margin, as for its verdict; otherwise it is "no change".
"""

import math
from collections.abc import Sequence

from scipy.special import stdtr, stdtrit

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_stats import MINIMUM_PROCESSES

LEVEL = 0.05
LEAST = 1e-9  # stands for a ratio of 0, so that its logarithm is finite
SINGLE = (None, 1)  # numbers of samples that say nothing about chance

# Measured once, since every process gives the same number: bytes of live tensors, bytes of the written files.
DETERMINISTIC = ("peak_tensor_bytes", "checkpoint_bytes")


def is_counted(measurement: Measurement) -> bool:
    """Whether a single number is free of chance: derived from shapes, or the same each time it is read."""
    exact = measurement.provenance == "derived" or measurement.metric in DETERMINISTIC
    return exact and measurement.n in SINGLE


def p_value(measurement: Measurement) -> float | None:
    """Return the two-sided p-value of a measurement; None if it has no interval (counted, read once, equal answers) or
    an interval of zero width.
    """
    gain_and_ends = gains(measurement)
    if gain_and_ends is None or measurement.n in SINGLE:
        return None
    gain, low, high = gain_and_ends
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
    """Return (gain, low, high), where above 0 is better: the logarithm of the ratio or, for scores with an absolute
    margin, the difference in the metric's unit. None where no change is defined.
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
    """Return the interval of a measurement's ratio. Where two arms gave the same answers, it extends to the bound in
    both directions; where both arms are the same model, it is a point.
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
    """Return the degrees of freedom of the interval, at least 1: from the processes if it is over processes, from the
    documents if items share them, else from the samples.
    """
    processes = measurement.processes or 1
    independent = processes if processes >= MINIMUM_PROCESSES else measurement.documents or measurement.n or 2
    return max(1, independent - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for multiple tests (Holm 1979, A simple sequentially rejective multiple test
    procedure)."""
    ranked = sorted(range(len(p_values)), key=lambda at: p_values[at])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(ranked):
        largest = max(largest, min(1.0, p_values[at] * (len(p_values) - rank)))
        corrected[at] = largest
    return corrected
