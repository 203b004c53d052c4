"""Answers to what would refute a claim, as plain triples that a notebook turns into `refutation.Refutation`.

An answer is (claim, refuted, evidence): `refuted` is None where the run cannot tell, `evidence` a phrase that holds the
number. Knows how to compare intervals and a gain with its noise; knows no optimization.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lib.measure.metrics import digits
from lib.measure.metrics.decision import BUSY_FLOOR, FACTOR
from lib.measure.metrics.measurement import Measurement

ClaimAnswer = tuple[str, "bool | None", str]


class ThirdArm(NamedTuple):
    """A third arm and what was measured on it; the fields are those of a record's control."""

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
        """Return the number, followed by `sign`, with its interval: in the digits that this deserves, or in three
        figures where it has no width. `neutral`: what an end that is not equal to it is not shown as; None: no change.
        """
        signs = self.low < 0
        neutral = (0.0 if signs else 1.0) if neutral is None else neutral
        text, ends = digits.with_ends(*self, neutral=neutral, signs=signs)
        if text is None or self.low == self.high:
            text, low, high = (f"{number:.3g}".replace("-", digits.MINUS) for number in self)
            ends = f"{low}{digits.DASH if self.low >= 0 else ' to '}{high}"
        return f"{text}{sign} ({ends})"


def ratio_in_words(measured: Measurement, sign: str = "×") -> str:
    """Return the ratio of a measurement with its interval, in the digits that this deserves: in three figures where
    there is no interval, "not measured" where there is no ratio.
    """
    if measured.ratio is None:
        return "not measured"
    return Interval(measured.ratio, *measured.ci).in_words(sign) if measured.ci else f"{measured.ratio:.3g}{sign}"


def interval(arms: Iterable[ThirdArm], names: Sequence[str], metric: str = "kl_divergence_nats") -> Interval | None:
    """Return the mean of `metric` over the named arms and the hull of their intervals, None where none has one."""
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
    """Return the answer to a claim that is refuted where the rival harms no more than the chosen arm.

    Lower values are better. Overlapping intervals cannot tell. `names` are those of (chosen, rival).
    """
    if chosen is None or rival is None:
        missing = names[0] if chosen is None else names[1]
        return claim, None, f"{missing}: not measured"
    evidence = ", ".join(f"{name} {number} {unit}" for name, number in zip(names, (chosen, rival)))
    refuted = True if chosen.low > rival.high else False if chosen.high < rival.low else None
    return claim, refuted, evidence


def gain_drowns(claim: str, measurements: Iterable[Measurement]) -> ClaimAnswer:
    """Return the answer to a claim that is refuted where a gain that should be detectable was not detected.

    Judged is, of the rates whose gain is detectable, the one whose physical bound predicts the largest: a gain that
    exceeds both the smallest effect that its blocks can detect and the noise floor of its A/A control. A rate that was
    not judged, or on a busy machine, or by blocks that span a factor, tells of no gain and refutes none; it answers
    only where no other can.
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
    """Return the least gain of a rate that its blocks and its A/A control can tell from none, as a ratio."""
    return math.exp(max(rate.mde or 0.0, rate.noise_floor or 0.0))


def _unusable(rate: Measurement) -> bool:
    """Return whether a rate has no verdict for a reason that is the measuring's, not the model's."""
    if rate.verdict not in ("better", "worse", "equivalent", "inconclusive"):
        return True
    low, high = rate.ci or (1.0, 1.0)
    busy = bool(rate.disturbed) or (rate.noise_floor or 0.0) > BUSY_FLOOR
    return rate.verdict == "inconclusive" and (busy or high >= FACTOR * low)
