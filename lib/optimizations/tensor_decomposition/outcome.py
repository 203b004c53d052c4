"""The outcome of tensor decomposition: the answer to each claim, what others published held against this run, and the
record's details.

Everything is computed from what `experiment` and `rivals` have measured.
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
PUBLISHED_AT = 0.2  # of the parameters
UNEQUAL = 0.1  # of the bytes that factors remove


def replications(result: Sweep, compression: float) -> list[relations.Judged]:
    """Return what was published of plain and of whitened factors at 20 % of each matrix, judged where this run removes
    as much, on factors of uniform ranks.
    """
    if compression != PUBLISHED_AT:
        return []
    read = {arm.name: m for arm in result.arms for m in arm.measurements if m.metric == "perplexity"}
    dense = next((m.baseline for m in read.values()), None)
    plain, whitened = (relations.perplexity_of(read.get(name)) for name in (BARE_EVEN, EVEN))
    return [relations.svd(dense, plain, whitened)]


def refutations(arms: list[ThirdArm], optimized: nn.Module, measurements: Sequence[Measurement]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS: from the divergences at the strength of the run, and from its rates.

    The first two are about whitened factors without refinement: the pruned rival is not trained either, but what reads
    its parts is fitted to the same text in closed form. Bare factors are those of the better budget: the energy of bare
    matrices says little about where a rank is worth most. Parts come whole, so the pruned rival may be larger or
    smaller: the evidence says by how much, and what the difference may explain decides nothing.
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
    """Return the answer on factors and pruned parts with the bytes that each removes; None where the arm that harms
    less has kept more of them, by more than UNEQUAL of what the factors remove.
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
    """Return the answer by the rates of prefill and of decoding: refuted where one of them is no gain, not where both
    are. A stack of experts becomes three products, not two: where nothing else was factored, nothing can be told.
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
    """Return what a record holds beside measurements: name → value, provenance, source and further words on it."""
    values = {
        "removed_share": (chosen.removed, "derived", "bytes of the decoder's blocks"),
        "ranks": (chosen.ranks, "derived", "ranks of the factored modules"),
        "taught_blocks": (
            [{"before": before, "after": after} for before, after in chosen.errors],
            "measured",
            "error of each block's output, before and after its factors were taught, on text whitened with, not taught",
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
            "sum over whitened matrices, each as if cut alone, nats/token",
        ),
        "impact": (curves.rows, "measured", "KL on held-out text; paired prefill"),
        "domains": (judged.to_dict("records"), "measured", "KL on held-out text of two domains"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "decoder bytes removed, %", "y": "KL, nats/token"}
    return entries
