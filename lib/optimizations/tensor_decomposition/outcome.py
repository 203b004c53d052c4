"""The outcome of tensor decomposition: answers to its claims, published results against this run, record details.

Everything is computed from the measurements of `experiment` and `rivals`.
"""

from collections.abc import Sequence

import pandas as pd
from torch import nn

from lib.measure.metrics.measurement import Measurement
from lib.models.structure.replacements import factored
from lib.optimizations.common import rival_arms
from lib.optimizations.common.evidence import claims, relations
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.tensor_decomposition.experiment import (
    BARE,
    FITTED,
    FactoredModel,
    FactoringSetup,
    Ranks,
    expected_divergence,
)
from lib.optimizations.tensor_decomposition.rivals import BARE_EVEN, EVEN, PRUNED, Sweep

CLAIMS = (
    "Factors fitted to calibration text harm no less than factors of the bare matrices.",
    "Factors fitted to calibration text harm no less than parts pruned at equal bytes.",
    "Two thin products take as long as one thick one.",
)
PUBLISHED_AT = 0.2  # share of the parameters removed in the published result
UNEQUAL = 0.1  # tolerated difference, as a share of the bytes that factors remove


def replications(result: Sweep, compression: float) -> list[relations.Judged]:
    """Return the published comparison of plain and whitened factors at 20 % of each matrix, judged on this run's
    factors of uniform ranks; empty if this run removes another share.
    """
    if compression != PUBLISHED_AT:
        return []
    read = {arm.name: m for arm in result.arms for m in arm.measurements if m.metric == "perplexity"}
    dense = next((m.baseline for m in read.values()), None)
    plain, whitened = (relations.perplexity_of(read.get(name)) for name in (BARE_EVEN, EVEN))
    return [relations.svd(dense, plain, whitened)]


def refutations(arms: list[ThirdArm], optimized: nn.Module, measurements: Sequence[Measurement]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS, from the divergences at the run's strength and from its rates.

    The first two use whitened factors without refinement: the pruned rival is not trained either, though it is refitted
    to the same text in closed form. Plain factors count with the better of their two budgets, because the energy of
    bare matrices says little about where a rank is worth most. The pruned rival removes whole parts, so it may be
    larger or smaller; the evidence says by how much, and a result that the difference could explain is left open.
    """
    fitted, pruned = (claims.interval(arms, [name]) for name in (FITTED, PRUNED))
    bare = {name: known for name in (BARE, BARE_EVEN) if (known := claims.interval(arms, [name]))}
    best = min(bare, key=lambda name: bare[name].value, default=BARE)
    return [
        claims.harms_less(CLAIMS[0], fitted, bare.get(best), (FITTED, best)),
        _at_equal_bytes(claims.harms_less(CLAIMS[1], fitted, pruned, (FITTED, PRUNED)), arms),
        _as_fast(CLAIMS[2], optimized, measurements),
    ]


def _at_equal_bytes(answer: ClaimAnswer, arms: list[ThirdArm]) -> ClaimAnswer:
    """Return `answer` with the bytes that factors and pruning remove as further evidence.

    It becomes undecided (None) if the less harmful arm kept more bytes, by more than UNEQUAL of what factors remove.
    """
    claim, refuted, evidence = answer
    sized = {arm.name: arm for arm in arms if any(m.metric == "weights_bytes" for m in arm.measurements)}
    if not {FITTED, PRUNED} <= set(sized) or not (own := rival_arms.removed_bytes(sized[FITTED])):
        return answer
    more = rival_arms.removed_bytes(sized[PRUNED]) / own - 1
    evidence += f"; {PRUNED} removes {1 + more:.2f} times as many bytes as {FITTED}"
    explained = more < -UNEQUAL if refuted else more > UNEQUAL
    return claim, None if explained else refuted, evidence


def _as_fast(claim: str, optimized: nn.Module, measurements: Sequence[Measurement]) -> ClaimAnswer:
    """Return the answer from the rates of prefill and decoding: refuted if one is no gain, not refuted if both gain.

    Undecided if only stacks of experts were factored: a stack becomes three products, not two.
    """
    if not any(isinstance(module, factored.FactoredLinear) for module in optimized.modules()):
        return claim, None, "no matrix became two thin ones: only stacks of experts were factored"
    rates = [m for m in measurements if m.metric in rival_arms.RATES and m.ratio and m.ci]
    if not rates:
        return claim, None, "nothing was timed"
    verdicts = {m.verdict for m in rates}
    refuted = True if verdicts & {"worse", "equivalent"} else False if verdicts == {"better"} else None
    each = (f"{m.workload} {claims.ratio_in_words(m)}, {m.verdict}" for m in rates)
    return claim, refuted, "; ".join(each)


def details(
    setup: FactoringSetup,
    chosen: FactoredModel,
    ranks: dict[str, Ranks],
    curves: Sweep,
    judged: pd.DataFrame,
    one_matrix_seconds: float,
) -> dict[str, dict[str, object]]:
    """Return the record's details: name → value, provenance and source, plus axis labels for a curve."""
    values = {
        "removed_share": (chosen.removed, "derived", "bytes of the decoder's blocks"),
        "ranks": (chosen.ranks, "derived", "ranks of the factored modules"),
        "taught_blocks": (
            [{"before": before, "after": after} for before, after in chosen.errors],
            "measured",
            "error of each block's output before and after teaching, on text used for whitening but not for teaching",
        ),
        "break_even_ranks": (
            {matrix.name: matrix.break_even for matrix in setup.shown},
            "derived",
            f"m·n/(m+n), matrices of block {setup.middle}",
        ),
        "one_matrix_seconds": (one_matrix_seconds, "measured", f"plain spectrum of {setup.widest.name}, once"),
        "expected_divergence": (
            expected_divergence(setup, ranks),
            "estimated",
            "sum over whitened matrices of the divergence if each were cut alone, nats/token",
        ),
        "impact": (curves.rows, "measured", "KL on held-out text; paired prefill"),
        "domains": (judged.to_dict("records"), "measured", "KL on held-out text of two domains"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "decoder bytes removed, %", "y": "KL, nats/token"}
    return entries
