"""Blocks without attention or without a feed-forward part: the part gives zeros, so only the residual stream passes.

Attention is what fills the cache, and a decoder asks the first layer of its cache how long the text is; so a block
without attention takes no place in the cache: `lib.models.structure.anatomy.synchronise` numbers the others. Knows
nothing of which part is worth removing.

Shapes: B batch, T tokens, H hidden.
"""

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy, synchronise

PARTS = ("attention", "feed_forward")


class NoAttention(nn.Module):
    """In the place of an attention module: adds nothing, keeps nothing in the cache."""

    absent = True

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        """Return zeros [B, T, H], and no weights of attention."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """In the place of a feed-forward module: adds nothing."""

    absent = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros [B, T, H]."""
        return torch.zeros_like(hidden_states)


def place(layer: nn.Module, part: str, module: nn.Module) -> None:
    """Put `module` in the place of one part ("attention" or "feed_forward") of the decoder block `layer`, in place."""
    setattr(layer, {"attention": "self_attn", "feed_forward": "mlp"}[part], module)


def describe(model: nn.Module) -> list[dict[str, object]]:
    """Return, block by block, which parts are absent and how many experts a token is sent to: plain JSON."""
    found = []
    for block in anatomy(model).blocks:
        experts = block.feed_forward.experts
        absent = [part for part in PARTS if getattr(block, part).kind == "none"]
        found.append({"absent": absent} | ({"top_k": experts.top_k} if experts else {}))
    return found


def restore(model: nn.Module, stored: list[dict]) -> None:
    """Give `model` the absent parts and the numbers of experts per token that `describe` told of, in place.

    Raises UserError where the model has other blocks.
    """
    blocks = anatomy(model).blocks
    if stored and len(stored) != len(blocks):
        raise UserError(f"the manifest tells of {len(stored)} blocks, the configuration of {len(blocks)}")
    for block, told in zip(blocks, stored):
        for part in told.get("absent", ()):
            place(block.module, part, NoAttention() if part == "attention" else NoFeedForward())
        if "top_k" in told and block.feed_forward.experts:
            block.feed_forward.experts.router.top_k = told["top_k"]


def remove(model: nn.Module, index: int, part: str) -> nn.Module:
    """Remove one part of block `index` in place; return the model. Raises UserError for the last attention."""
    blocks = anatomy(model).blocks
    if part == "attention" and sum(block.attention.kind != "none" for block in blocks) == 1:
        raise UserError(f"block {index}: the last attention must stay, or no token would see another")
    place(blocks[index].module, part, NoAttention() if part == "attention" else NoFeedForward())
    return synchronise(model)
