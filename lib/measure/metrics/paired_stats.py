"""Computes effects and their intervals from paired samples. Knows nothing about clocks, models or metrics.

A speed effect is the median over blocks of d = ln(optimized / baseline). Where the blocks were timed in several
processes, the process is the unit of replication: the effect is the mean over processes of their trimmed mean d, with
Student's interval. Else the 95 % interval is Hettmansperger and Sheather's interpolated order-statistic interval
(Statistics & Probability Letters 4, 1986), not a bootstrap. At the block counts used here, the percentile and BCa
bootstraps of a median exclude "no difference" between two equal arms more often than their level claims, the basic
bootstrap far more often. The order-statistic interval keeps its level without assuming a distribution, and needs no
random numbers. `tests/measure/metrics/test_paired_stats.py` simulates the comparison. Where there are many items
(quality), scipy's bootstrap is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom, bootstrap, t, trim_mean

from lib.measure.metrics.decision import MEDIAN_FACTOR

CONFIDENCE = 0.95
# (1.645 + 0.842): one-sided 5 % level, 80 % power.
NON_INFERIORITY_FACTOR = 2.487
MINIMUM_BLOCKS = 6
MINIMUM_PROCESSES = 3
TRIMMED = 0.2  # share of a process's pairs that is trimmed at either end
NORMAL = 1.96  # the standard normal's 97.5 % quantile

Samples = Sequence[float] | np.ndarray  # of one dimension


@dataclass(frozen=True)
class Effect:
    """A paired effect in natural logarithms: the estimate (`median`), its interval (`low`, `high`), the standard
    deviation of the pairs (`sigma`) and of the estimate (`scatter`), and the numbers of pairs, outliers and processes.
    """

    median: float
    low: float
    high: float
    sigma: float
    scatter: float
    n: int
    outliers: int
    processes: int = 1

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def at_resolution(self, step: float) -> "Effect":
        """Return the effect with an interval that reaches at least `step` to either side of the estimate; with a step
        of 0, the effect itself.
        """
        if not step:
            return self
        return replace(self, low=min(self.low, self.median - step), high=max(self.high, self.median + step))


def differences(baseline: Samples, optimized: Samples) -> np.ndarray:
    """Return d[n] = ln(optimized / baseline) of paired samples. Raises ValueError unless the samples are positive and
    finite, and the two arms are non-empty and of equal length.
    """
    base, opt = np.asarray(baseline, dtype=float), np.asarray(optimized, dtype=float)
    if base.shape != opt.shape or base.ndim != 1 or base.size == 0:
        raise ValueError(f"paired samples need equal lengths, got {base.shape} and {opt.shape}")
    if not (np.all(base > 0) and np.all(opt > 0) and np.isfinite([base, opt]).all()):
        raise ValueError("paired samples must be positive and finite")
    return np.log(opt / base)


def median_interval(values: Samples, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interpolated order-statistic interval of the median of `values`.

    With fewer than six values no such interval reaches 95 %, and both ends are infinite.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = ordered.size
    rank = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    while rank >= 0 and 2 * binom.cdf(rank, n, 0.5) > 1 - confidence:
        rank -= 1
    # `rank` values can be cut at each end without falling below the requested confidence.
    k = rank + 1
    if k < 1:
        return -math.inf, math.inf
    outer, inner = 1 - 2 * binom.cdf(k - 1, n, 0.5), 1 - 2 * binom.cdf(k, n, 0.5)
    share = (outer - confidence) / (outer - inner)
    weight = (n - k) * share / (k + (n - 2 * k) * share)
    low = (1 - weight) * ordered[k - 1] + weight * ordered[k]
    high = (1 - weight) * ordered[n - k] + weight * ordered[n - k - 1]
    return float(low), float(high)


def outliers(d: Samples) -> int:
    """Return how many values lie more than five scaled median absolute deviations from the median. They are counted,
    not dropped.
    """
    d_N = np.asarray(d, dtype=float)
    deviation_N = np.abs(d_N - np.median(d_N))
    scale = 1.4826 * np.median(deviation_N)
    return int(np.sum(deviation_N > 5 * scale)) if scale > 0 else int(np.sum(deviation_N > 0))


def effect(d: Samples, process: Sequence[int] | None = None, process_sigma: float = 0.0) -> Effect:
    """Return the effect of the differences d[n] (natural logarithms).

    `process[i]` is the process in which pair i was timed. With three or more processes the interval is over processes.
    Otherwise `process_sigma`, the standard deviation between processes taken from other runs, is added in quadrature to
    the half-width of the interval within the process.
    """
    d_N = np.asarray(d, dtype=float)
    sigma = float(d_N.std(ddof=1)) if d_N.size > 1 else math.inf
    if process is not None and len(set(process)) >= MINIMUM_PROCESSES:
        means_P = process_means(d_N, process)
        low, high = student_interval(means_P)
        scatter = float(means_P.std(ddof=1)) / math.sqrt(means_P.size)
        return Effect(float(means_P.mean()), low, high, sigma, scatter, d_N.size, outliers(d_N), means_P.size)
    median = float(np.median(d_N))
    between = NORMAL * process_sigma
    low, high = median_interval(d_N)
    low, high = median - math.hypot(median - low, between), median + math.hypot(high - median, between)
    scatter = math.hypot(MEDIAN_FACTOR * sigma / math.sqrt(d_N.size), process_sigma)
    return Effect(median, low, high, sigma, scatter, d_N.size, outliers(d_N))


def level(values: Samples, process: Sequence[int] | None = None) -> tuple[float, float, float]:
    """Return (level, low, high) of one arm's positive samples: with three or more processes the geometric mean over
    processes and Student's interval of the logarithms, else the median and its order-statistic interval.
    """
    if process is not None and len(set(process)) >= MINIMUM_PROCESSES:
        means_P = process_means(np.log(values), process)
        middle, low, high = (math.exp(end) for end in (means_P.mean(), *student_interval(means_P)))
        return middle, low, high
    return float(np.median(values)), *median_interval(values)


def process_means(d: Samples, process: Sequence[int]) -> np.ndarray:
    """Return the trimmed mean d of every process, [P], ordered by process number. A fifth of the pairs is trimmed at
    either end, given enough pairs, so that a single interruption does not decide a process's mean.
    """
    d_N, process_N = np.asarray(d, dtype=float), np.asarray(process)
    return np.asarray([trim_mean(d_N[process_N == number], TRIMMED) for number in np.unique(process_N)])


def student_interval(values: Samples, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Student's interval of the mean of `values`; infinite with fewer than two."""
    values_N = np.asarray(values, dtype=float)
    if values_N.size < 2:
        return -math.inf, math.inf
    mean, error = float(values_N.mean()), float(values_N.std(ddof=1)) / math.sqrt(values_N.size)
    half = float(t.ppf((1 + confidence) / 2, values_N.size - 1)) * error
    return mean - half, mean + half


def noise_floor(d: Samples, process: Sequence[int] | None = None, process_sigma: float = 0.0) -> float:
    """Return by how much two equal arms can differ, from the d[n] of an A/A control: the half-width of the interval of
    its `effect` (natural logarithm, about a share).

    The control's own median is left out: a control judged by its own deviation could not fail.
    """
    return effect(d, process, process_sigma).half_width


def bootstrap_interval(
    values: Samples,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
    seed: int = 0,
    source: Sequence[int] | np.ndarray | None = None,
) -> tuple[float, float]:
    """Return scipy's BCa bootstrap interval of the mean of `values` (percentile where BCa is undefined), widened by
    `small_sample`: with eight values it would otherwise miss the mean in one case of eight instead of one of twenty.

    `source[i]` numbers the source of value i. Values of one source are drawn together, and the sample size is then the
    number of sources.
    """
    values_N = np.asarray(values, dtype=float)
    sums_S, counts_S = _by_source(values_N, source)
    if sums_S.size < 2:
        return -math.inf, math.inf
    if np.ptp(values_N) == 0:
        return float(values_N[0]), float(values_N[0])

    def mean_of(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    kinds = {"confidence_level": confidence, "n_resamples": resamples, "rng": np.random.default_rng(seed)}
    drawn = {"data": (sums_S, counts_S), "statistic": mean_of, "paired": True, "vectorized": True}
    interval = bootstrap(**drawn, method="BCa", **kinds).confidence_interval
    if not np.isfinite(interval).all():
        interval = bootstrap(**drawn, method="percentile", **kinds).confidence_interval
    mean, widened = float(values_N.mean()), small_sample(sums_S.size)
    return mean + float(interval[0] - mean) * widened, mean + float(interval[1] - mean) * widened


def skewed_interval(
    values: Samples, confidence: float = CONFIDENCE, source: Sequence[int] | np.ndarray | None = None
) -> tuple[float, float]:
    """Return Hall's interval of the mean of `values`: Student's interval, transformed by the skewness of the values
    (Hall 1992, On the removal of skewness by transformation; skewness as Joanes and Gill 1998, G1). `source` as in
    `bootstrap_interval`. The interval is infinite with fewer than three values or sources.

    Where few windows lose much and most lose little, a sample that lacks the few has too small a mean and too small a
    spread, and no bootstrap can draw values that the sample lacks.
    """
    values_N = np.asarray(values, dtype=float)
    sums_S, counts_S = _by_source(values_N, source)
    mean, n = float(values_N.mean()), sums_S.size
    if n < 3:
        return -math.inf, math.inf
    rest_S = sums_S - mean * counts_S
    error = float(rest_S.std(ddof=1)) * math.sqrt(n) / float(counts_S.sum())
    if np.ptp(values_N) == 0 or error == 0:
        return mean, mean
    rest_S = rest_S - rest_S.mean()
    bias = math.sqrt(n * (n - 1)) / (n - 2)
    skewness = bias * float((rest_S**3).mean() / (rest_S**2).mean() ** 1.5)
    quantile = float(t.ppf((1 + confidence) / 2, n - 1))

    def turned(x: float) -> float:
        if abs(skewness) < 1e-6:
            return x
        return 3 * math.sqrt(n) / skewness * float(np.cbrt(1 + skewness * (x / math.sqrt(n) - skewness / (6 * n))) - 1)

    return mean - error * turned(quantile), mean - error * turned(-quantile)


def _by_source(values_N: np.ndarray, source: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of the values of every source, [S] each; without `source` every value is its own source."""
    _, source_N = np.unique(np.arange(values_N.size) if source is None else np.asarray(source), return_inverse=True)
    return np.bincount(source_N, weights=values_N), np.bincount(source_N)


def small_sample(units: int) -> float:
    """Return the factor by which a bootstrap interval over few units must be widened: √(n/(n−1)) times Student's
    quantile over the normal one (Hesterberg 2015, What teachers should know about the bootstrap).
    """
    if units < 2:
        return math.inf
    return math.sqrt(units / (units - 1)) * float(t.ppf((1 + CONFIDENCE) / 2, units - 1)) / NORMAL


def items_needed(sigma: float, distance: float, factor: float = NON_INFERIORITY_FACTOR) -> int | None:
    """Return the number of items that show non-inferiority at a spread σ per item: (1.645 + 0.842)²·σ²/distance²; None
    where no number suffices.

    For a share, σ² is the discordance of the two arms and `distance` the margin. `factor` replaces the sum of quantiles
    for a bound at another level.
    """
    if not math.isfinite(sigma) or distance <= 0:
        return None
    return math.ceil((factor * sigma / distance) ** 2)


def percentiles(samples: Samples) -> dict[str, float | None]:
    """Return p50, p95 and p99 of `samples`; None where there are too few (20 samples for p95, 100 for p99)."""
    values = np.asarray(samples, dtype=float)
    enough = {"p50": (50, 1), "p95": (95, 20), "p99": (99, 100)}
    return {
        name: float(np.percentile(values, q)) if values.size >= least else None for name, (q, least) in enough.items()
    }
