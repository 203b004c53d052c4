"""Removes parts of a block in place: experts, channels, key-value groups. The tensors shrink.

Call `lib.models.structure.anatomy.synchronise` afterwards, so that counts agree with shapes. Knows nothing of which
parts to remove.

Shapes: E experts, I width of one expert, J kept channels of each, H hidden.
"""

import torch
from torch import nn

from lib.models.structure.anatomy import Attention, Block, Experts, resize_linear


def head_projections(attention: Attention) -> list[nn.Linear]:
    """Return the layers whose rows (columns, for the last one) belong to heads; empty without attention."""
    if attention.kind == "none":
        return []
    module = attention.module
    if attention.kind == "latent":
        return [module.q_b_proj if module.q_proj is None else module.q_proj, module.kv_b_proj, module.o_proj]
    return [module.q_proj, module.k_proj, module.v_proj, module.o_proj]


def keep_experts(experts: Experts, indices: torch.Tensor) -> None:
    """Keep the experts `indices` (ascending) in place: tensors, router rows and correction bias."""
    module, router = experts.module, experts.router
    for owner, name in ((module, "gate_up_proj"), (module, "down_proj"), (router, "weight")):
        tensor = getattr(owner, name)
        setattr(owner, name, nn.Parameter(tensor[indices].contiguous(), requires_grad=tensor.requires_grad))
    if experts.correction_bias is not None:
        router.e_score_correction_bias = experts.correction_bias[indices].clone()
    module.num_experts = router.num_experts = len(indices)


def keep_channels(block: Block, indices: torch.Tensor) -> None:
    """Keep the channels `indices` of the dense part (or shared expert) in place."""
    part = block.feed_forward
    assert part.gate is not None and part.up is not None and part.down is not None, "the block has no dense part"
    resize_linear(part.down, part.down.weight[:, indices])
    for linear in (part.gate, part.up):
        resize_linear(linear, linear.weight[indices])


def keep_expert_channels(experts: Experts, indices_EJ: torch.Tensor) -> None:
    """Keep in every expert its own channels [E, J] in place."""
    width, module = experts.channels, experts.module
    gate_and_up_EJ = torch.cat([indices_EJ, indices_EJ + width], dim=1)
    gate_up = experts.gate_up.gather(1, gate_and_up_EJ[:, :, None].expand(-1, -1, experts.gate_up.shape[2]))
    down = experts.down.gather(2, indices_EJ[:, None, :].expand(-1, experts.down.shape[1], -1))
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=experts.gate_up.requires_grad)
    module.down_proj = nn.Parameter(down.contiguous(), requires_grad=experts.down.requires_grad)


def keep_groups(attention: Attention, indices: torch.Tensor) -> None:
    """Keep the key-value groups `indices`, each with its query heads, in place; for latent attention, heads."""
    per_group = attention.heads // attention.key_value_heads
    *inputs, output = head_projections(attention)
    for linear in inputs:
        groups = linear.weight.unflatten(0, (attention.key_value_heads, -1))
        resize_linear(linear, groups[indices].flatten(0, 1))
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.unflatten(0, (attention.key_value_heads, -1))[indices].flatten(0, 1))
    groups = output.weight.unflatten(1, (attention.key_value_heads, per_group * attention.value_dim))
    resize_linear(output, groups[:, indices].flatten(1, 2))
