"""Factor a checkpoint that may not fit in memory, block by block, from file to file.

Two passes: the first computes the spectra, the second installs the factors. In the second, the text runs through the
original and the factored blocks side by side, as in memory, with one block of each loaded at a time.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration import blockwise
from lib.models.calibration.distillation import split
from lib.models.calibration.walk import Walk
from lib.models.offload.file_blocks import FileBlocks
from lib.models.offload.rewriting import reserved, write_into
from lib.models.structure.anatomy import Block
from lib.optimizations.common.compression import options as checks
from lib.optimizations.tensor_decomposition.allocation import allocate, room_for
from lib.optimizations.tensor_decomposition.analysis import Spectra, block_spectra
from lib.optimizations.tensor_decomposition.installing import install
from lib.optimizations.tensor_decomposition.method import NAME

METHODS = ("whitened", "refitted")


def apply_to_file(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    compression: float = 0.2,
    method: str = "whitened",
    budget: str = "uniform",
    device: str = "cpu",
    shards: Path | None = None,
) -> Path:
    """Write the checkpoint in `source` with "whitened" or "refitted" factors to the new folder `target`; return it.

    The factors are those of `method.apply` with the same options, except that every matrix has the same worth: to
    measure worth takes the whole model. Raises UserError as `method.apply` and `rewriting.rewrite` do.
    """
    checks.in_range(NAME, "compression", compression, 0, 1, closed="neither")
    checks.choices(NAME, {"method": (method, METHODS), "budget": (budget, ("global", "uniform"))})
    taught, held_out = split(calibration) if method == "refitted" else ([*calibration], [])
    text = [*taught, *held_out]
    about: dict[str, Any] = {"optimization": NAME, "compression": compression, "method": method, "budget": budget}
    reservation = reserved(source, target, text, about=about, shards=shards)  # before the long computation
    with reservation as folder, closing(FileBlocks(source, device=device)) as store:
        spectra = Spectra(store.model, text, weighed=False, room=0, store=store)
        room_for(store.model, spectra.require_matrices(), compression)
        ranks = allocate(store.model, spectra.curves(), compression, budget)
        original = _Original(store, text)

        def change(model: nn.Module, walk: Walk, block: Block) -> None:
            whole = original.at(block.index)
            of_block = list(block_spectra(original.walk, whole))
            names = {spectrum.matrix.name for spectrum in of_block}
            install(model, of_block, {name: rank for name, rank in ranks.items() if name in names})
            if method == "refitted":
                lessons = blockwise.lessons_of(original.walk, walk)
                blockwise.refit_block(block, whole, original.walk, lessons, len(taught))

        return write_into(folder, source, target, text, change, about=about, device=device)


class _Original:
    """A walk through the original blocks that advances on demand to the block about to be changed."""

    def __init__(self, store: FileBlocks, text: Sequence[dict[str, torch.Tensor]]):
        self.walk = Walk(store.model, text, store=store)
        self._blocks = iter(self.walk)

    def at(self, index: int) -> Block:
        """Return block `index` and leave the walk in front of it; call with ascending indices only."""
        return next(block for block in self._blocks if block.index == index)


def remark(parameters: Mapping[str, Any]) -> str:
    """Return how the ranks differ from those of a run in memory; empty for uniform ranks, which do not."""
    if parameters["budget"] == "uniform":
        return ""
    return (
        "Every matrix had the same worth, because measuring it takes the whole model in memory: the ranks differ from "
        "those of a run in memory with the same budget."
    )


def options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `apply_to_file` for the parameters of a run; method "auto" becomes "refitted".

    Raises UserError if the method needs the whole model in memory.
    """
    method = "refitted" if parameters["method"] == "auto" else parameters["method"]
    if method not in METHODS:
        raise UserError(
            f'{NAME}: method "{method}" needs the whole model in memory; give -p method=whitened or refitted'
        )
    return {"method": method, "compression": parameters["compression"], "budget": parameters["budget"]}
