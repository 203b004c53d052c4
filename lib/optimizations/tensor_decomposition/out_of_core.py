"""Factors a checkpoint that need not fit into memory, block by block, from file to file.

Two walks: one finds what every rank keeps, one puts the factors in.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.models.calibration.walk import Walk
from lib.models.offload.file_blocks import FileBlocks, rewrite
from lib.models.structure.anatomy import Block
from lib.optimizations.common.compression import options as checks
from lib.optimizations.tensor_decomposition.allocation import allocate
from lib.optimizations.tensor_decomposition.analysis import Spectra, block_spectra
from lib.optimizations.tensor_decomposition.installing import install
from lib.optimizations.tensor_decomposition.method import NAME


def apply_to_file(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    compression: float = 0.2,
    budget: str = "uniform",
    device: str = "cpu",
) -> Path:
    """Write the checkpoint in `source` with whitened factors to the new folder `target`; return it.

    The factors are those of `method.apply` with the same options on matrices that are worth the same: the divergence
    that weighs them needs the whole model. Raises UserError as `method.apply` and `file_blocks.rewrite` do.
    """
    checks.in_range(NAME, "compression", compression, 0, 1, closed="neither")
    checks.one_of(NAME, "budget", budget, ("global", "uniform"))
    with closing(FileBlocks(source, device=device)) as store:
        spectra = Spectra(store.model, calibration, weighed=False, room=0, store=store)
        ranks = allocate(store.model, spectra.curves(), compression, budget)

    def change(model: nn.Module, walk: Walk, block: Block) -> None:
        of_block = list(block_spectra(walk, block))
        names = {spectrum.matrix.name for spectrum in of_block}
        walk.forget()
        install(model, of_block, {name: rank for name, rank in ranks.items() if name in names})

    about: dict[str, Any] = {"optimization": NAME, "compression": compression, "budget": budget}
    return rewrite(source, target, calibration, change, about=about, device=device)
