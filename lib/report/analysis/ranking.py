"""Ranks with their uncertainty: how each optimization places in a metric when every gain is drawn from its interval.

A gain is a ratio turned so that above 1 is better. Over several models the logarithms are averaged. A gain is as
uncertain as its interval or its noise floor says, whichever is wider; the same answers in both arms are as uncertain as
the bound of an unseen loss; numbers without any of these (bytes, counts) count as exact. A score that was not exercised
says nothing of an optimization, and has no place. Knows no page.
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
    """Where an optimization stands: its rank, the 90 % interval of the rank, the mean gain, over how many models, and
    for how many of them the number was called anything (of settled records: for the whole set).
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
    """Return the places in a metric, best first; optimizations without it have none."""
    groups: dict[str, list[Measurement]] = {}
    for record in records:
        able = (m for m in record.measurements if m.metric == metric and m.verdict != "not_exercised")
        first = next((m for m in able if sentence.gain(m)[0]), None)
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
        gain = geometric_mean([gain for m in members if (gain := sentence.gain(m)[0])])
        labels = sorted({m.provenance for m in members})
        called = sum(m.verdict in CALLS for m in members)
        standings.append((name, int(low), int(high), gain, len(members), called, ", ".join(labels)))
    standings.sort(key=lambda standing: -standing[3])
    # Equals share a rank: bytes that were counted alike are no order.
    ranks = [1 + sum(other[3] > standing[3] * (1 + 1e-9) for other in standings) for standing in standings]
    return [
        Rank(name, rank, low, high, gain, models, called, labels)
        for rank, (name, low, high, gain, models, called, labels) in zip(ranks, standings)
    ]


def _draws(members: Sequence[Measurement], chance: np.random.Generator) -> np.ndarray:
    """Return draws of the mean logarithm of the gains."""
    total = np.zeros(DRAWS)
    for member in members:
        middle, _, _ = sentence.gain(member)
        if middle is None:
            continue  # `places` takes only members with a gain
        low, high = significance.ratio_ends(member) or (1.0, 1.0)
        half = math.log(high / max(low, significance.LEAST)) / 2  # of a score that may be 0, nearly anything
        error = max(half, member.noise_floor or 0.0) / 1.96
        total += math.log(middle) + error * chance.standard_normal(DRAWS)
    return total / len(members)


def geometric_mean(gains: Sequence[float]) -> float:
    """Return the geometric mean of ratios; 0 where one of them is."""
    if min(gains) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, gains)) / len(gains))
