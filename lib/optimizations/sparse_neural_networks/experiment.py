"""The protocol of the notebook on sparse networks: one matrix by every method, and the sparse model with its sizes.

The rivals are in `rivals`, the speed of one part over sparsity in `speed_sweep`. Returns plain data; independent of
tables, figures and records.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.models.calibration import second_moments
from lib.models.calibration.distillation import Lessons
from lib.models.calibration.observed import Observed
from lib.models.calibration.second_moments import Matrix, Moments
from lib.models.loading import Loaded
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import finetuning
from lib.optimizations.common.compression import calibration_text, facts
from lib.optimizations.common.compression import options as checks
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.masks import HALVES, METHODS, block_shape, keep, score, sparsegpt
from lib.optimizations.sparse_neural_networks.matrix_pruning import short_of_tokens, without_tokens

# The measurement that decides the verdict of each dimension, declared before any is taken.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
MOST_SEQUENCES = 32  # maximum of calibration sequences for choosing weights, unless the width needs more
CORNER = 48  # rows and columns of a mask that are shown
PROXY_STEPS = 40  # default steps of masked distillation on a proxy model
PROXY_SPARSITY, REAL_SPARSITY = 0.9, 0.5  # defaults: proxies tolerate more, and only at 0.9 is CSR past its crossover
HALF = 0.5  # share of zeros of 2:4 and 4:8, whatever the option says


@dataclass(frozen=True)
class SparsitySetup:
    """A model, the `options` of `method.prune` for it, and the moments of the matrices' inputs.

    `short` and `unseen` count experts (or single matrices) with fewer tokens than inputs, and with none; `shown` are
    the moments of the example matrix. Calibration means nothing for random weights: for them `method` is "magnitude"
    and there are no moments.
    """

    loaded: Loaded
    effort: Effort
    method: str
    options: dict[str, Any]
    calibration: list[dict[str, torch.Tensor]]
    finetune_batches: list[dict[str, torch.Tensor]]
    observed: Observed | None
    matrices: list[Matrix]
    seed: int
    short: int = 0
    unseen: int = 0
    shown: Moments | None = None

    @property
    def baseline(self) -> nn.Module:
        return self.loaded.model

    @property
    def trained(self) -> bool:
        return not self.loaded.random_weights

    @property
    def weights(self) -> int:
        """The number of weights in the matrices to be pruned."""
        return sum(matrix.weight.numel() for matrix in self.matrices)

    @property
    def example(self) -> Matrix:
        """The matrix shown as an example, from the middle of the model."""
        return _example(self.matrices)

    def facts(self) -> dict[str, object]:
        """Return the facts about the model to be pruned, for a table."""
        counts = {
            "their weights": f"{self.weights:,}",
            "share of all parameters": f"{self.weights / cost_model.parameters(self.baseline):.2f}",
            "short of tokens (damped)": self.short,
            "without tokens (by magnitude)": self.unseen,
        }
        return facts.about(self.loaded, matrices=len(self.matrices)) | counts


def default_sparsity(scale: str) -> float:
    """Return the default share of zeros: language models of real size collapse above 60 to 70 %."""
    return PROXY_SPARSITY if scale == "proxy" else REAL_SPARSITY


def share_of_zeros(sparsity: float, pattern: str, scale: str) -> float:
    """Return the share of zeros of a run: HALF for 2:4 and 4:8, `default_sparsity` if `sparsity` is negative."""
    if pattern in HALVES:
        return HALF
    return sparsity if sparsity >= 0 else default_sparsity(scale)


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return a run's steps of masked distillation; the default (-1) is PROXY_STEPS on a proxy model, none at real size.

    At real size SparseGPT's closed form compensates for the dropped weights.
    """
    return finetuning.steps_of(loaded, finetune_steps, PROXY_STEPS, effort)


def set_up(loaded: Loaded, effort: Effort, method: str, options: dict[str, Any], seed: int) -> SparsitySetup:
    """Return the model with its calibration text, observed in one pass.

    A missing or negative `sparsity` in the options becomes `default_sparsity`; with 2:4 or 4:8 it is always one half.
    Raises UserError for options out of range, and NotApplicable for options that the model does not allow or if its
    weights stream from a file.
    """
    checks.changeable(loaded.model)
    share = share_of_zeros(options.get("sparsity", -1), options["pattern"], loaded.scale)
    options = options | {"sparsity": share}
    chosen = "magnitude" if loaded.random_weights else method
    sparse.check(loaded.model, method=method, **options)
    sparse.check_executed(loaded.model, options["pattern"], options["parts"])
    count = calibration_text.sequences(loaded.model, effort, MOST_SEQUENCES)
    calibration = prompts.calibration(loaded, count, effort.calibration_tokens, seed)
    size = finetuning.sequences(effort), effort.calibration_tokens
    batches = prompts.calibration(loaded, *size, seed, tokens_at_once=512)
    matrices = second_moments.matrices(loaded.model, options["parts"])
    observed = None if loaded.random_weights else sparse.observe(loaded.model, calibration, parts=options["parts"])
    seen = seen_tokens(observed, matrices)
    return SparsitySetup(loaded, effort, chosen, options, calibration, batches, observed, matrices, seed, *seen)


def seen_tokens(observed: Observed | None, matrices: list[Matrix]) -> tuple[int, int, Moments | None]:
    """Return, from one pass, the count of moments over fewer tokens than inputs, the count over no token, and the
    moments of the example matrix.
    """
    short = unseen = 0
    shown = None
    inputs = {matrix.name: matrix.weight.shape[-1] for matrix in matrices}
    for _, moments in observed or ():
        for name in inputs.keys() & moments.keys():
            short += short_of_tokens(moments[name], inputs[name])
            unseen += without_tokens(moments[name])
            shown = moments[name] if name == _example(matrices).name else shown
    return short, unseen, shown


def _example(matrices: list[Matrix]) -> Matrix:
    candidates = [matrix for matrix in matrices if matrix.part != "attention"] or matrices
    return candidates[len(candidates) // 2]


# --- the mechanism on one matrix -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixMasks:
    """One matrix pruned by every method: masks [O, I], pruned weights [1, O, I].

    Of a stack of experts, the first expert that saw a token.
    """

    name: str
    weight_1OI: torch.Tensor
    masks: dict[str, torch.Tensor]
    pruned: dict[str, torch.Tensor]
    gram_1II: torch.Tensor | None

    @property
    def labels(self) -> dict[str, str]:
        """The axis labels and title for a figure of the corners."""
        return {"x_label": "input", "y_label": "output", "title": f"{self.name}, first {CORNER} × {CORNER}"}

    def corners(self) -> dict[str, np.ndarray]:
        """Return the first rows and columns of each mask."""
        return {name: mask[:CORNER, :CORNER].cpu().numpy() for name, mask in self.masks.items()}

    def table(self) -> pd.DataFrame:
        """Return a row per method: share kept, overlap with the first method, and relative error of the output.

        The error is ‖x·(W−Ŵ)ᵀ‖ ÷ ‖x·Wᵀ‖ on calibration inputs, None without them.
        """
        first = next(iter(self.masks.values()))
        rows = [
            {
                "method": name,
                "kept": float(mask.float().mean()),
                "overlap": float((mask & first).sum() / mask.sum()),
                "error of the output": self._error(self.pruned[name]),
            }
            for name, mask in self.masks.items()
        ]
        return pd.DataFrame(rows)

    def _error(self, pruned_1OI: torch.Tensor) -> float | None:
        if self.gram_1II is None:
            return None
        lost_1OI = self.weight_1OI - pruned_1OI
        lost, whole = (torch.einsum("eoi,eij,eoj->", x, self.gram_1II, x) for x in (lost_1OI, self.weight_1OI))
        return max(0.0, float(lost / whole)) ** 0.5  # rounding of the Gram matrix can make it negative


def one_matrix(setup: SparsitySetup) -> MatrixMasks:
    """Return the example matrix pruned by every method that the run can use."""
    matrix, moments = setup.example, setup.shown
    stack = matrix.weight.data.view(-1, *matrix.weight.shape[-2:])
    seen = 0 if moments is None or len(stack) == 1 else int((moments.tokens > 0).long().argmax())
    shown = slice(seen, seen + 1)  # an expert without tokens would have no known error
    single = stack[shown].float()
    gram = None if moments is None or moments.gram is None else moments.gram.view(-1, *moments.gram.shape[-2:])[shown]
    squares = None if moments is None else moments.squares.view(len(stack), 1, -1)[shown]
    sparsity, pattern, within = (setup.options[name] for name in ("sparsity", "pattern", "within"))
    masks, pruned = {}, {}
    for name in METHODS if setup.trained else ("magnitude", "random"):
        if name == "sparsegpt" and gram is not None:
            after, mask = sparsegpt(single, gram, sparsity, pattern)
        else:
            generator = torch.Generator().manual_seed(setup.seed)
            mask = keep(score(single, name, squares, generator), sparsity, pattern, within=within)
            after = single * mask
        masks[name], pruned[name] = mask[0], after
    return MatrixMasks(matrix.name, single, masks, pruned, gram)


def read_masks(table: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences: how far the methods agree on the weights to keep, and whose output has the least error."""
    first, second = table.iloc[0], table.iloc[1]
    share = f"Of the weights that {second.method} keeps, {first.method} keeps {100 * second.overlap:.0f} % too"
    chance = f"; chance would give {100 * first.kept:.0f} %."
    errors = table.dropna(subset=["error of the output"])
    if errors.empty:
        return share + chance, "Without calibration text, no error of the output is known."
    least = errors.loc[errors["error of the output"].idxmin()]
    error = f"{least['error of the output']:.2g}"
    return share + chance, f"The output is nearest with {least.method}, at a relative error of {error}."


# --- the sparse model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseModel:
    """A model stored sparse, and its states before that: pruned, and fine-tuned (both None for random weights)."""

    optimized: nn.Module
    pruned: sparse.Pruned | None
    tuned: sparse.Pruned | None
    lessons: Lessons
    steps: int  # steps of fine-tuning; 0 for random weights
    seconds: float

    @property
    def zeros(self) -> dict[str, float]:
        """The share of zeros of each matrix stored sparse, by name."""
        return sparse.stored_shares(self.optimized)

    @property
    def summary(self) -> str:
        """The mean share of zeros, the number of matrices, and the effect of fine-tuning."""
        zeros = self.zeros
        mean = sum(zeros.values()) / max(1, len(zeros))
        sentences = [f"{mean:.3f} of the weights are zero, in {len(zeros)} matrices.", finetuning.read(self.lessons)]
        return " ".join(filter(None, sentences))


def sparsify(setup: SparsitySetup, finetune_steps: int) -> SparseModel:
    """Return the model pruned block by block, fine-tuned and stored sparse; random weights are not fine-tuned."""
    start = time.perf_counter()
    if not setup.trained:
        optimized = sparse.apply(setup.baseline, [], method=setup.method, **setup.options, seed=setup.seed)
        return SparseModel(optimized, None, None, Lessons([], {}), 0, time.perf_counter() - start)
    finetune_steps = steps_of(setup.loaded, finetune_steps, setup.effort)
    pruned = sparse.prune(setup.baseline, setup.calibration, method=setup.method, **setup.options, seed=setup.seed)
    pruned_at = time.perf_counter()
    tuned, lessons = sparse.fine_tune(
        pruned, setup.baseline, setup.finetune_batches, steps=finetune_steps, seed=setup.seed
    )
    if not lessons.kept:
        start += time.perf_counter() - pruned_at
    optimized = sparse.executed(tuned)
    return SparseModel(optimized, pruned, tuned, lessons, finetune_steps, time.perf_counter() - start)


def optimize(
    loaded: Loaded,
    effort: Effort,
    *,
    sparsity: float,
    method: str,
    pattern: str,
    within: str,
    parts: str,
    finetune_steps: int,
    seed: int,
) -> nn.Module:
    """Return the model that a run with these parameters measures."""
    options = {"sparsity": sparsity, "pattern": pattern, "within": within, "parts": parts}
    return sparsify(set_up(loaded, effort, method, options, seed), finetune_steps).optimized


ROUNDED = 16  # at most this many columns or blocks per row enter the rounding tolerance


def assert_sparse(setup: SparsitySetup, model: SparseModel) -> None:
    """Raise AssertionError if a matrix lacks its zeros, or if fine-tuning made dropped weights nonzero.

    Whole blocks are dropped, so the share of a row with few blocks is rounded by up to half a block.
    """
    sparsity, pattern = setup.options["sparsity"], setup.options["pattern"]
    taught = {} if model.tuned is None else sparse.shares(model.tuned)
    widths = {matrix.name: matrix.weight.shape[-1] for matrix in setup.matrices}
    for name, share in model.zeros.items():
        groups = widths[name] / block_shape(pattern)[1] if name in widths else ROUNDED
        as_planned = pattern in HALVES or abs(share - sparsity) < 0.5 / min(ROUNDED, groups) + 1e-3
        assert as_planned, f"{name}: {share:.4f} of its weights are zero"
        assert not taught or taught[name] >= share - 1e-6, f"{name}: fine-tuning made dropped weights nonzero"


def sizes(setup: SparsitySetup, model: SparseModel) -> pd.DataFrame:
    """Return the bytes, indices included, and stored elements of the baseline, of stored zeros, and stored sparse."""
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
