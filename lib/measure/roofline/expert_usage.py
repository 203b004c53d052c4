"""How many distinct experts a step of a mixture-of-experts model reads: counted by hooks, or expected under uniform
routing. Knows nothing of costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lib.models.structure.anatomy import anatomy


@dataclass
class ExpertUsage:
    """Distinct experts of every forward pass, per block index: lists of (tokens, distinct experts)."""

    passes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def mean(self, tokens: int | None = None) -> dict[int, float]:
        """Return the mean number of distinct experts per block, of passes with `tokens` tokens (of all where None)."""
        means = {}
        for block, passes in self.passes.items():
            counts = [distinct for size, distinct in passes if tokens is None or size == tokens]
            if counts:
                means[block] = sum(counts) / len(counts)
        return means


@contextmanager
def counted(model: nn.Module) -> Iterator[ExpertUsage]:
    """Count the distinct experts of every pass inside the block by hooks on the routers (third output, [tokens, k])."""
    usage = ExpertUsage()

    def hook(block: int):
        def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
            chosen = output[2]
            usage.passes.setdefault(block, []).append((chosen.shape[0], int(chosen.unique().numel())))

        return count

    handles = [
        block.feed_forward.experts.router.register_forward_hook(hook(block.index))
        for block in anatomy(model).blocks
        if block.feed_forward.experts
    ]
    try:
        yield usage
    finally:
        for handle in handles:
            handle.remove()


def expected(count: int, top_k: int, tokens: float) -> float:
    """Return E·(1 − (1 − k/E)^B): the distinct experts that B tokens use under uniform routing."""
    return count * (1 - (1 - top_k / count) ** tokens)
