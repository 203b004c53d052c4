"""Blocks without attention or feed-forward part: a module that returns zeros leaves only the residual stream.

A decoder reads the number of cached tokens from the first layer of its cache, so a block without attention must not
have a layer there: `lib.models.structure.surgery.synchronise` numbers the others. Knows nothing of which part is worth
removing.

Shapes: B batch, T tokens, H hidden.
"""

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy
from lib.models.structure.surgery import synchronise

PARTS = ("attention", "feed_forward")


class NoAttention(nn.Module):
    """Replaces an attention module; adds nothing to the residual stream and stores nothing in the cache."""

    absent = True

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        """Return zeros [B, T, H], and None for the attention weights."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Replaces a feed-forward module; adds nothing to the residual stream."""

    absent = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros [B, T, H]."""
        return torch.zeros_like(hidden_states)


def place(layer: nn.Module, part: str, module: nn.Module) -> None:
    """Replace one part ("attention" or "feed_forward") of the decoder block `layer` by `module`, in place."""
    setattr(layer, {"attention": "self_attn", "feed_forward": "mlp"}[part], module)


def describe(model: nn.Module) -> list[dict[str, object]]:
    """Return for each block its absent parts and the number of experts per token, as plain JSON."""
    entries: list[dict[str, object]] = []
    for block in anatomy(model).blocks:
        experts = block.feed_forward.experts
        absent = [part for part in PARTS if getattr(block, part).kind == "none"]
        entries.append({"absent": absent} | ({"top_k": experts.top_k} if experts else {}))
    return entries


def restore(model: nn.Module, stored: list[dict]) -> None:
    """Remove the absent parts and set the experts per token as `stored`, which `describe` returned, says; in place.

    Raises UserError if the number of blocks differs.
    """
    blocks = anatomy(model).blocks
    if stored and len(stored) != len(blocks):
        raise UserError(f"the manifest describes {len(stored)} blocks, the configuration {len(blocks)}")
    for block, entry in zip(blocks, stored):
        for part in entry.get("absent", ()):
            place(block.module, part, NoAttention() if part == "attention" else NoFeedForward())
        if "top_k" in entry and block.feed_forward.experts:
            block.feed_forward.experts.router.top_k = entry["top_k"]


def remove(model: nn.Module, index: int, part: str) -> nn.Module:
    """Remove one part of block `index` in place; return the model. Raises UserError for the last attention."""
    blocks = anatomy(model).blocks
    if part == "attention" and sum(block.attention.kind != "none" for block in blocks) == 1:
        raise UserError(f"block {index}: the last attention must stay, or no token would see another")
    place(blocks[index].module, part, NoAttention() if part == "attention" else NoFeedForward())
    return synchronise(model)
