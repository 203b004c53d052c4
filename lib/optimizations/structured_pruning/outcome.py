"""The outcome of structured pruning: answers to its claims, published results against this run, record details.

Everything is computed from the measurements of `experiment` and `rivals`.
"""

import pandas as pd

from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.measurement import Measurement
from lib.optimizations.common.evidence import claims, relations
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.structured_pruning.experiment import PrunedModel, PruningSetup
from lib.optimizations.structured_pruning.rivals import BARE, BY_CHANCE, RANDOM_SEEDS

CLAIMS = (
    "Removing parts at random harms no more than removing the idle ones.",
    "Removing parts by the size of their weights harms no more than removing the idle ones.",
    "The gain drowns in the A/A noise although the bound predicts more than can be detected.",
)


def refutations(arms: list[ThirdArm], measurements: list[Measurement]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS, from the divergences of `controls` and from the timings."""
    chosen = claims.interval(arms, [BARE])
    by_chance = claims.interval(arms, [arm.name for arm in arms if arm.purpose == BY_CHANCE])
    by_weights = claims.interval(arms, ["magnitude"])
    return [
        claims.harms_less(CLAIMS[0], chosen, by_chance, ("the idle ones", f"{RANDOM_SEEDS} random choices")),
        claims.harms_less(CLAIMS[1], chosen, by_weights, ("the idle ones", "by weights")),
        _drowns(CLAIMS[2], measurements),
    ]


def _drowns(claim: str, measurements: list[Measurement]) -> ClaimAnswer:
    """Return the answer from the timings; undecided if the machine was too busy or the run too short to judge them."""
    answer, reason = claims.gain_drowns(claim, measurements), why_busy(measurements)
    if reason is None:
        return answer
    return claim, None, answer[2] if reason in answer[2] else f"{answer[2]}; {reason}"


def replications(setup: PruningSetup, measurements: list[Measurement], granularity: str) -> list[relations.Judged]:
    """Return the published results on pruning, judged by this run: the influence of blocks, accuracy against
    perplexity, and, if whole blocks were removed, generation against multiple choice.
    """
    named = {m.metric: m for m in measurements if m.workload in ("prefill", "generate")}
    scores = [_bounded(m) for m in measurements if m.metric in ("accuracy", "accuracy_norm") and m.margin is not None]
    ends = relations.with_weights(relations.ends(setup.influence), setup.loaded.random_weights)
    judged = [ends, relations.accuracy(named.get("perplexity"), scores)]
    if granularity == "depth" and scores:
        judged.append(relations.generation(named.get("retrieval_exact_match"), scores[0]))
    return judged


def _bounded(score: Measurement) -> Measurement:
    """Return `score` with an interval from the bound on its change, to either side, if no answer changed.

    Such a score was measured but has no other interval.
    """
    if score.ci or score.ratio != 1 or score.bound is None or not score.baseline:
        return score
    half = abs(score.bound) / score.baseline
    return score.model_copy(update={"ci": (1 - half, 1 + half)})


def details(
    setup: PruningSetup, shares: dict[str, float], chosen: PrunedModel, curves: pd.DataFrame
) -> dict[str, dict[str, object]]:
    """Return the record's details: name → value, provenance and source."""
    tokens = f"{setup.observation.tokens} calibration tokens"
    values = {
        "removed_share": (chosen.removed, "derived", "parameters of the decoder blocks"),
        "shares": (shares, "derived", "plan of what to remove"),
        "influence": (setup.influence, "measured", tokens),
        "experts_without_tokens": (setup.unseen, "measured", f"{tokens}; their channels are ranked by weights"),
        "distillation_losses": (chosen.lessons.losses, "measured", "nats per token of each step"),
        "distillation_held_out": (chosen.lessons.checks(), "measured", "KL on text set aside, by steps taken"),
        "impact": (curves.to_dict("records"), "measured", "KL on held-out text, bootstrap intervals"),
    }
    return {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
