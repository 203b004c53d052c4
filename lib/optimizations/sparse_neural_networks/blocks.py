"""Prunes one block of a model: gathers the statistics that choose its masks, prunes its matrices, stores them sparse.

Independent of the order of blocks and of the sparsity.

Shapes: E experts (1 for a single matrix), O outputs, I inputs.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lib.models.calibration.inverse_factor import inverse_factor
from lib.models.calibration.observed import Observed
from lib.models.calibration.second_moments import Matrix, Moments, block_moments, matrices
from lib.models.calibration.walk import Walk, require_finite
from lib.models.structure import anatomy
from lib.models.structure.replacements.sparse import store
from lib.optimizations.sparse_neural_networks.matrix_pruning import (
    PruningRule,
    prune_matrix,
    short_of_tokens,
    stored_sparse,
    without_tokens,
)


@dataclass(frozen=True)
class Pruned:
    """A model with zeros in its dense matrices, and the mask of kept weights: name → bool [O, I] or [E, O, I].

    By matrix: `thin` counts Gram matrices (one, or one per expert) over fewer tokens than inputs, where damping decides
    rather than data; `unseen` counts experts that no token reached, which are pruned by magnitude.
    """

    model: nn.Module
    masks: dict[str, torch.Tensor]
    pattern: str
    thin: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)


def statistics_of(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], method: str, parts: str, observed: Observed | None
) -> Iterator[tuple[int, dict[str, Moments]]]:
    """Yield each block's index with the moments that `method` needs; the caller prunes blocks in between."""
    if method in ("magnitude", "random"):
        for block in anatomy.anatomy(model).blocks:
            require_finite(block)
            yield block.index, {}
    elif observed is not None:
        yield from observed
    else:
        walk = Walk(model, calibration)
        for block in walk:
            chosen = matrices(model, parts, block.index)
            yield block.index, block_moments(walk, chosen, gram=method == "sparsegpt", unchanged=False)


def draws(seed: int, block: int) -> torch.Generator:
    """Return the generator of one block's random masks, which does not depend on the blocks before it."""
    return torch.Generator().manual_seed(seed * 10_007 + block)


def prune_block(
    pruned: Pruned,
    of_block: Iterable[Matrix],
    statistics: dict[str, Moments],
    rule: PruningRule,
    generator: torch.Generator | None = None,
) -> None:
    """Prune the matrices of one block of `pruned.model` in place, and record their masks.

    Consecutive matrices that read the same input (queries, keys, values) share its Gram matrix and inverse factor.
    """
    gram, factor_1II = None, None
    for matrix in of_block:
        sums = statistics.get(matrix.name)
        if rule.method == "sparsegpt" and sums is not None and sums.gram is not gram:
            gram = sums.gram
            factor_1II = None
            if gram is not None and gram.dim() == 2:
                factor_1II = inverse_factor(gram[None], what=matrix.place)
        if sums is not None:
            thin = short_of_tokens(sums, matrix.weight.shape[-1]) if rule.method == "sparsegpt" else 0
            unseen = without_tokens(sums)
            pruned.thin.update({matrix.name: thin} if thin else {})
            pruned.unseen.update({matrix.name: unseen} if unseen else {})
        weight, pruned.masks[matrix.name] = prune_matrix(matrix, sums, rule, generator, factor_1II)
        setattr(matrix.owner, matrix.attribute, nn.Parameter(weight, requires_grad=False))


def warn_of_few_tokens(thin: Collection[str], stacklevel: int = 3) -> None:
    """Warn that the matrices named by `thin` saw fewer tokens than they have inputs; not used for experts."""
    if not thin:
        return
    warnings.warn(
        f"sparse_neural_networks: {next(iter(thin))} (and {len(thin) - 1} more): fewer calibration tokens than inputs; "
        "the inverse relies on damping, more calibration text would be better",
        stacklevel=stacklevel,
    )


def store_block(model: nn.Module, pruned: Pruned, block: int) -> None:
    """Convert the matrices of one block of `model` to sparse storage, in place, by the masks of `pruned`."""
    chosen = [matrix for matrix in matrices(model, "all", block) if matrix.name in pruned.masks]
    store(model, {m.name: stored_sparse(m, pruned.masks[m.name], pruned.pattern) for m in chosen})
