"""The number of distinct experts that a step of a mixture-of-experts model reads: counted by hooks, or expected under
uniform routing. Knows nothing about costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lib.models.structure.anatomy import anatomy


@dataclass
class ExpertUsage:
    """Experts used by forward passes: `passes` maps a block's index to a list of (tokens, distinct experts)."""

    passes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def mean(self, tokens: int | None = None) -> dict[int, float]:
        """Return each block's mean number of distinct experts, over passes with `tokens` tokens (None: all passes)."""
        means = {}
        for block, passes in self.passes.items():
            counts = [distinct for size, distinct in passes if tokens is None or size == tokens]
            if counts:
                means[block] = sum(counts) / len(counts)
        return means


@contextmanager
def counted(model: nn.Module) -> Iterator[ExpertUsage]:
    """Count the distinct experts of every pass inside the context, by hooks on the routers (third output,
    [tokens, k]).
    """
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
    """Return the expected number of distinct experts that B tokens use under uniform routing: E·(1 − (1 − k/E)^B)."""
    return count * (1 - (1 - top_k / count) ** tokens)
