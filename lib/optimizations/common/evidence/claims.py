"""Decide whether a run refutes a claim, by comparing intervals, or a gain with its noise.

An answer is a plain triple (claim, refuted, evidence) that a notebook turns into `refutation.Refutation`: `refuted` is
None if the run cannot tell, `evidence` is a phrase that holds the number.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lib.measure.metrics import digits
from lib.measure.metrics.decision import BUSY_FLOOR, FACTOR
from lib.measure.metrics.measurement import Measurement

ClaimAnswer = tuple[str, "bool | None", str]


class ThirdArm(NamedTuple):
    """A third arm with its measurements; the fields are those of a record's control."""

    name: str
    purpose: str
    measurements: list[Measurement]


class Interval(NamedTuple):
    """One number of an arm with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.in_words()

    def in_words(self, sign: str = "", neutral: float | None = None) -> str:
        """Return the number, followed by `sign`, and its interval, with as many digits as its width justifies; three
        significant figures if the interval has no width.

        An end that differs from `neutral` is never rounded to it; None: the value of no change, 0 or 1.
        """
        signs = self.low < 0
        neutral = (0.0 if signs else 1.0) if neutral is None else neutral
        text, ends = digits.with_ends(*self, neutral=neutral, signs=signs)
        if text is None or self.low == self.high:
            text, low, high = (f"{number:.3g}".replace("-", digits.MINUS) for number in self)
            ends = f"{low}{digits.DASH if self.low >= 0 else ' to '}{high}"
        return f"{text}{sign} ({ends})"


def ratio_in_words(measured: Measurement, sign: str = "×") -> str:
    """Return the ratio of a measurement with its interval, as `Interval.in_words` does; three significant figures if
    there is no interval, "not measured" if there is no ratio.
    """
    if measured.ratio is None:
        return "not measured"
    return Interval(measured.ratio, *measured.ci).in_words(sign) if measured.ci else f"{measured.ratio:.3g}{sign}"


def interval(arms: Iterable[ThirdArm], names: Sequence[str], metric: str = "kl_divergence_nats") -> Interval | None:
    """Return the mean of `metric` over the named arms and the hull of their intervals; None if no arm has one."""
    values = [
        (m.optimized, *m.ci)
        for arm in arms
        if arm.name in names
        for m in arm.measurements
        if m.metric == metric and m.optimized is not None and m.ci
    ]
    if not values:
        return None
    means, lows, highs = zip(*values)
    return Interval(sum(means) / len(means), min(lows), max(highs))


def harms_less(
    claim: str, chosen: Interval | None, rival: Interval | None, names: tuple[str, str], unit: str = "nats KL"
) -> ClaimAnswer:
    """Return the answer to the claim that the chosen arm harms less than the rival.

    Lower values are better. Overlapping intervals leave the claim undecided. `names` are those of (chosen, rival).
    """
    if chosen is None or rival is None:
        missing = names[0] if chosen is None else names[1]
        return claim, None, f"{missing}: not measured"
    evidence = ", ".join(f"{name} {number} {unit}" for name, number in zip(names, (chosen, rival)))
    refuted = True if chosen.low > rival.high else False if chosen.high < rival.low else None
    return claim, refuted, evidence


def gain_drowns(claim: str, measurements: Iterable[Measurement]) -> ClaimAnswer:
    """Return the answer to a claim that is refuted if a gain that should be detectable was not detected.

    A gain is detectable if its physical bound exceeds both the smallest effect that its blocks can detect and the noise
    floor of its A/A control. Among the rates with a detectable gain, the one with the largest bound is judged. A rate
    without a verdict, timed on a busy machine, or whose interval spans a factor, decides nothing; it is used only if
    there is no other.
    """
    rates = [m for m in measurements if m.unit.endswith("/s") and m.predicted and m.ratio]
    if not rates:
        return claim, None, "no gain was predicted: nothing was timed or no bound is known"
    detectable = [m for m in rates if (m.predicted or 0.0) > _least(m)]
    able = [m for m in detectable if not _unusable(m)] or detectable or rates
    rate = max(able, key=lambda m: m.predicted or 0.0)
    least = _least(rate)
    evidence = f"{rate.workload}: bound predicts {rate.predicted:.2f}×, detectable from {least:.2f}×"
    if rate.predicted is None or rate.ratio is None or rate.predicted <= least:
        return claim, None, evidence
    evidence += f", measured {ratio_in_words(rate)}"
    if _unusable(rate):
        return claim, None, f"{evidence}; {rate.reason or rate.verdict}"
    return claim, rate.verdict != "better", evidence


def _least(rate: Measurement) -> float:
    """Return the smallest gain of a rate, as a ratio, that its blocks and its A/A control can detect."""
    return math.exp(max(rate.mde or 0.0, rate.noise_floor or 0.0))


def _unusable(rate: Measurement) -> bool:
    """Return whether a rate has no verdict because of how it was measured, not because of the model."""
    if rate.verdict not in ("better", "worse", "equivalent", "inconclusive"):
        return True
    low, high = rate.ci or (1.0, 1.0)
    busy = bool(rate.disturbed) or (rate.noise_floor or 0.0) > BUSY_FLOOR
    return rate.verdict == "inconclusive" and (busy or high >= FACTOR * low)
