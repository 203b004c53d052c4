"""Prune a checkpoint that may not fit in memory, block by block, from file to file.

Two walks: the first ranks the parts of the whole model, the second removes them. Text statistics are a few numbers per
part, so those of all blocks are held.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.activations import block_statistics
from lib.models.calibration.distillation import can_split, split
from lib.models.calibration.walk import Walk
from lib.models.offload.file_blocks import FileBlocks
from lib.models.offload.rewriting import reserved, write_into
from lib.models.structure.anatomy import Block
from lib.models.structure.surgery import synchronise
from lib.optimizations.structured_pruning import cutting
from lib.optimizations.structured_pruning.method import NAME, check, plan
from lib.optimizations.structured_pruning.saliency import Scores, saliency_scores


def apply_to_file(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    ratio: float = 0.3,
    granularity: str = "auto",
    saliency: str = "activation",
    compensate: bool | None = None,
    seed: int = 0,
    device: str = "cpu",
    shards: Path | None = None,
) -> Path:
    """Write the checkpoint in `source` without its least salient parts to the new folder `target`; return it.

    Options and result as for `method.apply`. Raises UserError as that and `rewriting.rewrite` do, and for granularity
    "depth", where the blocks to remove are known only at the end.
    """
    check(ratio, granularity, saliency)
    if granularity == "depth":
        raise UserError(f"{NAME}: whole blocks cannot be removed from file to file; choose experts, channels or heads")
    compensate = can_split(calibration) if compensate is None else compensate
    about: dict[str, Any] = {"optimization": NAME, "ratio": ratio, "granularity": granularity, "saliency": saliency}
    about |= {"compensate": compensate, "seed": seed}
    with ExitStack() as stack:
        with closing(FileBlocks(source, device=device)) as store:
            shares = plan(store.model, ratio, granularity)
            if not any(shares.values()):
                raise UserError(f"{NAME}: ratio {ratio} removes nothing, so there is nothing to write")
            fitted = compensate and any(shares[part] for part in cutting.FITTED)
            taught, held_out = split(calibration) if fitted else ([*calibration], [])
            text = [*taught, *held_out]
            # Reserved before the long ranking.
            folder = stack.enter_context(reserved(source, target, text, about=about, shards=shards))
            scores = _scores(store, calibration, saliency, seed)

        def change(model: nn.Module, walk: Walk, block: Block) -> None:
            readings = cutting.readings(walk, len(taught)) if fitted else None
            cutting.prune_block(block, scores[block.index], shares, readings)
            synchronise(model)

        return write_into(folder, source, target, text, change, about=about, device=device)


def _scores(
    store: FileBlocks, calibration: Sequence[dict[str, torch.Tensor]], saliency: str, seed: int
) -> list[Scores]:
    """Return the saliency of every block's parts in the original model."""
    scores = []
    walk = Walk(store.model, calibration, store=store)
    for block in walk:
        outputs: list[torch.Tensor] = []
        scores.append(saliency_scores(block, block_statistics(walk, block, outputs), saliency, seed))
        walk.carry_on(outputs)
    return scores


def options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `apply_to_file` for the parameters of a run, with compensation.

    Raises UserError for distillation, which needs the whole model in memory.
    """
    if parameters["finetune_steps"] > 0:
        raise UserError(f"{NAME}: distillation needs the whole model in memory; give -p finetune_steps=0")
    return {name: parameters[name] for name in ("ratio", "granularity", "seed")} | {"compensate": True}
