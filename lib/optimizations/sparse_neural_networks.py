"""Sparse neural networks: single weights, pairs of four or blocks go, the rest is stored and executed without them.

Which weights go is a question of scores: `magnitude` |W|; `wanda` |W|·‖x‖₂ (Sun et al. 2024); `sparsegpt` W²/[H⁻¹]ⱼⱼ
column by column, the error of each column passed on to those behind it (Frantar & Alistarh 2023); `random` as a
control. For experts x are their own tokens. Scores compete within each output row, or, with `within="matrix"`, within
the whole matrix; SparseGPT's always among all rows of a step of columns. Patterns: `unstructured`, `2:4`, and blocks
`RxC` of R outputs by C inputs. All methods drop exactly as many weights of a matrix.

Executed sparse is the point: with `execute="dense"` the zeros are stored, read and multiplied as before. `apply` never
changes the caller's model. Knows nothing of measuring.

Shapes: E experts (1 for a single matrix), O outputs, I inputs, B columns of one step of SparseGPT.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError
from lib.models import anatomy
from lib.models.distillation import distil
from lib.models.moments import PARTS, Matrix, Moments, feed_forward_matrices, matrices, moments
from lib.models.sparse import compress, store, stored

METHODS = ("sparsegpt", "wanda", "magnitude", "random")
WITHIN = ("row", "matrix")
PATTERNS = ("unstructured", "2:4", "1x8", "8x8", "16x1")  # any other block RxC is understood as well
EXECUTE = ("sparse", "dense")
DAMPING = 0.01  # of the mean diagonal, Frantar & Alistarh 2023, section 4
STEP = 128  # columns chosen at a time
LEAST_ROWS = 8  # groups of fewer rows are executed as CSR: their dense products would be too thin

KNOBS = {
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
    "fine_tuning_steps": {"type": "int", "range": (0, 1000), "default": 0, "help": "steps of masked distillation"},
}

COMPOSES = {
    "touches": ("weights", "storage"),
    "needs": ("dense matrices",),
    "invalidates": ("dense matrices", "whole matrices", "whole channels", "stacked experts", "statistics"),
    "trial": {},
}


@dataclass(frozen=True)
class Pruned:
    """A model with zeros in its dense matrices, and what is kept of each: name → bool [O, I] or [E, O, I].

    `thin` counts experts that saw fewer tokens than they have inputs, by matrix: there damping decides, not data.
    """

    model: nn.Module
    kept: dict[str, torch.Tensor]
    pattern: str
    thin: dict[str, int]


def applies_to(model: nn.Module) -> str | None:
    """Return None, or the reason why nothing is left to do."""
    return None if matrices(model) else "every matrix of the decoder is stored sparse already"


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
    fine_tuning_steps: int = 0,
    learning_rate: float = 1e-3,
    lessons: Sequence[dict[str, torch.Tensor]] | None = None,
    seen: dict[str, Moments] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a model of which `sparsity` of every matrix's weights are zero, stored sparse unless `execute` is "dense".

    parts: "all", or one of PARTS. lessons: batches to distil on (default: calibration). seen: see `prune`. Raises
    UserError for a value out of range, and for a layer that the pattern does not fit or that saw too few tokens.
    """
    if execute not in EXECUTE:
        raise UserError(f'sparse_neural_networks: execute "{execute}"; expected one of {", ".join(EXECUTE)}')
    options = {"sparsity": sparsity, "method": method, "pattern": pattern, "within": within, "parts": parts}
    pruned = prune(model, calibration, **options, seen=seen, seed=seed)
    if fine_tuning_steps:
        options = {"steps": fine_tuning_steps, "learning_rate": learning_rate, "seed": seed}
        pruned, _ = fine_tune(pruned, model, lessons or calibration, **options)
    return pruned.model if execute == "dense" else executed(pruned)


def prune(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    sparsity: float = 0.6,
    method: str = "sparsegpt",
    pattern: str = "unstructured",
    within: str = "row",
    parts: str = "all",
    seen: dict[str, Moments] | None = None,
    seed: int = 0,
) -> Pruned:
    """Return a copy of the model with zeros, and the masks.

    Without `seen`, block after block is pruned on what the blocks before it, already pruned, give to it. With `seen`
    (what `observe(model, calibration, …)` returned) every matrix is pruned on the unpruned model's inputs: quicker, and
    the same statistics serve many settings.
    """
    check(model, sparsity=sparsity, method=method, pattern=pattern, within=within, parts=parts)
    copied = copy.deepcopy(model)
    if sparsity == 0 and pattern != "2:4":
        kept = {matrix.name: torch.ones_like(matrix.weight, dtype=torch.bool) for matrix in matrices(copied, parts)}
        return Pruned(copied, kept, pattern, {})
    kept, thin = {}, {}
    generator = torch.Generator().manual_seed(seed)
    needs = method in ("wanda", "sparsegpt")
    for block in sorted({matrix.block for matrix in matrices(copied, parts)}):
        chosen = matrices(copied, parts, block)
        found = seen
        if needs and seen is None:
            found = moments(copied, calibration, chosen, gram=method == "sparsegpt")
        for matrix in chosen:
            one = found[matrix.name] if needs else None
            if one is not None:
                thin |= _enough(matrix, one, method)
            kept[matrix.name] = _prune_matrix(matrix, one, sparsity, method, pattern, within, generator)
    return Pruned(copied, kept, pattern, thin)


def observe(model: nn.Module, calibration: Sequence[dict], *, parts: str = "all", method: str = "sparsegpt") -> dict:
    """Return the moments that `method` needs of every matrix, from one pass through the model as it is."""
    return moments(model, calibration, matrices(model, parts), gram=method == "sparsegpt")


def executed(pruned: Pruned) -> nn.Module:
    """Return a copy of the pruned model whose pruned matrices are stored and executed sparse.

    On a processor 2:4 has no kernel of its own and becomes CSR; on CUDA linear layers use the tensor cores' format and
    experts CSR.
    """
    model = copy.deepcopy(pruned.model)
    chosen = [matrix for matrix in matrices(model) if matrix.name in pruned.kept]
    return store(model, {one.name: _stored(one, pruned.kept[one.name], pruned.pattern) for one in chosen})


def _stored(matrix: Matrix, kept: torch.Tensor, pattern: str) -> torch.Tensor:
    rows, _ = block_shape(pattern)
    layout = "columns" if rows >= LEAST_ROWS else "csr"
    if pattern == "2:4" and matrix.weight.is_cuda and matrix.part != "experts":
        _check_tensor_cores(matrix)
        layout = "semi_structured"
    return compress(matrix.weight.data, kept, layout, rows)


def feed_forward(module: nn.Module, sparsity: float, pattern: str, execute: str = "sparse") -> nn.Module:
    """Return a copy of one feed-forward part, pruned by magnitude: time asks how many weights go, not which."""
    copied = copy.deepcopy(module)
    weights = {}
    for matrix in feed_forward_matrices(anatomy.feed_forward(copied)):
        kept = _prune_matrix(matrix, None, sparsity, "magnitude", pattern, "row", None)
        weights[matrix.name] = _stored(matrix, kept, pattern) if execute == "sparse" else None
    return store(copied, weights) if execute == "sparse" else copied


def fine_tune(
    pruned: Pruned,
    teacher: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Pruned, list[float]]:
    """Return a copy taught by `teacher` for `steps` steps in which zeros stay zero, and the loss of each, nats/token.

    Gradients are masked: without weight decay AdamW never moves a weight whose gradient was always zero.
    """
    if not steps:
        return pruned, []
    student = copy.deepcopy(pruned.model)
    hooks = []
    for matrix in matrices(student):
        if matrix.name in pruned.kept:
            matrix.weight.requires_grad_(True)
            kept = pruned.kept[matrix.name]
            hooks.append(matrix.weight.register_hook(lambda gradient, kept=kept: gradient * kept))
    losses = distil(student, teacher, batches, steps=steps, learning_rate=learning_rate, seed=seed)
    for hook in hooks:
        hook.remove()
    return Pruned(student, pruned.kept, pruned.pattern, pruned.thin), losses


# --- what may be asked -----------------------------------------------------------------------------------------------


def check(
    model: nn.Module, *, sparsity: float, method: str, pattern: str, within: str = "row", parts: str = "all"
) -> None:
    """Raise UserError, naming layer and bound, where this cannot be done to this model."""
    if not 0 <= sparsity < 1:
        raise UserError(f"sparse_neural_networks: sparsity {sparsity} is out of range; expected 0 <= sparsity < 1")
    choices = (("method", method, METHODS), ("within", within, WITHIN), ("parts", parts, ("all", *PARTS)))
    for name, value, valid in choices:
        if value not in valid:
            raise UserError(f'sparse_neural_networks: {name} "{value}"; expected one of {", ".join(valid)}')
    rows, columns = block_shape(pattern)
    found = matrices(model, parts)
    if not found:
        reason = "the matrices are stored sparse already" if stored(model) else "this model has none"
        raise UserError(f'sparse_neural_networks: no matrix to prune in parts "{parts}": {reason}')
    for matrix in found:
        outputs, inputs = matrix.weight.shape[-2:]
        if pattern == "2:4" and inputs % 4:
            raise UserError(f"{matrix.name}: pattern 2:4 needs a width divisible by 4, this one is {inputs}")
        if outputs % rows or inputs % columns or STEP % columns:
            raise UserError(
                f"{matrix.name}: blocks of {pattern} do not divide its {outputs} x {inputs} (or columns {STEP})"
            )


def block_shape(pattern: str) -> tuple[int, int]:
    """Return rows and columns of a pattern's blocks; (1, 1) for single weights and 2:4. Raises UserError if unknown."""
    if pattern in ("unstructured", "2:4"):
        return 1, 1
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern)
    if not match:
        raise UserError(f'sparse_neural_networks: pattern "{pattern}"; expected one of {", ".join(PATTERNS)}')
    return int(match[1]), int(match[2])


def _enough(matrix: Matrix, seen: Moments, method: str) -> dict[str, int]:
    """Return how many experts saw fewer tokens than SparseGPT wants; raise UserError where a single matrix did."""
    inputs, fewest = matrix.weight.shape[-1], int(seen.tokens.min())
    if method != "sparsegpt":
        return {}
    if matrix.part != "experts" and fewest < inputs:
        raise UserError(
            f"{matrix.name}: {fewest} calibration tokens, but sparsegpt needs at least its {inputs} inputs; "
            "give more calibration text, or choose method wanda"
        )
    few = int((seen.tokens < inputs).sum())
    return {matrix.name: few} if few else {}


def _check_tensor_cores(matrix: Matrix) -> None:
    outputs, inputs = matrix.weight.shape
    if outputs % 32 or inputs % 64 or matrix.weight.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"{matrix.name}: 2:4 on CUDA needs rows divisible by 32, columns by 64, and float16 or bfloat16; this is "
            f"{outputs} x {inputs}, {matrix.weight.dtype}; use execute dense"
        )


# --- which weights go ------------------------------------------------------------------------------------------------


def _prune_matrix(
    matrix: Matrix, seen: Moments | None, sparsity: float, method: str, pattern: str, within: str, generator
) -> torch.Tensor:
    """Zero the dropped weights in place; return what is kept, bool in the weight's shape."""
    weight = matrix.weight.data
    stack_EOI = weight.view(-1, *weight.shape[-2:])
    if method == "sparsegpt":
        gram_EII = seen.gram.view(-1, *seen.gram.shape[-2:])
        pruned_EOI, kept_EOI = sparsegpt(stack_EOI, gram_EII, sparsity, pattern)
        weight.copy_(pruned_EOI.view(weight.shape))
        return kept_EOI.view(weight.shape)
    squares = [None] * len(stack_EOI) if seen is None else seen.squares.view(len(stack_EOI), -1)
    masks = []
    for one, square in zip(stack_EOI, squares):  # one by one: the scores of a large stack would not fit into memory
        masks.append(keep(score(one, method, square, generator), sparsity, pattern, within=within))
        one.mul_(masks[-1])
    return torch.stack(masks).view(weight.shape)


def score(
    weight: torch.Tensor, method: str, squares: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the score of every weight [..., O, I], float32; `squares` are Σ x² of the inputs, for wanda."""
    if method == "random":
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    magnitude = weight.float().abs()
    return magnitude * squares.sqrt() if method == "wanda" else magnitude


def keep(scores: torch.Tensor, sparsity: float, pattern: str, *, within: str = "row") -> torch.Tensor:
    """Return the weights [..., O, I] to keep, bool: the highest scores within each row, or within the matrix.

    Blocks score as the sum of their weights and compete within their row of blocks, 2:4 within four neighbours,
    whatever `within` says. As many are dropped in the matrix as round(sparsity × I) per row, either way.
    """
    *batch, outputs, inputs = scores.shape
    if pattern == "2:4":
        return _highest(scores.view(*batch, outputs, inputs // 4, 4), 2).view(scores.shape)
    rows, columns = block_shape(pattern)
    blocks = scores.view(*batch, outputs // rows, rows, inputs // columns, columns).sum((-3, -1))
    count = blocks.shape[-1] - round(sparsity * blocks.shape[-1])
    if within == "matrix" and pattern == "unstructured":
        kept = _highest(blocks.flatten(-2), outputs * count).view(blocks.shape)
    else:
        kept = _highest(blocks, count)
    return kept.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the `count` highest scores along the last dimension, exactly that many."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(count, dim=-1).indices, True)


def sparsegpt(
    weight_EOI: torch.Tensor, gram_EII: torch.Tensor, sparsity: float, pattern: str, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weights with zeros and the rest corrected, what is kept) by SparseGPT, each [E, O, I].

    `gram_EII` is Σ x·xᵀ. Columns go in order; what dropping one does to the output is made up by the columns behind it,
    through the rows of the upper Cholesky factor of H⁻¹ (Frantar & Alistarh 2023, algorithm 1). An expert that saw no
    token has H = 1: it is pruned by magnitude.
    """
    weight, inputs = weight_EOI.float().clone(), weight_EOI.shape[-1]
    factor = _inverse_factor(gram_EII, damping)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, inputs, STEP):
        end = min(start + STEP, inputs)
        part_EOB, upper_EBB = weight[..., start:end], factor[..., start:end, start:end]
        curvature_E1B = upper_EBB.diagonal(dim1=-2, dim2=-1).square().unsqueeze(-2)
        chosen = None if pattern == "2:4" else _keep_in_step(part_EOB, curvature_E1B, sparsity, pattern, start, inputs)
        errors = torch.zeros_like(part_EOB)
        for j in range(end - start):
            if pattern == "2:4" and j % 4 == 0:
                four = part_EOB[..., j : j + 4].square() / curvature_E1B[..., j : j + 4]
                kept[..., start + j : start + j + 4] = _highest(four, 2)
            column = kept[..., start + j] if chosen is None else chosen[..., j]
            dropped_EO = part_EOB[..., j] * ~column
            errors[..., j] = dropped_EO / upper_EBB[..., j, j].unsqueeze(-1)
            part_EOB[..., j:] -= errors[..., j].unsqueeze(-1) * upper_EBB[..., j, j:].unsqueeze(-2)
            part_EOB[..., j] *= column  # exactly zero, and exactly what it was
        if chosen is not None:
            kept[..., start:end] = chosen
        weight[..., end:] -= errors @ factor[..., start:end, end:]
    return weight.to(weight_EOI.dtype), kept


def _inverse_factor(gram_EII: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, [E, I, I]."""
    damped = gram_EII.float().clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    mean_E1 = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean_E1 > 0, damping * mean_E1, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _keep_in_step(
    part_EOB: torch.Tensor, curvature_E1B: torch.Tensor, sparsity: float, pattern: str, start: int, inputs: int
) -> torch.Tensor:
    """Choose among the columns of one step; over all steps as many go as `keep` would drop."""
    rows, columns = block_shape(pattern)
    scores = part_EOB.square() / curvature_E1B
    *batch, outputs, width = scores.shape
    blocks = scores.view(*batch, outputs // rows, rows, width // columns, columns).sum((-3, -1))
    done, now = start // columns, (start + width) // columns
    count = blocks.shape[-1] - (round(sparsity * now) - round(sparsity * done))
    if pattern == "unstructured":
        kept = _highest(blocks.flatten(-2), outputs * count).view(blocks.shape)
    else:
        kept = _highest(blocks, count)
    return kept.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def shares(pruned: Pruned) -> dict[str, float]:
    """Return the share of zeros that each matrix really has, by name."""
    found = {matrix.name: matrix.weight for matrix in matrices(pruned.model)}
    return {name: 1 - int(found[name].count_nonzero()) / found[name].numel() for name in pruned.kept}
