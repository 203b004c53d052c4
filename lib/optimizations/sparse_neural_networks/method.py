"""Sparse neural networks: weights are dropped singly, two of four, or in blocks; the rest is stored and executed alone.

Weights are chosen by score: `magnitude` |W|; `wanda` |W|·‖x‖₂ (Sun et al. 2024); `sparsegpt` W²/[H⁻¹]ⱼⱼ column by
column, with the error of each column passed on to later ones (Frantar & Alistarh 2023); `random` as a control. For
experts, x are their own tokens. Scores compete within each output row or, with `within="matrix"`, within the whole
matrix; SparseGPT's always compete among all rows of a step of columns. Patterns: `unstructured`, `2:4`, `4:8`, and
blocks `RxC` of R outputs by C inputs. All methods drop exactly the same number of weights per matrix.

Zeros are left out of storage and products; with `execute="dense"` they are stored, read and multiplied as before.
Blocks are pruned one by one, on the outputs of the pruned blocks before them, holding the statistics of one block at a
time. `apply` never changes the caller's model, but shares unchanged tensors with it. Independent of measurement.

Shapes: E experts (1 for a single matrix), O outputs, I inputs.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.calibration.distillation import Lessons, distil
from lib.models.calibration.observed import Observed
from lib.models.calibration.second_moments import PARTS, Matrix, feed_forward_matrices, matrices
from lib.models.calibration.walk import require_finite
from lib.models.structure import anatomy
from lib.models.structure.replacements.sparse import is_dense, store, stored
from lib.models.structure.sharing import sharing
from lib.optimizations.common.compression import options as checks
from lib.optimizations.common.compression.budgets import BUDGETS
from lib.optimizations.sparse_neural_networks import budgets
from lib.optimizations.sparse_neural_networks.blocks import (
    Pruned,
    draws,
    prune_block,
    statistics_of,
    store_block,
    warn_of_few_tokens,
)
from lib.optimizations.sparse_neural_networks.masks import HALVES, METHODS, PATTERNS, STEP, WITHIN, block_shape, kept_of
from lib.optimizations.sparse_neural_networks.matrix_pruning import (
    PruningRule,
    bytes_with,
    check_tensor_cores,
    choose,
    on_tensor_cores,
    prune_matrix,
    stored_sparse,
)

NAME = "sparse_neural_networks"
EXECUTE = ("sparse", "dense")

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "sparsity": {
        "type": "float",
        "range": (0.0, 1.0),
        "default": 0.6,
        "help": "share of each matrix's weights set to zero; 2:4 fixes it at one half",
    },
    "method": {"type": "categorical", "choices": METHODS, "default": "sparsegpt"},
    "pattern": {"type": "categorical", "choices": PATTERNS, "default": "unstructured"},
    "within": {"type": "categorical", "choices": WITHIN, "default": "row", "help": "where scores compete"},
    "parts": {"type": "categorical", "choices": ("all", *PARTS), "default": "all"},
    "execute": {"type": "categorical", "choices": EXECUTE, "default": "sparse"},
    "finetune_steps": {"type": "int", "range": (0, 1000), "default": 0, "help": "steps of masked distillation"},
}

COMPOSES = {
    "touches": ("weights", "storage"),
    "needs": ("dense matrices",),
    "invalidates": (
        "dense matrices",
        "whole matrices",
        "whole channels",
        "stacked experts",
        "dense storage",
        "statistics",
    ),
    "mildest": {"sparsity": 0.0},
    "trial": {},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None if the method applies, else the reason: the decoder has no dense matrix left."""
    return None if matrices(model) else "every matrix of the decoder is stored sparse already"


def saves_bytes(
    model: nn.Module,
    *,
    sparsity: float = 0.6,
    pattern: str = "unstructured",
    parts: str = "all",
    execute: str = "sparse",
    **_: Any,
) -> bool:
    """Return whether the model would take fewer bytes, indices included, with these options of `apply`."""
    chosen = matrices(model, parts)
    shapes = [(matrix, matrix.weight.shape) for matrix in chosen]
    after = sum(bytes_with(matrix, kept_of(shape, sparsity, pattern), shape, pattern) for matrix, shape in shapes)
    return execute == "sparse" and after < sum(matrix.weight.nbytes for matrix in chosen)


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    sparsity: float = 0.6,
    method: str = "sparsegpt",
    pattern: str = "unstructured",
    within: str = "row",
    parts: str = "all",
    execute: str = "sparse",
    budget: str = "uniform",
    finetune_steps: int = 0,
    learning_rate: float = 1e-3,
    finetune_batches: Sequence[dict[str, torch.Tensor]] | None = None,
    observed: Observed | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a model with a share `sparsity` of every matrix's weights zero, stored sparse unless `execute` is "dense".

    parts: "all", or one of PARTS ("feed_forward" includes experts). finetune_batches: batches to distil on (default:
    calibration). observed, budget: see `prune`. Raises UserError for a value out of range, for a layer that the pattern
    does not fit, and for weights that are not finite.
    """
    checks.one_of(NAME, "execute", execute, EXECUTE)
    checks.changeable(model)
    if execute == "sparse":
        check_executed(model, pattern, parts)
    options: dict[str, Any] = {
        "sparsity": sparsity,
        "method": method,
        "pattern": pattern,
        "within": within,
        "parts": parts,
        "seed": seed,
    }
    if execute == "sparse" and method in ("magnitude", "random") and not finetune_steps and budget == "uniform":
        return _store_at_once(model, **options)
    masked = bool(finetune_steps) or execute == "sparse"
    pruned = prune(model, calibration, **options, budget=budget, observed=observed, masked=masked)
    if finetune_steps:
        batches = finetune_batches or calibration
        pruned, _ = fine_tune(pruned, model, batches, steps=finetune_steps, learning_rate=learning_rate, seed=seed)
    return pruned.model if execute == "dense" else _store(pruned.model, pruned)


def _store_at_once(
    model: nn.Module, *, sparsity: float, method: str, pattern: str, within: str, parts: str, seed: int
) -> nn.Module:
    """Return `executed(prune(…))` for scores that need no data, without ever copying a matrix dense."""
    check(model, sparsity=sparsity, method=method, pattern=pattern, within=within, parts=parts)
    rule = PruningRule(sparsity, method, pattern, within)
    changed = sharing(model)
    for block in anatomy.anatomy(model).blocks:
        require_finite(block)
        of_block, generator = matrices(model, parts, block.index), draws(seed, block.index)
        chosen = {matrix.name: choose(matrix, None, rule, generator) for matrix in of_block}
        store(changed, {matrix.name: stored_sparse(matrix, chosen[matrix.name], pattern) for matrix in of_block})
    return changed


def prune(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    sparsity: float = 0.6,
    method: str = "sparsegpt",
    pattern: str = "unstructured",
    within: str = "row",
    parts: str = "all",
    budget: str = "uniform",
    observed: Observed | None = None,
    masked: bool = True,
    seed: int = 0,
) -> Pruned:
    """Return a model with zeros, and the masks; unchanged tensors are shared with `model`.

    Without `observed`, each block is pruned on the outputs of the pruned blocks before it. With `observed` (the result
    of `observe(model, calibration, …)`) every matrix is pruned on the original model's inputs, so the same statistics
    serve many settings. budget: "uniform", or "owl" (`budgets.owl`; not for 2:4 and 4:8): blocks with more outliers
    lose fewer weights.
    masked: whether to keep all masks, a byte per weight. Warns if calibration tokens are so few that damping matters.
    """
    check(model, sparsity=sparsity, method=method, pattern=pattern, within=within, parts=parts)
    checks.one_of(NAME, "budget", budget, BUDGETS)
    if budget != "uniform" and pattern in HALVES:
        raise UserError(
            f'{NAME}: budget "{budget}" with pattern {pattern}: every group keeps the same number of weights, so every '
            'block loses the same share; expected budget "uniform", or another pattern'
        )
    checks.changeable(model)
    pruned = Pruned(sharing(model), {}, pattern)
    if sparsity == 0 and pattern not in HALVES:
        ones = {matrix.name: torch.ones_like(matrix.weight, dtype=torch.bool) for matrix in matrices(model, parts)}
        return Pruned(pruned.model, ones, pattern)
    shares: dict[int, float] = {}
    if budget == "owl":
        shares = budgets.owl(model, observed or observe(model, calibration, parts=parts, method="wanda"), sparsity)
        for index, share in shares.items():
            if empty := emptied(matrices(model, parts, index), share, pattern):
                raise NotApplicable(empty)
    for index, statistics in statistics_of(pruned.model, calibration, method, parts, observed):
        rule = PruningRule(shares.get(index, sparsity), method, pattern, within)
        prune_block(pruned, matrices(pruned.model, parts, index), statistics, rule, draws(seed, index))
        if not masked:
            pruned.masks.clear()
    warn_of_few_tokens([m.name for m in matrices(model) if m.part != "experts" and m.name in pruned.thin])
    return pruned


def observe(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    parts: str = "all",
    method: str = "sparsegpt",
) -> Observed:
    """Return, block by block, the moments that `method` needs of every matrix in `parts` of the original model."""
    return Observed(model, calibration, parts, gram=method == "sparsegpt")


def executed(pruned: Pruned) -> nn.Module:
    """Return a copy of the pruned model whose pruned matrices are stored and executed sparse.

    On a CPU 2:4 has no kernel of its own and becomes CSR; on CUDA linear layers use the tensor cores' format and
    experts use CSR. Unpruned tensors are shared.
    """
    return _store(sharing(pruned.model), pruned)


def _store(model: nn.Module, pruned: Pruned) -> nn.Module:
    """Convert the matrices of `model` to sparse storage by the masks of `pruned`, in place; return the model."""
    for block in anatomy.anatomy(model).blocks:
        store_block(model, pruned, block.index)
    return model


def feed_forward(module: nn.Module, sparsity: float, pattern: str, execute: str = "sparse") -> nn.Module:
    """Return one feed-forward part pruned by magnitude, for timing: only the number of dropped weights matters."""
    rule, changed = PruningRule(sparsity, "magnitude", pattern), sharing(module)
    replaced = feed_forward_matrices(anatomy.feed_forward(changed))
    if execute == "dense":
        for matrix in replaced:
            weight, _ = prune_matrix(matrix, None, rule)
            setattr(matrix.owner, matrix.attribute, nn.Parameter(weight, requires_grad=False))
        return changed
    return store(changed, {m.name: stored_sparse(m, choose(m, None, rule), pattern) for m in replaced})


def fine_tune(
    pruned: Pruned,
    teacher: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Pruned, Lessons]:
    """Return a copy distilled from `teacher` for `steps` steps, in which zeros stay zero, and the log of the training.

    Gradients are masked: without weight decay, AdamW never moves a weight whose gradient was always zero. Part of the
    text is held out (`distillation.distil`).
    """
    if not steps:
        return pruned, Lessons([], {})
    student = copy.deepcopy(pruned.model)
    hooks = []
    for matrix in matrices(student):
        if matrix.name in pruned.masks:
            matrix.weight.requires_grad_(True)
            mask = pruned.masks[matrix.name]
            hooks.append(matrix.weight.register_hook(lambda gradient, mask=mask: gradient * mask))
    lessons = distil(student, teacher, batches, steps=steps, learning_rate=learning_rate, seed=seed)
    for hook in hooks:
        hook.remove()
    return Pruned(student, pruned.masks, pruned.pattern, pruned.thin, pruned.unseen), lessons


# --- checks ----------------------------------------------------------------------------------------------------------


def check(
    model: nn.Module, *, sparsity: float, method: str, pattern: str, within: str = "row", parts: str = "all"
) -> None:
    """Raise UserError for an option out of range, and NotApplicable, naming layer and bound, if this model has no such
    matrices, the pattern does not fit them, or nothing of one would be left.
    """
    checks.in_range(NAME, "sparsity", sparsity, 0, 1, closed="low")
    checks.choices(NAME, {"method": (method, METHODS), "within": (within, WITHIN), "parts": (parts, ("all", *PARTS))})
    block_shape(pattern)
    affected = matrices(model, parts)
    if not affected:
        reason = "the matrices are stored sparse already" if stored(model) else "this model has none"
        raise NotApplicable(f'sparse_neural_networks: no matrix to prune in parts "{parts}": {reason}')
    if unfit := misfit(affected, pattern) or emptied(affected, sparsity, pattern):
        raise NotApplicable(unfit)


def check_executed(model: nn.Module, pattern: str, parts: str = "all") -> None:
    """Raise NotApplicable, naming the matrix, if zeros of `pattern` cannot be executed sparse."""
    for matrix in matrices(model, parts):
        if on_tensor_cores(matrix, pattern):
            check_tensor_cores(matrix)


def misfit(affected: Iterable[Matrix], pattern: str) -> str | None:
    """Return the first matrix that `pattern` does not fit, with the reason; None if it fits all."""
    rows, columns = block_shape(pattern)
    for matrix in affected:
        outputs, inputs = matrix.weight.shape[-2:]
        if inputs % (neighbours := HALVES.get(pattern, 1)):
            return f"{matrix.name}: pattern {pattern} needs a width divisible by {neighbours}, this one is {inputs}"
        if outputs % rows or inputs % columns or STEP % columns:
            return f"{matrix.name}: blocks of {pattern} do not divide its {outputs} x {inputs} (or columns {STEP})"
    return None


def emptied(affected: Iterable[Matrix], sparsity: float, pattern: str) -> str | None:
    """Return the first matrix of which this share of zeros leaves nothing, with the bound; None if all keep weights."""
    for matrix in affected:
        if not kept_of(matrix.weight.shape, sparsity, pattern):
            count = matrix.weight.shape[-1] // block_shape(pattern)[1]
            units = "weights" if pattern == "unstructured" else f"blocks of {pattern}"
            shares = (percent / 100 for percent in range(99, -1, -1))
            most = next(share for share in shares if kept_of(matrix.weight.shape, share, pattern))
            return (
                f"{matrix.name}: sparsity {sparsity:.3g} leaves none of its {count} {units} per row; expected at most "
                f"{most}, or another pattern"
            )
    return None


def fits(module: nn.Module, pattern: str) -> bool:
    """Return whether a pattern fits every matrix of one feed-forward part."""
    return misfit(feed_forward_matrices(anatomy.feed_forward(module)), pattern) is None


def stored_shares(model: nn.Module) -> dict[str, float]:
    """Return name → share of elements left out of storage, for each matrix stored sparse."""
    sparse = {name: weight for name, weight in stored(model).items() if not is_dense(weight)}
    return {name: 1 - weight.values().numel() / weight.numel() for name, weight in sparse.items()}


def shares(pruned: Pruned) -> dict[str, float]:
    """Return name → share of actual zeros in each pruned matrix."""
    weights = {matrix.name: matrix.weight for matrix in matrices(pruned.model)}
    return {name: 1 - int(weights[name].count_nonzero()) / weights[name].numel() for name in pruned.masks}
