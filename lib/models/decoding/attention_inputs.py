"""Captures the queries, keys and values of one prompt as a model's attention function receives them.

The prompt runs through a copy of the model that shares its tensors, so the original is unchanged. Knows nothing of what
replaces attention.

Shapes: H query heads, G key-value heads, T tokens, D and V head sizes.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.models.structure.anatomy import anatomy, reset_rope_deltas
from lib.models.structure.sharing import sharing

NAME = "watched"


@dataclass(frozen=True)
class Heads:
    """Rotated queries and keys, and values, of one block for one prompt, with the scale of the attention scores."""

    index: int
    query_HTD: torch.Tensor
    key_GTD: torch.Tensor
    value_GTV: torch.Tensor
    scaling: float

    @property
    def tokens(self) -> int:
        return self.query_HTD.shape[1]

    def first(self, tokens: int) -> "Heads":
        """Return the inputs for the first `tokens` tokens, which in a causal model do not depend on later ones."""
        query_HTD, key_GTD, value_GTV = self.query_HTD, self.key_GTD, self.value_GTV
        cut = (query_HTD[:, :tokens], key_GTD[:, :tokens], value_GTV[:, :tokens])
        query_HTD, key_GTD, value_GTV = (part.contiguous() for part in cut)
        return Heads(self.index, query_HTD, key_GTD, value_GTV, self.scaling)

    def separate(self) -> "Heads":
        """Return a copy of the inputs in separate memory."""
        return Heads(self.index, self.query_HTD.clone(), self.key_GTD.clone(), self.value_GTV.clone(), self.scaling)


@torch.inference_mode()
def watch(
    model: nn.Module,
    ids_1T: torch.Tensor,
    indices: Collection[int] | None = None,
    visit: Callable[[Heads], object] | None = None,
) -> list[Heads]:
    """Run one prompt through `model` with stock attention; return the heads of all blocks, or of the blocks `indices`.

    With `visit`, each block's heads are passed to it during the run and not kept, and the returned list is empty.
    """
    watched: Any = sharing(model)
    heads: list[Heads] = []
    visit = heads.append if visit is None else visit
    watched.set_attn_implementation(NAME)
    for block in anatomy(watched).blocks:
        observed_block = indices is None or block.index in indices
        block.attention.module.observed_heads = (block.index, visit) if observed_block else None
    reset_rope_deltas(watched)
    watched(input_ids=ids_1T.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    return heads


def _watching(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    if observed := getattr(module, "observed_heads", None):
        index, visit = observed
        visit(Heads(index, query[0].contiguous(), key[0].contiguous(), value[0].contiguous(), scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _watching)
AttentionMaskInterface.register(NAME, sdpa_mask)
