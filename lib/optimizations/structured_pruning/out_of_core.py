"""Removes parts of a checkpoint that need not fit into memory, block by block, from file to file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.activations import block_statistics
from lib.models.calibration.second_moments import block_moments
from lib.models.calibration.walk import Walk
from lib.models.offload.file_blocks import rewrite
from lib.models.structure.anatomy import Block, synchronise
from lib.optimizations.structured_pruning import cutting
from lib.optimizations.structured_pruning.method import NAME, plan
from lib.optimizations.structured_pruning.saliency import saliency_scores


def apply_to_file(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    ratio: float = 0.3,
    granularity: str = "auto",
    saliency: str = "activation",
    compensate: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Write the checkpoint in `source` without its least salient parts to the new folder `target`; return it.

    Options as of `method.apply`; each block is ranked by what the pruned blocks before it give to it. Raises UserError
    as `method.apply` and `file_blocks.rewrite` do, and for granularity "depth": which blocks go is known at the end.
    """
    if granularity == "depth":
        raise UserError(f"{NAME}: whole blocks cannot be removed from file to file; choose experts, channels or heads")
    shares: dict[str, float] = {}

    def change(model: nn.Module, walk: Walk, block: Block) -> None:
        shares.update(shares or plan(model, ratio, granularity))
        if not any(shares.values()):
            return
        scores = saliency_scores(block, block_statistics(walk, block), saliency, seed)
        reading = cutting.reading(model, block.index) if compensate else []
        moments = block_moments(walk, reading, gram=True, unchanged=False) if compensate else {}
        by_owner = {id(matrix.owner): moments[matrix.name] for matrix in reading}
        cutting.prune_block(block, scores, shares, by_owner if compensate else None)
        synchronise(model)

    about: dict[str, Any] = {"optimization": NAME, "ratio": ratio, "granularity": granularity, "saliency": saliency}
    about |= {"compensate": compensate, "seed": seed}
    return rewrite(source, target, calibration, change, about=about, device=device)
