"""The decision rule: turns an effect, its interval and its noise floor into a verdict, with the reason if it is
inconclusive, and computes the effect that the rule can detect. Works on natural logarithms and knows nothing about how
they were measured, so that a stored measurement can be judged again from its own fields.
"""

import math
from dataclasses import dataclass
from typing import Literal

Word = Literal["better", "worse", "equivalent", "inconclusive"]

BUSY_FLOOR = 0.10  # where two equal arms differ by more than this, the machine allows no verdict on speed
BUSY, NOISY = "the machine was busy", f"is above {100 * BUSY_FLOOR:.0f} %"  # phrases that mark such reasons
FACTOR = 2.0  # an interval of few pairs whose upper end is this many times the lower end allows no verdict
FEW_PAIRS = 6  # or processes, where these are the independent units
POWER_FACTOR = 0.84  # the standard normal's 80 % quantile
MEDIAN_FACTOR = 1.25  # √(π/2): how much wider a median scatters than a mean


@dataclass(frozen=True)
class Ruling:
    """A verdict, with the reason if it is inconclusive (else None)."""

    verdict: Word
    reason: str | None = None


def decide(
    effect: float,
    low: float,
    high: float,
    *,
    n: int,
    floor: float,
    margin: float,
    higher_is_better: bool,
    busy: str | None = None,
    processes: int | None = None,
) -> Ruling:
    """Return the ruling on an `effect` ln(optimized / baseline) with its 95 % interval `low` to `high`.

    Better and worse need three things: the interval excludes 0, and the effect exceeds both the practical `margin` (a
    share) and the noise `floor` (a logarithm). Equivalent needs the whole interval, and the effect plus or minus the
    floor, inside ±margin. Anything else is inconclusive, and so is everything on a busy machine (`busy` states the
    disturbance), above a floor of 10 %, or where at most six pairs give an interval that spans a factor of two. Where
    the interval is over `processes`, these are counted instead of the `n` pairs.
    """
    threshold = math.log1p(margin)
    if busy:
        return Ruling("inconclusive", f"{BUSY}: {busy}; measure again on a quiet machine")
    if floor > BUSY_FLOOR:
        above = f"the noise floor of {100 * floor:.3g} % {NOISY}"
        return Ruling("inconclusive", f"{above}; more rounds or a quieter machine would tell")
    if (processes or n) <= FEW_PAIRS and high - low >= math.log(FACTOR):
        few = f"{processes} processes" if processes else f"{n} pairs"
        return Ruling("inconclusive", f"{few} whose interval spans a factor of {math.exp(high - low):.1f}")
    excludes = low > 0 or high < 0
    if excludes and abs(effect) > max(threshold, floor):
        return Ruling("better" if (effect > 0) == higher_is_better else "worse")
    if low > -threshold and high < threshold and abs(effect) + floor < threshold:
        return Ruling("equivalent")
    return Ruling("inconclusive", _gate(effect, low, high, threshold, floor, margin))


def _gate(effect: float, low: float, high: float, threshold: float, floor: float, margin: float) -> str:
    """Return which condition of a verdict failed; for an interval within the margin, that is always the noise floor."""
    noise, within = f"the noise floor of {100 * floor:.2g} %", f"the practical margin of {100 * margin:g} %"
    inside = low > -threshold and high < threshold
    if low <= 0 <= high:
        if inside:
            return f"the interval includes zero difference, but with {noise} one beyond {within} cannot be ruled out"
        return "the interval includes zero difference, and is too wide to be called equivalent"
    if abs(effect) <= floor:
        return f"the effect lies within {noise}"
    assert abs(effect) <= threshold
    if inside:
        return f"the effect lies within {within}, but with {noise} a larger one cannot be ruled out"
    return f"the effect lies within {within}, but its interval reaches beyond"


def detectable(half_width: float, scatter: float, *, floor: float, margin: float) -> float:
    """Return the smallest effect (logarithm) that `decide` would detect with 80 % power.

    `half_width` is half the width of the interval, `scatter` the standard deviation of the estimate.
    """
    return max(math.log1p(margin), floor, half_width) + POWER_FACTOR * scatter
