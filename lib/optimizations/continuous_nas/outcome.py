"""The outcome of continuous architecture search: targets reached, the answer to each claim, and the record's details.

Everything is computed from the measurements of `experiment`, `equal_effort`, `rivals` and `drift`.
"""

import pandas as pd

from lib.measure.compare.speed import Compared
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.continuous_nas import drift, method, rivals
from lib.optimizations.continuous_nas.additivity import Additivity
from lib.optimizations.continuous_nas.drift import Drifts
from lib.optimizations.continuous_nas.equal_effort import EqualEffort

CLAIMS = (
    "Random choices do as well for the same number of evaluations.",
    "Treating all blocks alike does as well at the same latency.",
    "Divergences do not add up, so the programme ranks wrongly: a rank correlation below one half.",
    "After a drift, beginning again is no slower than resuming.",
)


def targets(equal: EqualEffort, comparison: rivals.RivalComparison, drifted: Drifts) -> pd.DataFrame:
    """Return each target, its value, and whether it was reached; targets were fixed before the first run."""
    closer, volumes, adaptations = comparison.closer, equal.volumes, drifted.adaptations
    own = volumes["search"]  # 0 reaches no target, whatever the others dominate
    against_uniform = own / volumes["uniform"] if volumes["uniform"] else None
    slowest = max(row["solved again, s"] for row in drifted.rows)
    counts = [followed.evaluations_until(drift.LEVEL) for followed in adaptations]
    third = all(n is not None and n <= len(a.cold) / 3 for n, a in zip(counts, adaptations))
    slowest_follow = None if None in counts else max(n for n in counts if n is not None)
    closer = closer if comparison.has_rival_no_faster else None  # no comparison at equal speed
    nearer = closer is not None and comparison.refuted()[0] is False  # by its interval, like the claim
    rows = [
        ("hypervolume at least 1.1 of random's", equal.gain, own > 0 and (equal.gain is None or equal.gain >= 1.1)),
        ("hypervolume above that of all blocks alike", against_uniform, own > volumes["uniform"]),
        ("closer than all blocks alike at equal speed", closer, nearer),
        ("solved again within a second", slowest, slowest <= 1),
        ("95 % of the cold hypervolume in a third of its evaluations", slowest_follow, third),
    ]
    return pd.DataFrame(rows, columns=["target", "value", "reached"])


def refutations(
    equal: EqualEffort, comparison: rivals.RivalComparison, added: Additivity, drifted: Drifts, seed: int = 0
) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS."""
    answers = (equal.refuted(), comparison.refuted(seed), added.refuted(), drifted.refuted())
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def arms(compared: Compared, comparison: rivals.RivalComparison, equal: EqualEffort) -> list[ThirdArm]:
    """Return the controls of a record: A/A, the rivals at equal latency, random and uniform choices."""
    return [ThirdArm("A/A", "a copy of the baseline", compared.control()), *comparison.controls, *equal.controls()]


def details(
    equal: EqualEffort, added: Additivity, times: list[dict], drifted: Drifts, reached: pd.DataFrame
) -> dict[str, tuple[object, str, str]]:
    """Return the record's details: name → (value, provenance, source)."""
    counts = ", ".join(f"{arm} {len(points)}" for arm, points in equal.points.items())
    each, judged = f"evaluations: {counts}; reference {method.REFERENCE}", len(added.evaluations)
    left_out = {"left_out": (added.left_out, "measured", "KL on search text, each option alone")}
    return (left_out if added.left_out else {}) | {
        "targets": (reached.to_dict("records"), "measured", "computed from this record's numbers"),
        "hypervolumes": (equal.volumes, "measured", each),
        "credits": (equal.credits, "measured", "hypervolume after each part of the search, and of greedy choice"),
        "fronts": (equal.fronts().to_dict("records"), "measured", "KL on search text, times of parts"),
        "rank_correlation": (added.rank, "measured", f"{judged} choices, predicted against measured KL"),
        "times_add_up": (times, "measured", "balanced blocks; the interval where there are six"),
        "drift": (drifted.rows, "measured", "perf_counter, once; evaluations counted"),
        "adaptation": (drifted.curves().to_dict("records"), "measured", "hypervolume after each evaluation"),
    }
