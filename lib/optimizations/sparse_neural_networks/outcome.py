"""The outcome of sparsity: answers to its claims, published results against this run, the record's details.

Everything is computed from the measurements of `experiment` and `rivals`.
"""

from collections.abc import Sequence

import pandas as pd

from lib.measure.metrics.measurement import Measurement
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence import claims, relations
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.sparse_neural_networks import speed_sweep
from lib.optimizations.sparse_neural_networks.experiment import MatrixMasks, SparseModel, SparsitySetup
from lib.optimizations.sparse_neural_networks.masks import HALVES
from lib.optimizations.sparse_neural_networks.rivals import (
    AT_BYTES,
    COMPARED,
    INT4,
    INT8,
    ORDER,
    cut_zeros,
    order_holds,
    order_name,
)
from lib.optimizations.sparse_neural_networks.speed_sweep import LAYOUTS, PartPoint

CLAIMS = (
    "Random masks harm no more than chosen ones.",
    "SparseGPT harms no less than Wanda.",
    "Wanda harms no less than magnitude.",
    "Rounding to int8 harms less than pruning to the same bytes.",
    "No sparsity is fast enough to beat the fastest dense form.",
)


def refutations(setup: SparsitySetup, arms: Sequence[ThirdArm], points: Sequence[PartPoint]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS, from the divergences and from the timings of the part.

    The order of the methods is judged per row, where scores of all three compete in the same way.
    """
    name, rival = setup.method, f"{setup.method} {AT_BYTES[INT8]}"
    gpt, wanda, magnitude = (order_name(method, "row") for method in COMPARED)
    pairs = [(name, "random"), (gpt, wanda), (wanda, magnitude), (rival, INT8)]
    answers = [
        claims.harms_less(
            claim, claims.interval(arms, [chosen]), claims.interval(arms, [challenger]), (chosen, challenger)
        )
        for claim, (chosen, challenger) in zip(CLAIMS, pairs)
    ]
    return [*answers, _fast_enough(CLAIMS[4], points)]


def replications(
    setup: SparsitySetup, arms: Sequence[ThirdArm], in_order: Sequence[ThirdArm], curves: pd.DataFrame
) -> list[relations.Judged]:
    """Return the published results on pruning and rounding, judged by the divergences of this run's arms.

    The order of methods is judged on all matrices, everything else on the run's parts, which the evidence names. 2:4
    and 4:8 are compared with unstructured zeros at one half: in this run, or at that point of `curves`, the result of
    `impact`. Methods without a 2:4 arm are left out.
    """
    by_row = [claims.interval(in_order, [order_name(method, "row")]) for method in COMPARED]
    name = setup.method
    patterns = {method: _patterns(setup, method, arms, curves) for method in dict.fromkeys((name, *COMPARED))}
    at_bytes = f"{name} {AT_BYTES[INT4]}"
    rounded = next((m for arm in arms if arm.name == INT8 for m in arm.measurements if m.metric == "perplexity"), None)
    ratio = None
    if rounded is not None and rounded.ratio is not None and rounded.ci is not None:
        ratio = claims.Interval(rounded.ratio, *rounded.ci)
    share = f"{100 * ORDER['sparsity']:.0f} % zeros, chosen at once, KL: "
    judged = [
        relations.methods(*by_row),
        relations.rows(by_row[1], claims.interval(in_order, [order_name("wanda", "matrix")])),
        relations.patterns({method: known for method, known in patterns.items() if known["2:4"] or method == name}),
        relations.int8(ratio),
        relations.gptq(claims.interval(arms, [weight_only.BY_GPTQ]), claims.interval(arms, [INT4])),
        relations.int4(claims.interval(arms, [INT4]), {at_bytes: claims.interval(arms, [at_bytes])}),
    ]
    parts = setup.options["parts"]
    of_run = "" if parts == "all" else f"{parts.replace('_', '-')} matrices only: "
    return [
        judgement._replace(evidence=(share if number < 2 else of_run) + judgement.evidence)
        for number, judgement in enumerate(judged)
    ]


def _patterns(
    setup: SparsitySetup, method: str, arms: Sequence[ThirdArm], curves: pd.DataFrame
) -> dict[str, claims.Interval | None]:
    """Return pattern → divergence of `method` with half of the weights zero."""
    half = setup.options["sparsity"] == 0.5 and setup.options["pattern"] == "unstructured"
    unstructured = claims.interval(arms, [method]) if half else _at_half(setup, method, curves)
    halves = {pattern: claims.interval(arms, [f"{method}, {pattern}"]) for pattern in HALVES}
    return {"unstructured": unstructured} | halves


def _at_half(setup: SparsitySetup, method: str, curves: pd.DataFrame) -> claims.Interval | None:
    """Return the divergence of `method` with half of the weights zero, unstructured; None if the curves lack it."""
    if not len(curves) or setup.options["pattern"] not in ("unstructured", *HALVES):  # whose curves are unstructured
        return None
    point = curves[(curves["arm"] == method) & (curves["strength"] == 50)]
    return None if point.empty else claims.Interval(*(float(point.iloc[0][end]) for end in ("value", "low", "high")))


def _fast_enough(claim: str, points: Sequence[PartPoint]) -> ClaimAnswer:
    """Return the answer from the timings of the part.

    One better timing denies the claim; it is confirmed if every timing has a verdict and none is better. The evidence
    is the best ratio with a verdict and, if undecided, also the best without one.
    """
    times = [(m, point) for point in points for m in point.times if m.ratio and m.ci]
    if not times:
        return claim, None, "no part was timed"
    decided = ("better", "worse", "equivalent")
    judged = [pair for pair in times if pair[0].verdict in decided]
    rest = [pair for pair in times if pair[0].verdict not in decided]
    if better := [pair for pair in judged if pair[0].verdict == "better"]:
        return claim, False, f"best ratio {_best(better)[0]}"
    if not rest:
        return claim, True, f"best ratio {_best(judged)[0]}"
    best, reason = _best(rest)
    evidence = f"best ratio {best}; no verdict{f', as {reason}' if reason else ''}"
    return claim, None, f"{evidence}; best with a verdict {_best(judged)[0]}" if judged else evidence


def _best(times: Sequence[tuple[Measurement, PartPoint]]) -> tuple[str, str | None]:
    """Return the speed-up with the highest interval and its point of the sweep, and the reason if it has no verdict."""
    m, point = min(times, key=lambda pair: pair[0].ci[1] if pair[0].ci else 0.0)  # ratios are of times: lower is faster
    low, high = m.ci or (1.0, 1.0)
    where = f"{LAYOUTS[point.layout]}, {point.strength} % zeros, {m.workload.removeprefix('feed-forward part, ')}"
    gain = claims.Interval(1 / (m.ratio or 1), 1 / high, 1 / low)
    return f"{gain.in_words('×')}: {where}", m.reason


def details(
    setup: SparsitySetup,
    model: SparseModel,
    matrix: MatrixMasks,
    in_order: Sequence[ThirdArm],
    curves: pd.DataFrame,
    gains: pd.DataFrame,
) -> dict[str, dict[str, object]]:
    """Return the record's details: name → value, provenance, source and axes. `gains`: see `speed_sweep.times`."""
    table = matrix.table().to_dict("records")
    values = {
        "zeros": (model.zeros, "measured", "exact zeros of each matrix"),
        "one_matrix": (table, "measured", f"{matrix.name}, calibration text"),
        "short_of_tokens": (setup.short, "measured", "experts or matrices with fewer tokens than inputs, damped"),
        "without_tokens": (setup.unseen, "measured", "experts that no token reached, pruned by magnitude"),
        "fine_tuning_losses": (model.lessons.losses, "measured", "nats per token of each step"),
        "fine_tuning_held_out": (model.lessons.checks(), "measured", "KL on text set aside, by steps taken"),
        "order_at_60_percent": (order_holds(in_order), "measured", "SparseGPT ≤ Wanda ≤ magnitude, KL"),
        "impact": (curves.to_dict("records"), "measured", f"KL on held-out text over the share of {cut_zeros(setup)}"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "weights set to zero, %", "y": "KL, nats/token"}
    return entries | speed_sweep.details(gains)
