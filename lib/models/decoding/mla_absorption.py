"""Latent attention that decodes in the latent space: the expansion is absorbed into queries and outputs.

Stock latent attention expands every cached latent to keys and values of all heads, again for each new token. Since
q·(W_UK c) = (W_UKᵀ q)·c, the query can be projected to latent space instead, once per token, and the weighted sum of
latents is expanded at the end (DeepSeek-V2, 2024, section 2.1.2): exact up to rounding. It pays for few new tokens on a
long cache. Each call takes the path with fewer operations, so a prompt takes the stock path. Works for every storage of
the expansion matrix (`lib.models.decoding.latent_expansion`).

Shapes: B batch, T new tokens, S cached and new tokens, Q heads, H hidden, R latent, P rotary, N no-rotary, D value.
"""

import sys
import types
from typing import Any

import torch
from torch import nn

from lib.models.decoding import cache_names, latent_expansion, latent_products
from lib.models.structure.anatomy import anatomy


def absorb(model: nn.Module) -> nn.Module:
    """Make every latent attention of `model` decode absorbed, in place; return the model.

    Modules with an expansion of their own (`expand_kv`) are unchanged, since they already decode in latent space.
    """
    for block in anatomy(model).blocks:
        if block.attention.kind == "latent" and "expand_kv" not in vars(block.attention.module):
            block.attention.module.forward = types.MethodType(_forward, block.attention.module)
    return model


def expand(model: nn.Module) -> nn.Module:
    """Undo `absorb` in place; return the model."""
    for block in anatomy(model).blocks:
        if decodes_absorbed(block.attention.module):
            del block.attention.module.forward
    return model


def is_absorbed(model: nn.Module) -> bool:
    """Return whether any attention of `model` decodes absorbed."""
    return any(decodes_absorbed(block.attention.module) for block in anatomy(model).blocks)


def decodes_absorbed(module: nn.Module) -> bool:
    """Return whether the attention `module` decodes absorbed."""
    return getattr(vars(module).get("forward"), "__func__", None) is _forward


def decodes_in_latents(module: nn.Module) -> bool:
    """Return whether the attention `module` decodes without expanding its cache: absorbed, or with an expansion of its
    own (`expand_kv`), which requires a dense matrix.
    """
    own = "expand_kv" in vars(module) and isinstance(module.kv_b_proj, nn.Linear)
    return decodes_absorbed(module) or own


def most_tokens(module: Any) -> int:
    """Return the largest number of new tokens at which the absorbed path takes fewer operations on a long cache.

    Per cached token and head, the stock path takes 2·R·(N + D) operations to expand (fewer if factored) and
    2·(N + P + D) per new token; the absorbed path takes 2·(2R + P) per new token.
    """
    latent, width = module.kv_lora_rank, module.qk_nope_head_dim + module.v_head_dim
    expansion = latent_expansion.elements_per_token(module.kv_b_proj, latent, width)
    extra = 2 * latent - width  # of the absorbed path, per new token
    return sys.maxsize if extra <= 0 else int(expansion / extra)


def _forward(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replacement of a latent attention's forward: returns (output [B, T, H], None) for hidden states [B, T, H]."""
    new, cache = hidden_states.shape[1], cache_names.pop_from(kwargs)
    if cache is None or new > most_tokens(module) or cache.get_seq_length(module.layer_idx) == 0:
        kwargs |= cache_names.as_kwargs(cache)
        return type(module).forward(module, hidden_states, position_embeddings, attention_mask, **kwargs)
    q_nope_BQTN, q_rope_BQTP, c_B1TR, k_rope_B1TP = _projections(module, hidden_states, position_embeddings)
    c_B1SR, k_rope_B1SP = cache.update(c_B1TR, k_rope_B1TP, module.layer_idx)
    heads, nope = q_nope_BQTN.shape[1], module.qk_nope_head_dim
    expansion = latent_expansion.of(module.kv_b_proj, heads, nope, q_nope_BQTN.dtype)
    q_latent_BQTR = expansion.into(q_nope_BQTN)
    latent_BQTR = _attend(module, q_latent_BQTR, q_rope_BQTP, c_B1SR[:, 0], k_rope_B1SP[:, 0], attention_mask)
    value_BQTD = expansion.out_of(latent_BQTR)
    output_BTX = value_BQTD.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
    return module.o_proj(output_BTX), None


def _projections(module: Any, hidden_BTH: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, ...]:
    """Return the queries' parts without and with rotation, the new latents and the new rotated shared keys."""
    batch, new = hidden_BTH.shape[:2]
    if module.q_proj is not None:
        q_BTX = module.q_proj(hidden_BTH)
    else:
        q_BTX = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_BTH)))
    q_BQTX = q_BTX.view(batch, new, -1, module.qk_head_dim).transpose(1, 2)
    q_nope, q_rope = q_BQTX.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    c_BTR, k_rope_BTP = module.kv_a_proj_with_mqa(hidden_BTH).split(
        [module.kv_lora_rank, module.qk_rope_head_dim], dim=-1
    )
    c_B1TR, k_rope_B1TP = module.kv_a_layernorm(c_BTR)[:, None], k_rope_BTP[:, None]
    # The architecture's own rotation, from the transformers module that defines its attention.
    interleave = getattr(module.config, "rope_interleave", False)
    name = "apply_rotary_pos_emb_interleave" if interleave else "apply_rotary_pos_emb"
    rotate = getattr(sys.modules[type(module).__module__], name)
    q_rope, k_rope_B1TP = rotate(q_rope, k_rope_B1TP, *position_embeddings)
    return q_nope, q_rope, c_B1TR, k_rope_B1TP


def _attend(
    module: Any,
    q_latent_BQTR: torch.Tensor,
    q_rope_BQTP: torch.Tensor,
    c_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the weighted sums of latents [B, Q, T, R]. Heads share the keys, so they are rows of a single product."""
    batch, heads, new, latent = q_latent_BQTR.shape
    rows = heads * new
    scores = latent_products.scores(q_latent_BQTR.reshape(batch, rows, latent), c_BSR)
    scores += latent_products.scores(q_rope_BQTP.reshape(batch, rows, -1), k_rope_BSP)
    scores_BQTS = scores.view(batch, heads, new, -1) * module.scaling
    if mask is None and new > 1:
        total = c_BSR.shape[1]
        mask = torch.ones(new, total, dtype=torch.bool, device=scores.device).tril(total - new)[None, None]
    if mask is not None:
        mask = mask[..., : scores_BQTS.shape[-1]]
        scores_BQTS = scores_BQTS.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores_BQTS + mask
    weights = scores_BQTS.softmax(dim=-1, dtype=torch.float32).to(c_BSR.dtype)
    return torch.bmm(weights.view(batch, rows, -1), c_BSR).view(batch, heads, new, latent)
