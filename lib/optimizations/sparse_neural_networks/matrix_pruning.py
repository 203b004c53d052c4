"""Prunes one matrix of a model: its mask, its pruned weights, and their sparse storage.

Works on single matrices and on stacks of experts. Independent of the rest of the model.

Shapes: E experts (1 for a single matrix), O outputs, I inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib.errors import NotApplicable
from lib.models.calibration.second_moments import Matrix, Moments
from lib.models.structure.replacements.sparse import compress
from lib.optimizations.sparse_neural_networks.masks import block_shape, keep, score, sparsegpt

MOST_FACTORS = 2**26  # elements of inverse factors held at a time
LEAST_ROWS = 8  # groups of fewer rows are executed as CSR: their dense products would be too thin
INDEX_BYTES = 4  # bytes of a column index, and of a row start
KEPT_IN_A_BYTE = 4  # the tensor cores' format stores a kept weight's position among four neighbours in two bits


@dataclass(frozen=True)
class PruningRule:
    """How the weights of a matrix are pruned: the share, the score, the pattern, and where scores compete."""

    sparsity: float
    method: str
    pattern: str
    within: str = "row"


def prune_matrix(
    matrix: Matrix,
    moments: Moments | None,
    rule: PruningRule,
    generator: torch.Generator | None = None,
    factor_1II: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pruned weight and the bool mask of kept weights, both in the weight's shape.

    The weight itself is not changed. `factor_1II`: the inverse factor of a single matrix, see `masks.sparsegpt`. Raises
    ValueError if SparseGPT lacks the Gram matrix of the inputs.
    """
    weight = matrix.weight.data
    if rule.method != "sparsegpt":
        mask = choose(matrix, moments, rule, generator)
        return weight * mask, mask
    if moments is None or moments.gram is None:
        raise ValueError(f"{matrix.name}: sparsegpt needs the Gram matrix of its inputs")
    gram_EII = moments.gram.view(-1, *moments.gram.shape[-2:])
    stack_EOI = weight.view(-1, *weight.shape[-2:])
    pruned_EOI, mask_EOI = torch.empty_like(stack_EOI), torch.empty_like(stack_EOI, dtype=torch.bool)
    at_once = max(1, MOST_FACTORS // gram_EII[0].numel())
    for first in range(0, len(stack_EOI), at_once):  # the inverses of a large stack do not fit
        part = slice(first, first + at_once)
        options: dict[str, Any] = {"factor_EII": factor_1II, "what": matrix.place}
        pruned_EOI[part], mask_EOI[part] = sparsegpt(
            stack_EOI[part], gram_EII[part], rule.sparsity, rule.pattern, **options
        )
    return pruned_EOI.view(weight.shape), mask_EOI.view(weight.shape)


def choose(
    matrix: Matrix, moments: Moments | None, rule: PruningRule, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the bool mask of the weights kept by score alone, in the weight's shape; the weight is not changed."""
    stack_EOI = matrix.weight.data.view(-1, *matrix.weight.shape[-2:])
    squares = [None] * len(stack_EOI) if moments is None else moments.squares.view(len(stack_EOI), -1)
    mask_EOI = torch.empty(stack_EOI.shape, dtype=torch.bool, device=stack_EOI.device)
    for mask_OI, weight_OI, square in zip(mask_EOI, stack_EOI, squares):  # scores of a large stack do not fit
        scores = score(weight_OI, rule.method, square, generator)
        mask_OI.copy_(keep(scores, rule.sparsity, rule.pattern, within=rule.within))
    return mask_EOI.view(matrix.weight.shape)


def stored_sparse(matrix: Matrix, mask: torch.Tensor, pattern: str) -> torch.Tensor:
    """Return the kept weights in the layout that executes `pattern`.

    On a CPU 2:4 has no kernel of its own and becomes CSR. Raises NotApplicable if the tensor cores' format does not fit
    the matrix.
    """
    layout = layout_for(matrix, pattern)
    if layout == "semi_structured":
        check_tensor_cores(matrix)
    return compress(matrix.weight.data, mask, layout, block_shape(pattern)[0])


def layout_for(matrix: Matrix, pattern: str) -> str:
    """Return the name of the layout (see `compress`) that executes `pattern`."""
    if on_tensor_cores(matrix, pattern):
        return "semi_structured"
    return "columns" if block_shape(pattern)[0] >= LEAST_ROWS else "csr"


def stored_bytes(matrix: Matrix, mask: torch.Tensor, pattern: str) -> int:
    """Return the bytes, indices included, of the result of `stored_sparse`, without computing it."""
    return bytes_with(matrix, int(mask.sum()), mask.shape, pattern)


def bytes_with(matrix: Matrix, kept: int, shape: Sequence[int], pattern: str) -> int:
    """Return the bytes, indices included, of a matrix of this shape with `kept` weights in the layout of `pattern`."""
    layout, rows = layout_for(matrix, pattern), block_shape(pattern)[0]
    if layout == "semi_structured":
        return kept * matrix.weight.element_size() + kept // KEPT_IN_A_BYTE
    if layout == "columns":
        starts = row_starts(shape, rows)
        return kept * matrix.weight.element_size() + INDEX_BYTES * (kept // rows + starts)
    return kept * csr_bytes(matrix.weight) + INDEX_BYTES * row_starts(shape)


def csr_bytes(weight: torch.Tensor) -> int:
    """Return the bytes per weight stored in CSR; on a CPU the value is always float32."""
    return INDEX_BYTES + (weight.element_size() if weight.is_cuda else 4)


def row_starts(shape: Sequence[int], rows: int = 1) -> int:
    """Return the number of row starts stored by CSR or by groups of `rows` rows: per matrix one more than groups."""
    *stack, outputs, _ = shape
    return math.prod(stack) * (outputs // rows + 1)


def on_tensor_cores(matrix: Matrix, pattern: str) -> bool:
    """Return whether `pattern` runs in the tensor cores' format: 2:4 in linear layers on CUDA."""
    return pattern == "2:4" and matrix.weight.is_cuda and matrix.part != "experts"


def check_tensor_cores(matrix: Matrix) -> None:
    """Raise NotApplicable if 2:4 cannot be executed on CUDA for this matrix."""
    outputs, inputs = matrix.weight.shape
    if outputs % 32 or inputs % 64 or matrix.weight.dtype not in (torch.float16, torch.bfloat16):
        raise NotApplicable(
            f"{matrix.name}: 2:4 on CUDA needs rows divisible by 32, columns by 64, and float16 or bfloat16; this is "
            f"{outputs} x {inputs}, {matrix.weight.dtype}; use execute dense"
        )


def short_of_tokens(moments: Moments, inputs: int) -> int:
    """Return how many of the matrix's moments (one, or one per expert) are over fewer tokens than it has inputs.

    For these, the inverse that SparseGPT needs exists only through damping.
    """
    return int((moments.tokens < inputs).sum())


def without_tokens(moments: Moments) -> int:
    """Return how many of the matrix's moments are over no token at all; these experts are pruned by magnitude."""
    return int((moments.tokens == 0).sum())
