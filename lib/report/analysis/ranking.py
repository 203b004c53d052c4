"""Ranks with their uncertainty: the rank of each optimization in a metric when every gain is drawn from its interval.

A gain is a ratio, inverted where lower is better: above 1 is better. Logarithms are averaged over models. The
uncertainty of a gain is its interval or its noise floor, whichever is wider; of identical answers in both arms, the
bound on an unseen loss; numbers without any of these (bytes, counts) are exact. A score that was not exercised says
nothing about an optimization and is not ranked. Knows no page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.measure.metrics import significance
from lib.measure.metrics.measurement import Measurement
from lib.report.records.record import Record
from lib.report.text import sentence

DRAWS = 4000
METRICS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "f1_macro",
    "weights_bytes",
    "peak_tensor_bytes",
    "cpu_seconds_per_token",
    "energy_joules_per_token",
)
CALLS = ("better", "worse", "maintained", "not_maintained")


@dataclass(frozen=True)
class Rank:
    """The rank of an optimization, its 90 % interval (`low`, `high`), the mean gain, the number of models, and for how
    many of them (`called`) the verdict is better, worse, maintained or not maintained.
    """

    optimization: str
    rank: int
    low: int
    high: int
    gain: float
    models: int
    called: int
    provenance: str


def places(records: Sequence[Record], metric: str) -> list[Rank]:
    """Return the ranks in `metric`, best first; optimizations without it are left out."""
    groups: dict[str, list[Measurement]] = {}
    for record in records:
        able = (m for m in record.measurements if m.metric == metric and m.verdict != "not_exercised")
        first = next((m for m in able if _gain(m) is not None), None)
        if record.status == "ok" and first is not None:
            groups.setdefault(record.optimization, []).append(first)
    if not groups:
        return []
    chance = np.random.default_rng(0)
    drawn_OR = np.stack([_draws(members, chance) for members in groups.values()])
    ranks_OR = 1 + (drawn_OR[None] > drawn_OR[:, None]).sum(1)
    standings = []
    for (name, members), ranks_R in zip(groups.items(), ranks_OR):
        low, high = np.quantile(ranks_R, [0.05, 0.95], method="nearest")
        gain = geometric_mean([gain for m in members if (gain := _gain(m)) is not None])
        labels = sorted({m.provenance for m in members})
        called = sum(m.verdict in CALLS for m in members)
        standings.append((name, int(low), int(high), gain, len(members), called, ", ".join(labels)))
    standings.sort(key=lambda standing: -standing[3])
    # Equal gains share a rank, such as equal byte counts.
    ranks = [1 + sum(other[3] > standing[3] * (1 + 1e-9) for other in standings) for standing in standings]
    return [
        Rank(name, rank, low, high, gain, models, called, labels)
        for rank, (name, low, high, gain, models, called, labels) in zip(ranks, standings)
    ]


def _gain(measurement: Measurement) -> float | None:
    """Return the gain of a measurement: 0 for a score without any correct answer left, the largest loss; None if it has
    no ratio.
    """
    lost = measurement.ratio == 0 and measurement.higher_is_better
    return 0.0 if lost else sentence.gain(measurement)[0]


def _draws(members: Sequence[Measurement], chance: np.random.Generator) -> np.ndarray:
    """Return DRAWS draws of the mean logarithm of the gains."""
    total = np.zeros(DRAWS)
    for member in members:
        middle = _gain(member)
        if middle is None:
            continue  # `places` takes only members with a gain
        low, high = (max(end, significance.LEAST) for end in significance.ratio_ends(member) or (1.0, 1.0))
        half = math.log(high / low) / 2  # very wide for a score that may be 0
        error = max(half, member.noise_floor or 0.0) / 1.96
        total += math.log(max(middle, significance.LEAST)) + error * chance.standard_normal(DRAWS)
    return total / len(members)


def geometric_mean(gains: Sequence[float]) -> float:
    """Return the geometric mean of ratios; 0 where one of them is not positive."""
    if min(gains) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, gains)) / len(gains))
