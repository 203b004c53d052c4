"""What the heads of a model work on: the queries, keys and values of one prompt, as the attention function gets them.

Knows nothing of how attention is computed instead. `sharing` gives the copy of a model whose attention can be exchanged
without touching the caller's.

Shapes: H query heads, G key-value heads, T tokens, D and V head sizes.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.models.structure.anatomy import anatomy, reset_rope_deltas

NAME = "watched"


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one block for one prompt, rotated, and the scale of their products."""

    index: int
    query_HTD: torch.Tensor
    key_GTD: torch.Tensor
    value_GTV: torch.Tensor
    scaling: float

    @property
    def tokens(self) -> int:
        return self.query_HTD.shape[1]

    def first(self, tokens: int) -> "Heads":
        """Return the same heads at work on the first `tokens` tokens: causal, so nothing else changes."""
        parts = (part[:, :tokens].contiguous() for part in (self.query_HTD, self.key_GTD, self.value_GTV))
        return Heads(self.index, *parts, self.scaling)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the modules and the configuration that shares every parameter and buffer with `model`."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def watch(model: nn.Module, ids_1T: torch.Tensor, indices: Collection[int] | None = None) -> list[Heads]:
    """Run one prompt through `model` (stock attention) and return the heads of its blocks, or of those in `indices`."""
    watched, seen = sharing(model), []
    watched.set_attn_implementation(NAME)
    for block in anatomy(watched).blocks:
        wanted = indices is None or block.index in indices
        block.attention.module.seen_heads = (block.index, seen) if wanted else None
    reset_rope_deltas(watched)
    watched(input_ids=ids_1T.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    return seen


def _watching(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    if found := getattr(module, "seen_heads", None):
        found[1].append(Heads(found[0], query[0].contiguous(), key[0].contiguous(), value[0].contiguous(), scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _watching)
AttentionMaskInterface.register(NAME, sdpa_mask)
