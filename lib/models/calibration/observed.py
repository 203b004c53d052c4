"""The second moments of a whole model, block by block, reusable for many settings on the same text.

Knows nothing of what the moments are used for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lib import memory_limits
from lib.models.calibration.second_moments import Moments, block_moments, matrices
from lib.models.calibration.walk import Walk


@dataclass
class Observed:
    """The moments of the matrices in `part` of an unchanged model; iterating yields (block index, moments by name).

    Each iteration is one pass over the text and holds the moments of one block at a time. If the moments of all blocks
    fit into `room` bytes (`lib.memory_limits.room_to_keep`), they are kept for later iterations. The other options are
    those of `block_moments` and `matrices`.
    """

    model: nn.Module
    calibration: Sequence[dict[str, torch.Tensor]]
    part: str = "all"
    gram: bool = True
    dtype: torch.dtype = torch.float32
    weighting: str = "tokens"
    inside_factors: bool = True
    room: int = field(default_factory=memory_limits.room_to_keep)
    _kept: dict[int, dict[str, Moments]] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Moments]]]:
        if self._kept is not None:
            yield from self._kept.items()
            return
        kept: dict[int, dict[str, Moments]] | None = {}
        used = 0
        walk = Walk(self.model, self.calibration)
        for block in walk:
            chosen = matrices(self.model, self.part, block.index, inside_factors=self.inside_factors)
            options: dict[str, Any] = {"gram": self.gram, "dtype": self.dtype, "weighting": self.weighting}
            by_name = block_moments(walk, chosen, **options)
            used += nbytes(by_name)
            if kept is not None:
                kept = kept | {block.index: by_name} if used <= self.room else None
            yield block.index, by_name
        self._kept = kept

    def of(self, block: int) -> dict[str, Moments]:
        """Return the moments of one block, by name."""
        return next((by_name for index, by_name in self if index == block), {})


def nbytes(by_name: dict[str, Moments]) -> int:
    """Return the bytes of moments, counting shared ones once."""
    distinct = {id(sums): sums for sums in by_name.values()}.values()
    return sum(sums.squares.nbytes + (0 if sums.gram is None else sums.gram.nbytes) for sums in distinct)
