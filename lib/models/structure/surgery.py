"""Removes parts of a block in place: experts, channels, key-value groups. The tensors shrink.

Call `lib.models.structure.anatomy.synchronise` afterwards, so that counts agree with shapes. Knows nothing of which
parts to remove.

Shapes: E experts, I width of one expert, J kept channels of each, H hidden.
"""

from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import Attention, Block, Experts, resize_linear


def head_projections(attention: Attention) -> list[nn.Linear]:
    """Return the layers whose rows (columns, for the last one) belong to heads; empty without attention."""
    if attention.kind == "none":
        return []
    module = attention.module
    if attention.kind == "latent":
        return [module.q_b_proj if module.q_proj is None else module.q_proj, module.kv_b_proj, module.o_proj]
    return [module.q_proj, module.k_proj, module.v_proj, module.o_proj]


def norms_over_heads(attention: Attention) -> list[Any]:
    """Return the norms whose scale has an element for every channel of all queries, or keys, at once (OLMoE)."""
    counts = {"q_norm": attention.heads, "k_norm": attention.key_value_heads}
    norms = [(getattr(attention.module, name, None), heads) for name, heads in counts.items()]
    wide = [(norm, heads) for norm, heads in norms if norm is not None and heads > 1]
    return [norm for norm, heads in wide if norm.weight.numel() == heads * attention.head_dim]


def keep_experts(experts: Experts, indices: torch.Tensor) -> None:
    """Keep the experts `indices` (ascending) in place: tensors, router rows and correction bias.

    Raises UserError where the router chooses among groups and these would not stay of equal size (`best_experts`).
    """
    module, router = experts.module, experts.router
    members = torch.bincount(indices.cpu() // (experts.count // experts.groups), minlength=experts.groups)
    if experts.groups > 1 and len(set(members.tolist())) > 1:
        raise UserError(
            f"the router chooses among {experts.groups} groups of experts of equal size: each must keep as many, not "
            f"{', '.join(map(str, members.tolist()))}"
        )
    for owner, name in ((module, "gate_up_proj"), (module, "down_proj"), (router, "weight")):
        tensor = getattr(owner, name)
        setattr(owner, name, nn.Parameter(tensor[indices].contiguous(), requires_grad=tensor.requires_grad))
    if experts.correction_bias is not None:
        router.e_score_correction_bias = experts.correction_bias[indices].clone()
    module.num_experts = router.num_experts = len(indices)


def best_experts(experts: Experts, scores_E: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices (ascending) of about `count` experts with the highest scores: as many of every group of the
    router, and enough for it to choose `top_k`.
    """
    per_group = max(experts.least_per_group, round(count / experts.groups))
    grouped = scores_E.unflatten(0, (experts.groups, -1))
    size = grouped.shape[1]
    first = torch.arange(experts.groups, device=scores_E.device)[:, None] * size
    return (grouped.topk(min(per_group, size), dim=1).indices + first).flatten().sort().values


def keep_channels(block: Block, indices: torch.Tensor) -> None:
    """Keep the channels `indices` of the dense part (or shared expert) in place, with their biases."""
    part = block.feed_forward
    assert part.gate is not None and part.up is not None and part.down is not None, "the block has no dense part"
    resize_linear(part.down, part.down.weight[:, indices])
    for linear in (part.gate, part.up):
        resize_linear(linear, linear.weight[indices])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[indices], requires_grad=linear.bias.requires_grad)


def keep_expert_channels(experts: Experts, indices_EJ: torch.Tensor) -> None:
    """Keep in every expert its own channels [E, J] in place."""
    width, module = experts.channels, experts.module
    gate_and_up_EJ = torch.cat([indices_EJ, indices_EJ + width], dim=1)
    gate_up = experts.gate_up.gather(1, gate_and_up_EJ[:, :, None].expand(-1, -1, experts.gate_up.shape[2]))
    down = experts.down.gather(2, indices_EJ[:, None, :].expand(-1, experts.down.shape[1], -1))
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=experts.gate_up.requires_grad)
    module.down_proj = nn.Parameter(down.contiguous(), requires_grad=experts.down.requires_grad)


def keep_groups(attention: Attention, indices: torch.Tensor) -> None:
    """Keep the key-value groups `indices`, each with its query heads, in place; for latent attention, heads.

    Norms over all queries or keys at once (OLMoE) lose the same channels.
    """
    per_group = attention.heads // attention.key_value_heads
    *inputs, output = head_projections(attention)
    for norm in norms_over_heads(attention):
        by_head = norm.weight.view(attention.key_value_heads, -1, attention.head_dim)
        scale = by_head[indices].reshape(-1, *norm.weight.shape[1:])  # of shape [D · heads], or [heads, D] (Cohere)
        norm.weight = nn.Parameter(scale, requires_grad=norm.weight.requires_grad)
    for linear in inputs:
        groups = linear.weight.unflatten(0, (attention.key_value_heads, -1))
        resize_linear(linear, groups[indices].flatten(0, 1))
        if linear.bias is not None:
            kept = linear.bias.unflatten(0, (attention.key_value_heads, -1))[indices].flatten(0, 1)
            linear.bias = nn.Parameter(kept, requires_grad=linear.bias.requires_grad)
    groups = output.weight.unflatten(1, (attention.key_value_heads, per_group * attention.value_dim))
    resize_linear(output, groups[:, indices].flatten(1, 2))
