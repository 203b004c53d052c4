"""Contributions of parts to a whole: interactions of two parts, Shapley values of several.

Works on the values of subsets of the parts, given per sample (a timing round, a text window), so that every estimate
has an interval over samples. Values must be additive when parts do not interact: natural logarithms of times, or losses
in nats.

Shapes: S samples.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from lib.measure.metrics import paired_stats

MOST_PARTS = 4


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over n samples."""

    value: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def over_rounds(values_S: Sequence[float] | np.ndarray, process_sigma: float = 0.0) -> Estimate:
    """Return the median of timed contrasts with its order-statistic interval, widened by `process_sigma`, the standard
    deviation of such a contrast between processes.
    """
    effect = paired_stats.effect(np.asarray(values_S, dtype=float).tolist(), process_sigma=process_sigma)
    return Estimate(effect.median, effect.low, effect.high, effect.n)


def mean_over_rounds(
    values_S: Sequence[float] | np.ndarray, process_sigma: float = 0.0, process: Sequence[int] | None = None
) -> Estimate:
    """Return the mean of timed contrasts with Student's interval, widened by `process_sigma` as in `over_rounds`.

    Unlike medians, the means of the parts add up to the mean of the whole. If the rounds ran in three or more processes
    (`process[i]` numbers the process of round i), mean and interval are over process means, as in
    `paired_stats.effect`.
    """
    if process is not None and len(set(process)) >= paired_stats.MINIMUM_PROCESSES:
        effect = paired_stats.effect(np.asarray(values_S, dtype=float), process)
        return Estimate(effect.median, effect.low, effect.high, effect.n)
    samples_S = np.asarray(values_S, dtype=float)
    mean, n = float(samples_S.mean()), len(samples_S)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n)
    within = float(student.ppf(0.975, n - 1) * samples_S.std(ddof=1) / math.sqrt(n))
    half = math.hypot(within, paired_stats.NORMAL * process_sigma)
    return Estimate(mean, mean - half, mean + half, n)


def over_items(
    values_S: Sequence[float] | np.ndarray, resamples: int = 2000, seed: int = 0, source_S: np.ndarray | None = None
) -> Estimate:
    """Return the mean over windows or items with its bootstrap interval.

    Samples of one source (`source_S`, such as the document of a window) are resampled together.
    """
    samples_S = np.asarray(values_S, dtype=float)
    low, high = paired_stats.bootstrap_interval(samples_S.tolist(), resamples=resamples, seed=seed, source=source_S)
    return Estimate(float(samples_S.mean()), low, high, len(samples_S))


def interaction(nothing_S: ArrayLike, first_S: ArrayLike, second_S: ArrayLike, both_S: ArrayLike) -> np.ndarray:
    """Return the effect of both minus the sum of the single effects: both − first − second + nothing, [S]."""
    nothing, first, second, both = (np.asarray(v, dtype=float) for v in (nothing_S, first_S, second_S, both_S))
    return both - first - second + nothing


def subsets(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all subsets of the parts, each in the order of `parts`, the empty one first.

    Raises ValueError for more than MOST_PARTS parts: each part doubles the number of subsets.
    """
    if len(parts) > MOST_PARTS:
        raise ValueError(f"{len(parts)} parts have {2 ** len(parts)} subsets; attribution takes at most {MOST_PARTS}")
    return [chosen for size in range(len(parts) + 1) for chosen in itertools.combinations(parts, size)]


def shapley(parts: Sequence[str], values: Mapping[tuple[str, ...], ArrayLike]) -> dict[str, np.ndarray]:
    """Return each part's Shapley value per sample, [S]: its mean marginal effect over all orders of joining.

    `values` has a row [S] for each of `subsets(parts)`. In every sample the Shapley values add up to the effect of the
    whole (Shapley 1953).
    """
    count, values_by_part = len(parts), dict[str, np.ndarray]()
    for part in parts:
        total = np.zeros(())
        for chosen in subsets([member for member in parts if member != part]):
            weight = math.factorial(len(chosen)) * math.factorial(count - len(chosen) - 1) / math.factorial(count)
            joined = tuple(member for member in parts if member in chosen or member == part)
            total = total + weight * (np.asarray(values[joined], dtype=float) - np.asarray(values[chosen], dtype=float))
        values_by_part[part] = total
    return values_by_part
