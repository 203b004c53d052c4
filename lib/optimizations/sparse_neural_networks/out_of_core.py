"""Prune the weights of a checkpoint that may not fit in memory, block by block, from file to file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.second_moments import block_moments, matrices
from lib.models.calibration.walk import Walk
from lib.models.offload.rewriting import rewrite
from lib.models.structure.anatomy import Block
from lib.optimizations.common.compression import options as checks
from lib.optimizations.sparse_neural_networks.blocks import (
    Pruned,
    draws,
    prune_block,
    store_block,
    warn_of_few_tokens,
)
from lib.optimizations.sparse_neural_networks.experiment import share_of_zeros
from lib.optimizations.sparse_neural_networks.matrix_pruning import PruningRule
from lib.optimizations.sparse_neural_networks.method import EXECUTE, NAME, check, check_executed


def apply_to_file(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    sparsity: float = 0.5,
    method: str = "sparsegpt",
    pattern: str = "unstructured",
    within: str = "row",
    parts: str = "all",
    execute: str = "sparse",
    seed: int = 0,
    device: str = "cpu",
    shards: Path | None = None,
) -> Path:
    """Prune a share `sparsity` of every matrix in the checkpoint `source`; write the result to the new folder `target`.

    Returns `target`. Options, result and warnings as for `method.apply`, with blocks pruned in order. Raises
    UserError as `method.apply` and `rewriting.rewrite` do.
    """
    checks.one_of(NAME, "execute", execute, EXECUTE)
    options: dict[str, Any] = {"sparsity": sparsity, "method": method, "pattern": pattern, "within": within}
    rule = PruningRule(sparsity, method, pattern, within)
    thin: list[str] = []

    def change(model: nn.Module, walk: Walk, block: Block) -> None:
        check(model, parts=parts, **options)
        if execute == "sparse":
            check_executed(model, pattern, parts)
        of_block, statistics = matrices(model, parts, block.index), {}
        if method in ("wanda", "sparsegpt"):
            statistics = block_moments(walk, of_block, gram=method == "sparsegpt", unchanged=False)
        pruned = Pruned(model, {}, pattern)
        prune_block(pruned, of_block, statistics, rule, draws(seed, block.index))
        thin.extend(matrix.name for matrix in of_block if matrix.part != "experts" and matrix.name in pruned.thin)
        if execute == "sparse":
            store_block(model, pruned, block.index)

    about = {"optimization": NAME, "parts": parts, "execute": execute, "seed": seed, **options}
    folder = rewrite(source, target, calibration, change, about=about, device=device, shards=shards)
    warn_of_few_tokens(thin)
    return folder


def options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `apply_to_file` for the parameters of a run, with the default sparsity of real size.

    Raises UserError for fine-tuning, which needs the whole model in memory.
    """
    if parameters["finetune_steps"] > 0:
        raise UserError(f"{NAME}: fine-tuning needs the whole model in memory; give -p finetune_steps=0")
    chosen = {name: parameters[name] for name in ("method", "pattern", "within", "parts", "seed")}
    return chosen | {"sparsity": share_of_zeros(parameters["sparsity"], parameters["pattern"], "full")}
