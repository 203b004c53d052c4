"""What chosen masks are compared with: other methods and patterns at the same share, weight-only int8 and int4, the
order of the methods, a sweep of shares, and from them the answers to what would refute the claims.

Returns plain data. Knows nothing of tables, figures or records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.measure.compare import speed
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality.evaluate import Text
from lib.measure.roofline import cost_model
from lib.models.calibration.second_moments import matrices
from lib.optimizations.common import rival_arms
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence import claims, relations
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.experiment import MatrixMasks, SparseModel, SparsitySetup
from lib.optimizations.sparse_neural_networks.masks import METHODS, WITHIN
from lib.optimizations.sparse_neural_networks.speed_sweep import LAYOUTS, PartPoint

CLAIMS = (
    "Random masks harm no more than chosen ones.",
    "SparseGPT harms no less than Wanda.",
    "Wanda harms no less than magnitude.",
    "Rounding to int8 harms less than pruning to the same bytes.",
    "No sparsity is fast enough to beat the fastest dense form.",
)
COMPARED = ("sparsegpt", "wanda", "magnitude")
WINDOWS, FEWEST_WINDOWS = 8, 4  # of held-out text, on which rivals are judged
ORDER: dict[str, Any] = {"sparsity": 0.6, "pattern": "unstructured", "parts": "all"}  # every matrix, attention included
INT8, INT4 = weight_only.NAMES[8], weight_only.NAMES[4]
YARDSTICKS = ("random", "magnitude", INT8, INT4)  # what a chosen mask has to do better than
AT_BYTES = {INT8: "at int8's bytes", INT4: "at int4's bytes"}
AT_ONCE = "the same share, chosen at once"  # the purpose of the arms that differ from the run in the method alone
CSR_BYTES = 8  # of a stored weight: four of value, four of column


# --- rivals at the same share ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseRivals:
    """Prunes one model in several ways; each is compared with the baseline on a few windows."""

    setup: SparsitySetup
    reference: Text

    def judge(self, name: str, purpose: str, model: nn.Module) -> ThirdArm:
        """Return an arm with perplexity, divergence, agreement and bytes of `model`."""
        return rival_arms.judged(self.setup.baseline, self.reference, name, purpose, model)

    def cut(self, name: str, purpose: str, **changed: Any) -> ThirdArm:
        """Return an arm pruned on the unpruned model's inputs; `changed` are options of `method.prune` that differ."""
        setup = self.setup
        options = setup.options | {"method": setup.method, "observed": setup.observed, "seed": setup.seed} | changed
        pruned = sparse.prune(setup.baseline, setup.calibration, **options)
        return self.judge_stored(name, purpose, pruned)

    def judge_stored(self, name: str, purpose: str, pruned: sparse.Pruned) -> ThirdArm:
        """Return an arm of a model whose zeros are stored, with the bytes that it takes as CSR."""
        arm = self.judge(name, purpose, pruned.model)
        return arm._replace(measurements=[*arm.measurements[:-1], _size_if_stored(self.setup, pruned)])


def _size_if_stored(setup: SparsitySetup, pruned: sparse.Pruned) -> Measurement:
    """Return the bytes of all weights once the pruned matrices are stored as CSR."""
    before = cost_model.weights_bytes(setup.baseline)
    nonzeros = sum(int(mask.sum()) for mask in pruned.masks.values())
    rows = sum(mask.numel() // mask.shape[-1] + mask[..., 0, 0].numel() for mask in pruned.masks.values())
    replaced = sum(matrix.weight.nbytes for matrix in matrices(setup.baseline) if matrix.name in pruned.masks)
    after = before - replaced + CSR_BYTES * nonzeros + 4 * rows
    return measurement.counted("weights_bytes", "load", before, after, "pruned matrices as CSR, indices included")


def contest(setup: SparsitySetup, text: Text | None) -> SparseRivals | None:
    """Return the rivals, judged on the first windows of `text`; None where the baseline read none.

    At real size, where each of two dozen rivals reads for many seconds, on a quarter of them, but on FEWEST_WINDOWS.
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

    The last ones are pruned until CSR takes as many bytes as each of the yardsticks does. Without rivals the yardsticks
    alone, which are timed on `prompt_BT`.
    """
    reference = None if arms is None else arms.reference
    options: dict[str, Any] = {"part": setup.options["parts"], "seed": setup.seed}
    yardsticks = rival_arms.yardsticks(setup.baseline, reference, prompt_BT, effort, **options)
    if arms is None or model.pruned is None:
        return yardsticks
    name, unstructured = setup.method, {"pattern": "unstructured"}
    at_equal_bytes = [
        arms.cut(f"{name} {AT_BYTES[arm.name]}", rival_arms.EQUAL_BYTES, **unstructured, sparsity=share)
        for arm in yardsticks
        if 0 < (share := _share_at(setup, arm)) < 1
    ]
    return [
        *(arms.cut(method, AT_ONCE, method=method) for method in METHODS),
        arms.cut(f"{name}, 2:4", "a pattern", pattern="2:4"),
        arms.cut(f"{name}, 1x8", "a pattern", pattern="1x8"),
        arms.cut(f"{name}, OWL", "shares by block", budget="owl"),
        arms.judge_stored(f"{name}, in order", "block after block", model.pruned),
        arms.judge(f"{name}, taught", _taught(model), model.optimized),
        *yardsticks,
        *rival_arms.by_gptq(setup.baseline, arms.reference, setup.calibration, setup.options["parts"]),
        *at_equal_bytes,
    ]


def _taught(model: SparseModel) -> str:
    """Return what made the optimized model."""
    if model.lessons.kept:
        return "after fine-tuning"
    return "no step of fine-tuning was kept" if model.steps else "stored sparse, not fine-tuned"


def optimized_arm(setup: SparsitySetup, arms: Sequence[ThirdArm]) -> ThirdArm | None:
    """Return the arm among `controls` that is the optimized model; None where none was judged."""
    return next((arm for arm in arms if arm.name == f"{setup.method}, taught"), None)


def _share_at(setup: SparsitySetup, yardstick: ThirdArm) -> float:
    """Return the share of zeros at which CSR saves as many bytes as the yardstick does."""
    dense = sum(matrix.weight.nbytes for matrix in setup.matrices)
    return 1 - (dense - rival_arms.removed_bytes(yardstick)) / (CSR_BYTES * setup.weights)


def order(arms: SparseRivals | None) -> list[ThirdArm]:
    """Return SparseGPT, Wanda and magnitude on every matrix, per row and, where that differs, per matrix."""
    if arms is None:
        return []
    setup = arms.setup
    observed = setup.observed
    if observed is not None and observed.part != ORDER["parts"]:
        observed = sparse.observe(setup.baseline, setup.calibration, parts=ORDER["parts"])
    return [
        arms.cut(_order_name(name, place), "order", method=name, within=place, observed=observed, **ORDER)
        for name in COMPARED
        for place in (WITHIN if name != "sparsegpt" else ("row",))
    ]


def _order_name(method: str, within: str) -> str:
    return f"{method}{'' if method == 'sparsegpt' else f', per {within}'}, all matrices"


def order_holds(arms: Sequence[ThirdArm]) -> dict[str, bool] | None:
    """Return whether SparseGPT ≤ Wanda ≤ magnitude in divergence, by where scores compete; None without arms."""
    if not arms:
        return None
    values = {arm.name: kl.value for arm in arms if (kl := claims.interval([arm], [arm.name]))}
    holds = {}
    for within in WITHIN:
        gpt, wanda, magnitude = (values[_order_name(method, within)] for method in COMPARED)
        holds[f"per {within}"] = gpt <= wanda <= magnitude
    return holds


def read_order(arms: Sequence[ThirdArm]) -> tuple[str, str]:
    """Return two sentences on the order of the methods."""
    holds = order_holds(arms)
    if holds is None:
        return "The methods were not compared.", "Without text no order is known."
    answer = {place: "holds" if held else "does not hold" for place, held in holds.items()}
    return (
        f"In their means KL(SparseGPT) ≤ KL(Wanda) ≤ KL(magnitude) {answer['per row']} where weights compete in a row.",
        f"Where they compete within the matrix it {answer['per matrix']}.",
    )


def impact(arms: SparseRivals | None, strengths: Sequence[int], judged: Sequence[ThirdArm] = ()) -> pd.DataFrame:
    """Return the divergence in nats per token over the share of zeros in percent (`strength`), an `arm` per method.

    What is among the `judged` controls, at the share of the run, is not pruned again.
    """
    rows: list[dict[str, object]] = []
    if arms is None:
        return pd.DataFrame()
    at_share = {arm.name: arm for arm in judged if arm.purpose == AT_ONCE}
    for strength in strengths:
        known = at_share if strength / 100 == arms.setup.options["sparsity"] else {}
        for name in COMPARED:
            arm = known.get(name) or arms.cut(name, "impact", method=name, sparsity=strength / 100)
            if divergence := claims.interval([arm], [name]):
                rows.append({"arm": name, **divergence._asdict(), "strength": strength})
    return pd.DataFrame(rows)


def zeros_stored_dense(
    setup: SparsitySetup, model: SparseModel, prompt_BT: torch.Tensor, effort: Effort, invalid: str | None
) -> list[ThirdArm]:
    """Return the fine-tuned model with its zeros stored, its prefill timed against the baseline; none if untrained."""
    if model.tuned is None:
        return []
    options: dict[str, Any] = {
        "names": ("prefill",),
        "with_energy": False,
        "costs": {"skip_zeros": True},
        "seed": setup.seed,
    }
    compared = speed.compare(setup.baseline, model.tuned.model, prompt_BT, effort, invalid=invalid, **options)
    return [ThirdArm("zeros stored dense", "the mask without the format", compared.measurements)]


# --- the answers -----------------------------------------------------------------------------------------------------


def refutations(setup: SparsitySetup, arms: Sequence[ThirdArm], points: Sequence[PartPoint]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS: from the divergences, and from the times of the part.

    The order of the methods is judged per row, where all three compete alike.
    """
    name, rival = setup.method, f"{setup.method} {AT_BYTES[INT8]}"
    gpt, wanda, magnitude = (_order_name(method, "row") for method in COMPARED)
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
    """Return what others published of pruning and rounding, judged by the divergences of this run's arms.

    2:4 is compared with unstructured zeros where those are half of the weights as well: in this run, or at that point
    of the `curves` that `impact` returned.
    """
    by_row = [claims.interval(in_order, [_order_name(method, "row")]) for method in COMPARED]
    name, half = setup.method, setup.options["sparsity"] == 0.5 and setup.options["pattern"] == "unstructured"
    free = claims.interval(arms, [name]) if half else _at_half(setup, curves)
    at_bytes = f"{name} {AT_BYTES[INT4]}"
    rounded = next((m for arm in arms if arm.name == INT8 for m in arm.measurements if m.metric == "perplexity"), None)
    ratio = None
    if rounded is not None and rounded.ratio is not None and rounded.ci is not None:
        ratio = claims.Interval(rounded.ratio, *rounded.ci)
    share = f"{100 * ORDER['sparsity']:.0f} % zeros, chosen at once, KL: "
    judged = [
        relations.methods(*by_row),
        relations.rows(by_row[1], claims.interval(in_order, [_order_name("wanda", "matrix")])),
        relations.patterns({name: {"unstructured": free, "2:4": claims.interval(arms, [f"{name}, 2:4"])}}),
        relations.int8(ratio),
        relations.gptq(claims.interval(arms, [weight_only.BY_GPTQ]), claims.interval(arms, [INT4])),
        relations.int4(claims.interval(arms, [INT4]), {at_bytes: claims.interval(arms, [at_bytes])}),
    ]
    return [
        judgement._replace(evidence=share + judgement.evidence) if number < 2 else judgement
        for number, judgement in enumerate(judged)
    ]


def _at_half(setup: SparsitySetup, curves: pd.DataFrame) -> claims.Interval | None:
    """Return the divergence of the run's method with half of the weights zero, unstructured; None where no curve has
    that point.
    """
    if not len(curves) or setup.options["pattern"] != "unstructured":
        return None
    point = curves[(curves["arm"] == setup.method) & (curves["strength"] == 50)]
    return None if point.empty else claims.Interval(*(float(point.iloc[0][end]) for end in ("value", "low", "high")))


def _fast_enough(claim: str, points: Sequence[PartPoint]) -> ClaimAnswer:
    """Return the answer by the times of the part: one that is better denies the claim, none that could be better
    confirms it. The evidence is the best ratio with a verdict and, where that decides nothing, the best without one.
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
    """Return the gain in time whose interval lies highest and where it was found, and why it has no verdict."""
    m, point = min(times, key=lambda pair: pair[0].ci[1] if pair[0].ci else 0.0)  # the ratio is one of times
    low, high = m.ci or (1.0, 1.0)
    where = f"{LAYOUTS[point.layout]}, {point.strength} % zeros, {m.workload.removeprefix('feed-forward part, ')}"
    return f"{1 / (m.ratio or 1):.2f}× ({1 / high:.2f}–{1 / low:.2f}): {where}", m.reason


def details(
    setup: SparsitySetup,
    model: SparseModel,
    matrix: MatrixMasks,
    in_order: Sequence[ThirdArm],
    curves: pd.DataFrame,
) -> dict[str, dict[str, object]]:
    """Return what a record holds of quality beside measurements: name → value, provenance, source and axes."""
    table = matrix.table().to_dict("records")
    values = {
        "zeros": (model.zeros, "measured", "exact zeros of each matrix"),
        "one_matrix": (table, "measured", f"{matrix.name}, calibration text"),
        "short_of_tokens": (setup.short, "measured", "experts or matrices with fewer tokens than inputs, damped"),
        "without_tokens": (setup.unseen, "measured", "experts that no token reached, pruned by magnitude"),
        "fine_tuning_losses": (model.lessons.losses, "measured", "nats per token of each step"),
        "fine_tuning_held_out": (model.lessons.checks(), "measured", "KL on text set aside, by steps taken"),
        "order_at_60_percent": (order_holds(in_order), "measured", "SparseGPT ≤ Wanda ≤ magnitude, KL"),
        "impact": (curves.to_dict("records"), "measured", "KL on held-out text"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "weights set to zero, %", "y": "KL, nats/token"}
    return entries
