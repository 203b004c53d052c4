"""Answers to what would refute a claim, as plain triples that a notebook turns into `refutation.Refutation`.

An answer is (claim, refuted, evidence): `refuted` is None where the run cannot tell, `evidence` a phrase that holds the
number. Knows how to compare intervals and a gain with its noise; knows no optimization.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
    evidence = ", ".join(
        f"{name} {number.value:.3g} ({number.low:.3g}–{number.high:.3g}) {unit}"
        for name, number in zip(names, (chosen, rival))
    )
    refuted = True if chosen.low > rival.high else False if chosen.high < rival.low else None
    return claim, refuted, evidence


def gain_drowns(claim: str, measurements: Iterable[Measurement]) -> ClaimAnswer:
    """Return the answer to a claim that is refuted where a gain that should be detectable was not detected.

    Judged is the rate whose physical bound predicts the largest gain. It is detectable where it exceeds both the
    smallest effect that the blocks can detect and the noise floor of the A/A control. A rate that was not judged, or on
    a busy machine, or by blocks that span a factor, tells of no gain and refutes none.
    """
    rates = [m for m in measurements if m.unit.endswith("/s") and m.predicted and m.ratio]
    if not rates:
        return claim, None, "no gain was predicted: nothing was timed or no bound is known"
    rate = max(rates, key=lambda m: m.predicted or 0.0)
    least = math.exp(max(rate.mde or 0.0, rate.noise_floor or 0.0))
    evidence = f"{rate.workload}: bound predicts {rate.predicted:.2f}×, detectable from {least:.2f}×"
    if rate.predicted is None or rate.predicted <= least:
        return claim, None, evidence
    low, high = rate.ci or (rate.ratio, rate.ratio)
    evidence += f", measured {rate.ratio:.2f}× ({low:.2f}–{high:.2f})"
    if _unusable(rate):
        return claim, None, f"{evidence}; {rate.reason or rate.verdict}"
    return claim, rate.verdict != "better", evidence


def _unusable(rate: Measurement) -> bool:
    """Return whether a rate has no verdict for a reason that is the measuring's, not the model's."""
    if rate.verdict not in ("better", "worse", "equivalent", "inconclusive"):
        return True
    low, high = rate.ci or (1.0, 1.0)
    busy = bool(rate.disturbed) or (rate.noise_floor or 0.0) > BUSY_FLOOR
    return rate.verdict == "inconclusive" and (busy or high >= FACTOR * low)
