"""The protocol of the notebook on sparse networks: one matrix by every method, the sparse model, rivals at the same
share, the order of the methods, a sweep of shares, and the answers to what would refute it.

Returns plain data. The speed of one part over sparsity is timed by `speed_sweep`. Knows nothing of tables, figures or
records.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.compare import speed
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.measure.quality.evaluate import Text
from lib.measure.roofline import cost_model
from lib.models.calibration import second_moments
from lib.models.calibration.second_moments import Matrix, Moments
from lib.models.loading import Loaded
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import claims
from lib.optimizations.common.claims import ClaimAnswer, ThirdArm
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.int8 import int8
from lib.optimizations.sparse_neural_networks.masks import METHODS, WITHIN, keep, score, sparsegpt
from lib.optimizations.sparse_neural_networks.speed_sweep import PartPoint

CLAIMS = (
    "Random masks harm no more than chosen ones.",
    "SparseGPT harms no less than Wanda.",
    "Wanda harms no less than magnitude.",
    "Rounding to int8 harms less than pruning to the same bytes.",
    "No sparsity is fast enough to beat the fastest dense form.",
)
COMPARED = ("sparsegpt", "wanda", "magnitude")
MOST_SEQUENCES = 32  # of calibration text that choose weights
WINDOWS = 8  # of held-out text, on which rivals are judged
CORNER = 48  # rows and columns of a mask that are shown
ORDER = {"sparsity": 0.6, "pattern": "unstructured", "parts": "all"}  # the share of Sun et al. 2024, tables 2 and 3
YARDSTICKS = ("random", "magnitude", "int8")  # what a chosen mask has to do better than
INT8, AT_INT8_BYTES = "int8", "at int8's bytes"


@dataclass(frozen=True)
class SparsitySetup:
    """A model, what is to be pruned of it (`options` of `method.prune`), and moments of the matrices' inputs by name.

    Random weights have nothing to be calibrated for: there `method` is "magnitude" and there are no moments.
    """

    loaded: Loaded
    method: str
    options: dict[str, object]
    calibration: list[dict[str, torch.Tensor]]
    finetune_batches: list[dict[str, torch.Tensor]]
    moments: dict[str, Moments]
    matrices: list[Matrix]
    seed: int

    @property
    def baseline(self) -> nn.Module:
        return self.loaded.model

    @property
    def trained(self) -> bool:
        return not self.loaded.random_weights

    @property
    def weights(self) -> int:
        """The number of weights in the matrices that are pruned."""
        return sum(matrix.weight.numel() for matrix in self.matrices)

    @property
    def short_of_tokens(self) -> int:
        """The number of experts that saw fewer tokens than they have inputs, summed over matrices."""
        return sum(
            int((self.moments[matrix.name].tokens < matrix.weight.shape[-1]).sum())
            for matrix in self.matrices
            if self.moments
        )

    def facts(self) -> dict[str, object]:
        """Return what is about to be pruned, for a table."""
        return {
            "model": f"{self.loaded.parameters.name}, {self.loaded.scale}",
            "matrices": len(self.matrices),
            "their weights": f"{self.weights:,}",
            "share of all parameters": f"{self.weights / cost_model.parameters(self.baseline):.2f}",
            "experts short of tokens": self.short_of_tokens,
        }


def set_up(loaded: Loaded, effort: Effort, method: str, options: dict[str, object], seed: int) -> SparsitySetup:
    """Return the model with its calibration text, observed in one pass. Raises UserError for options out of range."""
    chosen = "magnitude" if loaded.random_weights else method
    sparse.check(loaded.model, method=chosen, **options)
    count, length = effort.calibration_sequences, effort.calibration_tokens
    calibration = prompts.calibration(loaded, min(MOST_SEQUENCES, count), length, seed)
    finetune_batches = prompts.calibration(loaded, 4 * count, length, seed, tokens_at_once=512)
    moments = {} if loaded.random_weights else sparse.observe(loaded.model, calibration)
    matrices = second_moments.matrices(loaded.model, str(options["parts"]))
    return SparsitySetup(loaded, chosen, options, calibration, finetune_batches, moments, matrices, seed)


# --- the mechanism on one matrix -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixMasks:
    """One matrix (of experts the first) as every method prunes it: masks [O, I], pruned weights [1, O, I]."""

    name: str
    weight_1OI: torch.Tensor
    kept: dict[str, torch.Tensor]
    pruned: dict[str, torch.Tensor]
    gram_1II: torch.Tensor | None

    @property
    def labels(self) -> dict[str, str]:
        """Axes and title of a figure of the corners."""
        return {"x_label": "input", "y_label": "output", "title": f"{self.name}, first {CORNER} × {CORNER}"}

    def corners(self) -> dict[str, np.ndarray]:
        """Return the first rows and columns of each mask."""
        return {name: mask[:CORNER, :CORNER].cpu().numpy() for name, mask in self.kept.items()}

    def table(self) -> pd.DataFrame:
        """Return for each method: share kept, overlap with the first method, and the relative error of the output.

        The error is ‖x·(W−Ŵ)ᵀ‖ ÷ ‖x·Wᵀ‖ on calibration inputs, None without.
        """
        first = next(iter(self.kept.values()))
        rows = [
            {
                "method": name,
                "kept": float(mask.float().mean()),
                "overlap": float((mask & first).sum() / mask.sum()),
                "error of the output": self._error(self.pruned[name]),
            }
            for name, mask in self.kept.items()
        ]
        return pd.DataFrame(rows)

    def _error(self, pruned_1OI: torch.Tensor) -> float | None:
        if self.gram_1II is None:
            return None
        lost_1OI = self.weight_1OI - pruned_1OI
        lost, whole = (torch.einsum("eoi,eij,eoj->", x, self.gram_1II, x) for x in (lost_1OI, self.weight_1OI))
        return float(lost / whole) ** 0.5


def one_matrix(setup: SparsitySetup) -> MatrixMasks:
    """Return a matrix from the middle of the model, pruned by every method that the run can use."""
    candidates = [matrix for matrix in setup.matrices if matrix.part != "attention"] or setup.matrices
    matrix = candidates[len(candidates) // 2]
    moments = setup.moments.get(matrix.name)
    stack = matrix.weight.data.view(-1, *matrix.weight.shape[-2:])
    single = stack[:1].float()
    gram = None if moments is None or moments.gram is None else moments.gram.view(-1, *moments.gram.shape[-2:])[:1]
    squares = None if moments is None else moments.squares.view(len(stack), 1, -1)[:1]
    sparsity, pattern, within = (setup.options[name] for name in ("sparsity", "pattern", "within"))
    kept, pruned = {}, {}
    for name in METHODS if setup.trained else ("magnitude", "random"):
        if name == "sparsegpt" and gram is not None:
            after, mask = sparsegpt(single, gram, sparsity, pattern)
        else:
            generator = torch.Generator().manual_seed(setup.seed)
            mask = keep(score(single, name, squares, generator), sparsity, pattern, within=within)
            after = single * mask
        kept[name], pruned[name] = mask[0], after
    return MatrixMasks(matrix.name, single, kept, pruned, gram)


def read_masks(table: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences: how far the methods agree on what to keep, and whose output is nearest."""
    first, second = table.iloc[0], table.iloc[1]
    share = f"Of the weights that {second.method} keeps, {100 * second.overlap:.0f} % are kept by {first.method} too"
    chance = f"; chance would give {100 * first.kept:.0f} %."
    errors = table.dropna(subset=["error of the output"])
    if errors.empty:
        return share + chance, "Without calibration text no error of the output is known."
    least = errors.loc[errors["error of the output"].idxmin()]
    return share + chance, f"The output is nearest with {least.method}, {least['error of the output']:.2g} off."


# --- the sparse model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseModel:
    """A model stored sparse, and its states before that: pruned, and fine-tuned (both None for random weights)."""

    optimized: nn.Module
    pruned: sparse.Pruned | None
    tuned: sparse.Pruned | None
    losses: list[float]
    steps: int  # of fine-tuning: none for random weights
    seconds: float

    @property
    def zeros(self) -> dict[str, float]:
        """The share of zeros of each matrix that is stored sparse."""
        return sparse.stored_shares(self.optimized)

    @property
    def summary(self) -> str:
        """One sentence: the mean share of zeros, and in how many matrices."""
        zeros = self.zeros
        mean = sum(zeros.values()) / max(1, len(zeros))
        return f"{mean:.3f} of the weights are zero, in {len(zeros)} matrices."


def sparsify(setup: SparsitySetup, finetune_steps: int) -> SparseModel:
    """Return the model pruned block after block, fine-tuned and stored sparse; random weights are stored at once."""
    start = time.perf_counter()
    if not setup.trained:
        optimized = sparse.apply(setup.baseline, [], method=setup.method, **setup.options, seed=setup.seed)
        return SparseModel(optimized, None, None, [], 0, time.perf_counter() - start)
    pruned = sparse.prune(setup.baseline, setup.calibration, method=setup.method, **setup.options, seed=setup.seed)
    tuned, losses = sparse.fine_tune(
        pruned, setup.baseline, setup.finetune_batches, steps=finetune_steps, seed=setup.seed
    )
    optimized = sparse.executed(tuned)
    return SparseModel(optimized, pruned, tuned, losses, finetune_steps, time.perf_counter() - start)


def assert_sparse(setup: SparsitySetup, model: SparseModel) -> None:
    """Raise AssertionError where a matrix lacks its zeros, or where fine-tuning brought weights back."""
    asked = float(str(setup.options["sparsity"]))
    taught = {} if model.tuned is None else sparse.shares(model.tuned)
    for name, share in model.zeros.items():
        right = setup.options["pattern"] == "2:4" or abs(share - asked) < 0.5 / 16 + 1e-3
        assert right, f"{name}: {share:.4f} of its weights are zero"
        assert not taught or taught[name] >= share - 1e-6, f"{name}: fine-tuning brought weights back"


def sizes(setup: SparsitySetup, model: SparseModel) -> pd.DataFrame:
    """Return bytes with indices and stored elements of the baseline, of stored zeros, and of sparse storage."""
    arms = {"baseline": setup.baseline}
    if model.tuned is not None:
        arms["zeros stored dense"] = model.tuned.model
    arms["stored sparse"] = model.optimized
    rows = [
        {
            "model": name,
            "bytes, indices included": cost_model.weights_bytes(arm),
            "elements stored": cost_model.parameters(arm),
        }
        for name, arm in arms.items()
    ]
    return pd.DataFrame(rows)


# --- rivals at the same share ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseRivals:
    """Prunes one model in several ways; each is held against the baseline's reading of a few windows."""

    setup: SparsitySetup
    reference: Text

    def judge(self, name: str, purpose: str, model: nn.Module) -> ThirdArm:
        """Return an arm with perplexity, divergence and agreement of `model`."""
        text = evaluate.read(model, self.reference.ids_NT)
        return ThirdArm(name, purpose, evaluate.compare_text(self.reference, text))

    def cut(self, name: str, purpose: str, **changed: object) -> ThirdArm:
        """Return an arm pruned on the unpruned model's inputs; `changed` are options of `method.prune` that differ."""
        setup = self.setup
        options = setup.options | {"method": setup.method, "seen": setup.moments, "seed": setup.seed} | changed
        return self.judge(name, purpose, sparse.prune(setup.baseline, setup.calibration, **options).model)


def rivals(setup: SparsitySetup, text: Text | None) -> SparseRivals | None:
    """Return the rivals, judged on the first windows of `text`; None where the baseline read none."""
    if text is None:
        return None
    return SparseRivals(setup, evaluate.read(setup.baseline, text.ids_NT[:WINDOWS]))


def controls(arms: SparseRivals | None, model: SparseModel) -> list[ThirdArm]:
    """Return the same share by other means: every method, two patterns, the stages of the run, and int8.

    The last one is pruned until CSR takes as many bytes as int8 does. Empty without rivals.
    """
    if arms is None or model.pruned is None:
        return []
    setup = arms.setup
    rounded = int8(setup.baseline, str(setup.options["parts"]))
    removed = cost_model.weights_bytes(setup.baseline) - cost_model.weights_bytes(rounded)
    dense_bytes = sum(matrix.weight.nbytes for matrix in setup.matrices)
    at_int8_bytes = 1 - (dense_bytes - removed) / (8 * setup.weights)  # CSR: four bytes of value, four of column
    name = setup.method
    return [
        *(arms.cut(other, "the same share, chosen at once", method=other) for other in METHODS),
        arms.cut(f"{name}, 2:4", "a pattern", pattern="2:4"),
        arms.cut(f"{name}, 1x8", "a pattern", pattern="1x8"),
        arms.judge(f"{name}, in order", "block after block", model.pruned.model),
        arms.judge(f"{name}, taught", "after fine-tuning", model.optimized),
        arms.judge(INT8, "yardstick", rounded),
        arms.cut(f"{name} {AT_INT8_BYTES}", "as large as the yardstick", sparsity=at_int8_bytes),
    ]


def order(arms: SparseRivals | None) -> list[ThirdArm]:
    """Return SparseGPT, Wanda and magnitude on every matrix, per row and, where that differs, per matrix."""
    if arms is None:
        return []
    return [
        arms.cut(_order_name(name, place), "order", method=name, within=place, **ORDER)
        for name in COMPARED
        for place in (WITHIN if name != "sparsegpt" else ("row",))
    ]


def _order_name(method: str, within: str) -> str:
    return f"{method}{'' if method == 'sparsegpt' else f', per {within}'}, all matrices"


def order_holds(arms: Sequence[ThirdArm]) -> dict[str, bool] | None:
    """Return whether SparseGPT ≤ Wanda ≤ magnitude in divergence, by where scores compete; None without arms."""
    if not arms:
        return None
    values = {arm.name: found.value for arm in arms if (found := claims.interval([arm], [arm.name]))}
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
        f"KL(SparseGPT) ≤ KL(Wanda) ≤ KL(magnitude) {answer['per row']} where weights compete within a row.",
        f"Where they compete within the matrix it {answer['per matrix']}.",
    )


def impact(arms: SparseRivals | None, strengths: Sequence[int]) -> pd.DataFrame:
    """Return the divergence in nats per token over the share of zeros in percent (`strength`), an `arm` per method."""
    rows = []
    for strength in strengths if arms is not None else ():
        for name in COMPARED:
            divergence = claims.interval([arms.cut(name, "impact", method=name, sparsity=strength / 100)], [name])
            rows.append({"arm": name, **divergence._asdict(), "strength": strength})
    return pd.DataFrame(rows)


def zeros_stored_dense(
    setup: SparsitySetup, model: SparseModel, prompt_BT: torch.Tensor, effort: Effort, invalid: str | None
) -> list[ThirdArm]:
    """Return the fine-tuned model with its zeros stored, its prefill timed against the baseline; none if untrained."""
    if model.tuned is None:
        return []
    options = {"names": ("prefill",), "with_energy": False, "costs": {"skip_zeros": True}, "seed": setup.seed}
    compared = speed.compare(setup.baseline, model.tuned.model, prompt_BT, effort, invalid=invalid, **options)
    return [ThirdArm("zeros stored dense", "the mask without the format", compared.measurements)]


# --- the answers -----------------------------------------------------------------------------------------------------


def refutations(setup: SparsitySetup, arms: Sequence[ThirdArm], points: Sequence[PartPoint]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS: from the divergences, and from the times of the part.

    The order of the methods is judged per row, where all three compete alike.
    """
    name, rival = setup.method, f"{setup.method} {AT_INT8_BYTES}"
    gpt, wanda, magnitude = (_order_name(method, "row") for method in COMPARED)
    pairs = [(name, "random"), (gpt, wanda), (wanda, magnitude), (rival, INT8)]
    answers = [
        claims.harms_less(claim, *(claims.interval(arms, [arm]) for arm in pair), pair)
        for claim, pair in zip(CLAIMS, pairs)
    ]
    return [*answers, _fast_enough(CLAIMS[4], points)]


def _fast_enough(claim: str, points: Sequence[PartPoint]) -> ClaimAnswer:
    """Return the answer by the largest gain in time: shown, excluded, or neither."""
    times = [(m, point) for point in points for m in point.times if m.ratio]
    if not times:
        return claim, None, "no part was timed"
    best, point = min(times, key=lambda pair: pair[0].ratio or 0.0)
    evidence = f"largest gain {1 / (best.ratio or 1):.2f}× ({point.layout}, {point.strength} % zeros, {best.workload})"
    refuted = {"better": False, "worse": True, "equivalent": True}.get(best.verdict)
    return claim, refuted, evidence


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
        "experts_short_of_tokens": (setup.short_of_tokens, "measured", "fewer tokens than inputs, damped"),
        "fine_tuning_losses": (model.losses, "measured", "nats per token of each step"),
        "order_at_60_percent": (order_holds(in_order), "measured", "SparseGPT ≤ Wanda ≤ magnitude, KL"),
        "impact": (curves.to_dict("records"), "measured", "KL on held-out text"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "weights set to zero, %", "y": "KL, nats/token"}
    return entries
