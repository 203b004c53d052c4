"""Rivals of chosen masks: other methods and patterns at the same share, weight-only int8 and int4, the order of the
methods, and a sweep of shares.

Returns plain data; independent of tables, figures and records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare import speed
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality.answers import Text
from lib.measure.roofline import cost_model
from lib.models.calibration.second_moments import matrices
from lib.optimizations.common import judgement, rival_arms
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.experiment import SparseModel, SparsitySetup
from lib.optimizations.sparse_neural_networks.masks import HALVES, METHODS, WITHIN
from lib.optimizations.sparse_neural_networks.matrix_pruning import INDEX_BYTES, csr_bytes, row_starts, stored_bytes

COMPARED = ("sparsegpt", "wanda", "magnitude")
WINDOWS, FEWEST_WINDOWS = 8, 4  # windows of held-out text on which rivals are judged
ORDER: dict[str, Any] = {"sparsity": 0.6, "pattern": "unstructured", "parts": "all"}  # every matrix, attention included
INT8, INT4 = weight_only.NAMES[8], weight_only.NAMES[4]
YARDSTICKS = ("random", "magnitude", INT8, INT4)  # arms that a chosen mask has to beat
AT_BYTES = {INT8: "at int8's bytes", INT4: "at int4's bytes"}
OTHER_PATTERNS = (*HALVES, "1x8")  # besides the run's own, if the matrices' sizes allow it
AT_ONCE = "the same share, chosen at once"  # purpose of the arms that differ from the run only in the method


@dataclass(frozen=True)
class SparseRivals:
    """Prunes one model in several ways and compares each with the baseline on a few windows."""

    setup: SparsitySetup
    reference: Text

    def judge(self, name: str, purpose: str, model: nn.Module) -> ThirdArm:
        """Return an arm with the perplexity, divergence, agreement and bytes of `model`."""
        return rival_arms.judged(self.setup.baseline, self.reference, name, purpose, model)

    def cut(self, name: str, purpose: str, **changed: Any) -> ThirdArm:
        """Return an arm pruned on the original model's inputs; `changed` are the options of `prune` that differ."""
        setup = self.setup
        options = setup.options | {"method": setup.method, "observed": setup.observed, "seed": setup.seed} | changed
        pruned = sparse.prune(setup.baseline, setup.calibration, **options)
        return self.judge_stored(name, purpose, pruned)

    def judge_stored(self, name: str, purpose: str, pruned: sparse.Pruned) -> ThirdArm:
        """Return an arm of a model whose zeros are stored, with the bytes that it would take in sparse storage."""
        arm = self.judge(name, purpose, pruned.model)
        return arm._replace(measurements=[*arm.measurements[:-1], _size_if_stored(self.setup, pruned)])


def _size_if_stored(setup: SparsitySetup, pruned: sparse.Pruned) -> Measurement:
    """Return the bytes of all weights with the pruned matrices in the layout that executes their pattern."""
    before = cost_model.weights_bytes(setup.baseline)
    replaced = [matrix for matrix in matrices(setup.baseline) if matrix.name in pruned.masks]
    stored = sum(stored_bytes(matrix, pruned.masks[matrix.name], pruned.pattern) for matrix in replaced)
    after = before - sum(matrix.weight.nbytes for matrix in replaced) + stored
    source = "pruned matrices in the layout that executes them, indices included"
    return measurement.counted("weights_bytes", "load", before, after, source)


def contest(setup: SparsitySetup, text: Text | None) -> SparseRivals | None:
    """Return the rivals, judged on the first windows of `text`, or None without text.

    At real size, where each of two dozen rivals reads for many seconds, they get a quarter of the windows, at least
    FEWEST_WINDOWS.
    """
    if text is None:
        return None
    fewer = setup.loaded.scale == "full" and max(FEWEST_WINDOWS, len(text.ids_NT) // 4)
    windows = min(WINDOWS, fewer or WINDOWS)
    return SparseRivals(setup, rival_arms.reference(setup.baseline, text, setup.effort, windows))


def controls(
    setup: SparsitySetup, arms: SparseRivals | None, model: SparseModel, prompt_BT: torch.Tensor, effort: Effort
) -> list[ThirdArm]:
    """Return the same share by other means: every method, patterns and budgets, the stages of the run, int8 and int4.

    The last arms are pruned until CSR takes as many bytes as each yardstick. The yardsticks are timed on `prompt_BT`;
    without rivals they are returned alone.
    """
    reference = None if arms is None else arms.reference
    options: dict[str, Any] = {"part": setup.options["parts"], "seed": setup.seed}
    yardsticks = rival_arms.yardsticks(setup.baseline, reference, prompt_BT, effort, **options)
    if arms is None or model.pruned is None:
        return yardsticks
    name, unstructured = setup.method, {"pattern": "unstructured"}
    patterns = [pattern for pattern in OTHER_PATTERNS if _is_possible(setup, pattern)]
    by_block = [_by_outliers(arms)] if _has_shares(setup) else []
    rest = () if setup.loaded.scale == "full" and effort.brief else COMPARED  # published results exist for each
    halves = [(other, pattern) for other in rest if other != name for pattern in patterns if pattern in HALVES]
    at_equal_bytes = []
    for arm in rival_arms.made(yardsticks):
        share, as_large = _share_at(setup, arm), (f"{name} {AT_BYTES[arm.name]}", rival_arms.EQUAL_BYTES)
        if 0 < share < 1:
            at_equal_bytes.append(arms.cut(*as_large, **unstructured, sparsity=share))
        else:
            at_equal_bytes.append(rival_arms.left_out(*as_large, "no share of zeros takes that many bytes in CSR"))
    return [
        *(arms.cut(method, AT_ONCE, method=method) for method in METHODS),
        *(arms.cut(f"{name}, {pattern}", "a pattern", pattern=pattern) for pattern in patterns),
        *(arms.cut(f"{other}, {pattern}", "a pattern", method=other, pattern=pattern) for other, pattern in halves),
        *by_block,
        arms.judge_stored(f"{name}, in order", "block after block", model.pruned),
        arms.judge(f"{name}, taught", _taught(model), model.optimized),
        *yardsticks,
        *rival_arms.by_gptq(setup.baseline, arms.reference, setup.calibration, setup.options["parts"]),
        *at_equal_bytes,
    ]


def _is_possible(setup: SparsitySetup, pattern: str) -> bool:
    """Return whether a pattern fits all matrices and leaves something of each at the run's share."""
    fits = sparse.misfit(setup.matrices, pattern) is None
    return fits and sparse.emptied(setup.matrices, setup.options["sparsity"], pattern) is None


def _by_outliers(arms: SparseRivals) -> ThirdArm:
    """Return the arm whose blocks lose different shares, or why it is left out."""
    name, purpose = f"{arms.setup.method}, OWL", "shares by block"
    try:
        return arms.cut(name, purpose, budget="owl")
    except UserError as reason:  # a block would lose all weights of a matrix
        return rival_arms.left_out(name, purpose, str(reason))


def _taught(model: SparseModel) -> str:
    """Return how the optimized model was made."""
    if model.lessons.kept:
        return "after fine-tuning"
    return "no fine-tuning step was kept" if model.steps else "stored sparse, not fine-tuned"


def optimized_arm(setup: SparsitySetup, arms: Sequence[ThirdArm]) -> ThirdArm | None:
    """Return the arm among `controls` that is the optimized model, or None if it was not judged."""
    return next((arm for arm in arms if arm.name == f"{setup.method}, taught"), None)


def _share_at(setup: SparsitySetup, yardstick: ThirdArm) -> float:
    """Return the share of zeros at which CSR saves as many bytes as the yardstick."""
    dense = sum(matrix.weight.nbytes for matrix in setup.matrices)
    starts = INDEX_BYTES * sum(row_starts(matrix.weight.shape) for matrix in setup.matrices)
    each = csr_bytes(setup.matrices[0].weight)
    return 1 - (dense - rival_arms.removed_bytes(yardstick) - starts) / (each * setup.weights)


def order(arms: SparseRivals | None) -> list[ThirdArm]:
    """Return arms of SparseGPT, Wanda and magnitude on every matrix, per row and, if that differs, per matrix."""
    if arms is None:
        return []
    setup = arms.setup
    observed = setup.observed
    if observed is not None and observed.part != ORDER["parts"]:
        observed = sparse.observe(setup.baseline, setup.calibration, parts=ORDER["parts"])
    return [
        arms.cut(order_name(name, place), "order", method=name, within=place, observed=observed, **ORDER)
        for name in COMPARED
        for place in (WITHIN if name != "sparsegpt" else ("row",))
    ]


def order_name(method: str, within: str) -> str:
    """Return the name of the arm that prunes all matrices by `method`, with scores competing `within` row or matrix."""
    return f"{method}{'' if method == 'sparsegpt' else f', per {within}'}, all matrices"


def order_holds(arms: Sequence[ThirdArm]) -> dict[str, bool] | None:
    """Return whether SparseGPT ≤ Wanda ≤ magnitude in divergence, by where scores compete.

    None if one of them has no interval: without arms, or if all windows come from one document.
    """
    values = {arm.name: kl.value for arm in arms if (kl := claims.interval([arm], [arm.name]))}
    holds = {}
    for within in WITHIN:
        divergences = [values[name] for method in COMPARED if (name := order_name(method, within)) in values]
        if len(divergences) < len(COMPARED):
            return None
        holds[f"per {within}"] = divergences == sorted(divergences)
    return holds


def read_order(arms: Sequence[ThirdArm]) -> tuple[str, str]:
    """Return two sentences on the order of the methods."""
    holds = order_holds(arms)
    if holds is None:
        return "The methods were not compared.", "Their order is unknown without an interval for each."
    answer = {place: "holds" if held else "does not hold" for place, held in holds.items()}
    return (
        f"In the means, KL(SparseGPT) ≤ KL(Wanda) ≤ KL(magnitude) {answer['per row']} if weights compete within a row.",
        f"If they compete within the matrix, it {answer['per matrix']}.",
    )


def impact(arms: SparseRivals | None, strengths: Sequence[int], judged: Sequence[ThirdArm] = ()) -> pd.DataFrame:
    """Return the divergence in nats per token by the share of zeros in percent (`strength`), one `arm` per method.

    Arms at the run's share that are among the `judged` controls are not pruned again. 2:4 and 4:8 have only one share,
    so for them the curves are of unstructured zeros.
    """
    rows: list[dict[str, object]] = []
    if arms is None:
        return pd.DataFrame()
    any_share = _has_shares(arms.setup)
    pattern = {} if any_share else {"pattern": "unstructured"}
    at_share = {arm.name: arm for arm in judged if arm.purpose == AT_ONCE and any_share}
    for strength in strengths:
        measured = at_share if strength / 100 == arms.setup.options["sparsity"] else {}
        for name in COMPARED:
            try:
                arm = measured.get(name) or arms.cut(name, "impact", method=name, sparsity=strength / 100, **pattern)
            except UserError:  # such a share leaves nothing of a matrix
                continue
            if divergence := claims.interval([arm], [name]):
                rows.append({"arm": name, **divergence._asdict(), "strength": strength})
    return pd.DataFrame(rows)


def over_share(setup: SparsitySetup) -> str:
    """Return the description of the curves of `impact`."""
    return f"Divergence over the share of {cut_zeros(setup)}, a curve for each method."


def cut_zeros(setup: SparsitySetup) -> str:
    """Return the kind of zeros that `impact` varies."""
    return "zeros" if _has_shares(setup) else "unstructured zeros"


def _has_shares(setup: SparsitySetup) -> bool:
    """Return whether the run's pattern allows any share of zeros."""
    return setup.options["pattern"] not in HALVES


def zeros_stored_dense(
    setup: SparsitySetup, model: SparseModel, prompt_BT: torch.Tensor, effort: Effort, invalid: str | None
) -> list[ThirdArm]:
    """Return an arm of the fine-tuned model with zeros stored, its prefill timed against the baseline.

    Empty for an untrained model.
    """
    if model.tuned is None:
        return []
    options: dict[str, Any] = {
        "names": ("prefill",),
        "with_energy": False,
        "costs": {"skip_zeros": True},
        "seed": setup.seed,
    }
    compared = speed.compare(setup.baseline, model.tuned.model, prompt_BT, effort, invalid=invalid, **options)
    return [ThirdArm("zeros stored dense", "the mask without the format", judgement.timed(compared).measurements)]
