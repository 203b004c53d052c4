"""How far the gain of one set lies from that of another, with its interval: from paired blocks, from both stored
intervals, or in points of a score. Knows no verdict and no files.

Each function returns (effect, low, high, standard error, degrees of freedom): of the natural logarithm of the gains'
ratio, or of the points by which they differ.
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
    """Whether both intervals are over processes, so that the stored ratios are means over these and no medians."""
    return min(old.processes or 1, new.processes or 1) >= paired_stats.MINIMUM_PROCESSES


def scatters(measurement: Measurement) -> bool:
    """Whether a number was read several times and not always the same; then an interval alone tells its scatter."""
    samples = measurement.samples or {}
    same = bool(samples) and all(len(set(values)) == 1 for values in samples.values())
    return measurement.n not in significance.SINGLE and not same


def differences(measurement: Measurement) -> np.ndarray | None:
    """Return ln(optimized / baseline) of each block, or None where the samples were not kept or are too few."""
    samples = measurement.samples or {}
    base, opt = (np.array(samples.get(arm, [])) for arm in ("baseline", "optimized"))
    if len(base) != len(opt) or len(base) < FEWEST_BLOCKS or (base <= 0).any() or (opt <= 0).any():
        return None
    return np.log(opt / base)


def by_blocks(old: np.ndarray, new: np.ndarray) -> Gap:
    """From the logarithms of both sets' blocks: the difference of their medians, bootstrapped."""
    places = _middles(len(old), len(new))
    ranked = [np.sort(d)[place] for d, place in zip((old, new), places, strict=True)]
    medians = [0.5 * (low + high) for low, high in ranked]
    spread = medians[1] - medians[0]
    low, high = np.quantile(spread, [LEVEL / 2, 1 - LEVEL / 2])
    return float(np.median(new) - np.median(old)), float(low), float(high), float(spread.std()), len(old) + len(new) - 2


@lru_cache(maxsize=16)
def _middles(*lengths: int) -> list[np.ndarray]:
    """Return for each length the places (2 × RESAMPLES) in the sorted values whose mean is a resample's median.

    The same resamples serve every pair of measurements of these lengths, so they are drawn once.
    """
    chance, places = np.random.default_rng(0), []
    for length in lengths:
        drawn = np.sort(chance.integers(0, length, (RESAMPLES, length)), axis=1)
        places.append(np.stack([drawn[:, (length - 1) // 2], drawn[:, length // 2]]))
    return places


def at_least(blocks: Gap, old: Measurement, new: Measurement) -> Gap:
    """Return a comparison by blocks with the variance between processes: no side's error is smaller than that of its
    stored interval or of its noise floor, which both hold it (and a stored standard deviation between processes).

    Blocks of one process are not independent: the degrees of freedom are those of the stored intervals. Where these
    widen, p is below 0.05 exactly where they exclude no change, and falls beyond as slowly as few processes ask.
    """
    effect, low, high, deviation, _ = blocks
    half, freedom = NORMAL * math.hypot(error(old), error(new)), _freedom(old, new)
    if half <= NORMAL * deviation:
        return effect, low, high, deviation, freedom
    return effect, min(low, effect - half), max(high, effect + half), half / _quantile(freedom), freedom


def by_intervals(old: Measurement, new: Measurement) -> Gap | None:
    """As `by_blocks`, from both intervals, treated as independent: too wide where the items are the same. p is below
    0.05 exactly where the interval excludes no change, with the degrees of freedom of both (items, or processes).

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
    """As `by_intervals`, of scores, in points (above 0 is better): where an arm answers nothing right, or so little
    that its interval holds zero, a ratio has no logarithm. None where a side has no interval.
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
    """Return the standard error of a measurement's logarithm: by its interval, its noise floor, or the standard
    deviation between processes, whichever is largest."""
    low, high = significance.ratio_ends(measurement) or (1.0, 1.0)
    by_ends = math.log(high / low) / 2 if low > 0 else 0.0
    sigma = (measurement.process_sigma or 0.0) / math.sqrt(measurement.processes or 1)
    return max(by_ends / NORMAL, (measurement.noise_floor or 0.0) / NORMAL, sigma)


def p_value(effect: float, deviation: float, freedom: int) -> float:
    """Return the two-sided p of an effect with its standard error."""
    from scipy import special

    return float(2 * special.stdtr(freedom, -abs(effect) / deviation)) if deviation > 0 else float(effect == 0)
