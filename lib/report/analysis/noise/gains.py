"""The difference between the gains of two sets, with its interval: from paired blocks, from both stored intervals, or
in points of a score. Knows no verdict and no files.

A `Gap` is (effect, low, high, standard error, degrees of freedom), in natural logarithms of the ratio of the gains, or
in points.
"""

import math
from functools import lru_cache

import numpy as np

from lib.measure.metrics import paired_stats, significance
from lib.measure.metrics.measurement import Measurement

LEVEL = 0.05
NORMAL = 1.96
RESAMPLES = 4000
FEWEST_BLOCKS = 6

Gap = tuple[float, float, float, float, int]


def over_processes(old: Measurement, new: Measurement) -> bool:
    """Return whether both intervals are over processes; the stored ratios are then means over these, not medians."""
    return min(old.processes or 1, new.processes or 1) >= paired_stats.MINIMUM_PROCESSES


def scatters(measurement: Measurement) -> bool:
    """Return whether a number was read several times and varied: its spread is then known only from an interval."""
    samples = measurement.samples or {}
    same = bool(samples) and all(len(set(values)) == 1 for values in samples.values())
    return measurement.n not in significance.SINGLE and not same


def differences(measurement: Measurement) -> np.ndarray | None:
    """Return ln(optimized / baseline) of each block; None where samples are missing, too few or not positive."""
    samples = measurement.samples or {}
    base, opt = (np.array(samples.get(arm, [])) for arm in ("baseline", "optimized"))
    if len(base) != len(opt) or len(base) < FEWEST_BLOCKS or (base <= 0).any() or (opt <= 0).any():
        return None
    return np.log(opt / base)


def by_blocks(old: np.ndarray, new: np.ndarray) -> Gap:
    """Return the difference of the medians of both sets' log ratios per block, with a bootstrapped interval."""
    places = _middles(len(old), len(new))
    ranked = [np.sort(d)[place] for d, place in zip((old, new), places, strict=True)]
    medians = [0.5 * (low + high) for low, high in ranked]
    spread = medians[1] - medians[0]
    low, high = np.quantile(spread, [LEVEL / 2, 1 - LEVEL / 2])
    return float(np.median(new) - np.median(old)), float(low), float(high), float(spread.std()), len(old) + len(new) - 2


@lru_cache(maxsize=16)
def _middles(*lengths: int) -> list[np.ndarray]:
    """Return for each length the indices (2 × RESAMPLES) into the sorted values whose mean is a resample's median.

    All pairs of measurements with these lengths share the same resamples, so they are drawn once.
    """
    chance, places = np.random.default_rng(0), []
    for length in lengths:
        drawn = np.sort(chance.integers(0, length, (RESAMPLES, length)), axis=1)
        places.append(np.stack([drawn[:, (length - 1) // 2], drawn[:, length // 2]]))
    return places


def at_least(blocks: Gap, old: Measurement, new: Measurement) -> Gap:
    """Return a comparison by blocks, widened to include the variance between processes: each side's error is at least
    that of its stored interval, noise floor and standard deviation between processes.

    Blocks of one process are not independent, so the degrees of freedom are those of the stored intervals. Where the
    interval is widened, p is below 0.05 exactly if it excludes no change; with few processes p falls slowly beyond.
    """
    effect, low, high, deviation, _ = blocks
    half, freedom = NORMAL * math.hypot(error(old), error(new)), _freedom(old, new)
    if half <= NORMAL * deviation:
        return effect, low, high, deviation, freedom
    return effect, min(low, effect - half), max(high, effect + half), half / _quantile(freedom), freedom


def by_intervals(old: Measurement, new: Measurement) -> Gap | None:
    """Return the difference of the gains from both stored intervals, treated as independent: too wide where both sets
    use the same items. p is below 0.05 exactly if the interval excludes no change, with the degrees of freedom of both
    sides (items, or processes).

    None where a ratio or its interval is unknown or not positive.
    """
    ratios, errors = [], []
    for m in (old, new):
        ends = significance.ratio_ends(m)
        if not ends or min(ends) <= 0 or not m.ratio or m.ratio <= 0:
            return None
        ratios.append(m.ratio)
        errors.append(error(m))
    return _spread(math.log(ratios[1] / ratios[0]), NORMAL * math.hypot(*errors), _freedom(old, new))


def by_points(old: Measurement, new: Measurement) -> Gap | None:
    """Return the difference of two scores' changes from their intervals, in points (above 0 is better): for a score
    whose ratio has no logarithm, because it is 0 or its interval includes 0. None where a side has no interval.
    """
    changes, halves = [], []
    for m in (old, new):
        known = significance.gains(m)
        if known is None:
            return None
        change, low, high = known
        if low is None or high is None:
            if change:
                return None
            low, high = -abs(m.bound or 0.0), abs(m.bound or 0.0)  # the same answers
        changes.append(change)
        halves.append((high - low) / 2)
    return _spread(changes[1] - changes[0], math.hypot(*halves), _freedom(old, new))


def _spread(effect: float, half: float, freedom: int) -> Gap:
    return effect, effect - half, effect + half, half / _quantile(freedom), freedom


def _freedom(old: Measurement, new: Measurement) -> int:
    return sum(map(significance.freedom_of, (old, new)))


def _quantile(freedom: int) -> float:
    """Return Student's 97.5 % quantile."""
    from scipy import special

    return float(special.stdtrit(freedom, 1 - LEVEL / 2))


def error(measurement: Measurement) -> float:
    """Return the standard error of a measurement's log ratio: the largest of those from its interval, its noise floor,
    and the standard deviation between processes.
    """
    low, high = significance.ratio_ends(measurement) or (1.0, 1.0)
    by_ends = math.log(high / low) / 2 if low > 0 else 0.0
    sigma = (measurement.process_sigma or 0.0) / math.sqrt(measurement.processes or 1)
    return max(by_ends / NORMAL, (measurement.noise_floor or 0.0) / NORMAL, sigma)


def p_value(effect: float, deviation: float, freedom: int) -> float:
    """Return the two-sided p-value of an effect with the standard error `deviation` (Student's t)."""
    from scipy import special

    return float(2 * special.stdtr(freedom, -abs(effect) / deviation)) if deviation > 0 else float(effect == 0)
