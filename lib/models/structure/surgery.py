"""Removes parts of a block in place: experts, channels, key-value groups. The tensors shrink.

Call `synchronise` afterwards: it updates the counts stored in modules and configuration (widths, numbers of heads and
experts) to the new shapes of the tensors. Knows nothing of which parts to remove.

Shapes: E experts, I width of one expert, J kept channels of each, H hidden.
"""

from typing import Any

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.structure.anatomy import Anatomy, Attention, Block, Experts, anatomy
from lib.models.structure.anatomy import attention as view_attention

POSITION = "block_position"  # attribute of a decoder block: its index when the configuration was last written
# Lists of the configuration with an entry for every block.
BY_BLOCK = ("layer_types", "no_rope_layers")


def head_projections(attention: Attention) -> list[nn.Linear]:
    """Return the linear layers whose rows (columns in the last layer) belong to heads; empty without attention."""
    if attention.kind == "none":
        return []
    module = attention.module
    if attention.kind == "latent":
        return [module.q_b_proj if module.q_proj is None else module.q_proj, module.kv_b_proj, module.o_proj]
    return [module.q_proj, module.k_proj, module.v_proj, module.o_proj]


def norms_over_heads(attention: Attention) -> list[Any]:
    """Return the query and key norms that normalise all heads together, with a scale for every channel (OLMoE)."""
    counts = {"q_norm": attention.heads, "k_norm": attention.key_value_heads}
    norms = [(getattr(attention.module, name, None), heads) for name, heads in counts.items()]
    wide = [(norm, heads) for norm, heads in norms if norm is not None and heads > 1]
    return [norm for norm, heads in wide if norm.weight.numel() == heads * attention.head_dim]


def keep_experts(experts: Experts, indices: torch.Tensor) -> None:
    """Keep only the experts `indices` (ascending), in place: tensors, router rows and correction bias.

    Raises UserError if the router chooses among groups of experts and the groups would differ in size (see
    `best_experts`).
    """
    module, router = experts.module, experts.router
    members = torch.bincount(indices.cpu() // (experts.count // experts.groups), minlength=experts.groups)
    if experts.groups > 1 and len(set(members.tolist())) > 1:
        raise UserError(
            f"the router chooses among {experts.groups} groups of experts: each must keep the same number of experts, "
            f"not {', '.join(map(str, members.tolist()))}"
        )
    for owner, name in ((module, "gate_up_proj"), (module, "down_proj"), (router, "weight")):
        tensor = getattr(owner, name)
        setattr(owner, name, nn.Parameter(tensor[indices].contiguous(), requires_grad=tensor.requires_grad))
    if experts.correction_bias is not None:
        router.e_score_correction_bias = experts.correction_bias[indices].clone()
    module.num_experts = router.num_experts = len(indices)


def best_experts(experts: Experts, scores_E: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices (ascending) of about `count` experts with the highest scores.

    Every group of the router keeps the same number, and at least enough for the router to choose `top_k`.
    """
    per_group = max(experts.least_per_group, round(count / experts.groups))
    grouped = scores_E.unflatten(0, (experts.groups, -1))
    size = grouped.shape[1]
    first = torch.arange(experts.groups, device=scores_E.device)[:, None] * size
    return (grouped.topk(min(per_group, size), dim=1).indices + first).flatten().sort().values


def keep_channels(block: Block, indices: torch.Tensor) -> None:
    """Keep only the channels `indices` of the dense part (or shared expert), with their biases, in place."""
    part = block.feed_forward
    assert part.gate is not None and part.up is not None and part.down is not None, "the block has no dense part"
    resize_linear(part.down, part.down.weight[:, indices])
    for linear in (part.gate, part.up):
        resize_linear(linear, linear.weight[indices])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[indices], requires_grad=linear.bias.requires_grad)


def keep_expert_channels(experts: Experts, indices_EJ: torch.Tensor) -> None:
    """Keep only the channels `indices_EJ[e]` of each expert e, in place."""
    width, module = experts.channels, experts.module
    gate_and_up_EJ = torch.cat([indices_EJ, indices_EJ + width], dim=1)
    gate_up = experts.gate_up.gather(1, gate_and_up_EJ[:, :, None].expand(-1, -1, experts.gate_up.shape[2]))
    down = experts.down.gather(2, indices_EJ[:, None, :].expand(-1, experts.down.shape[1], -1))
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=experts.gate_up.requires_grad)
    module.down_proj = nn.Parameter(down.contiguous(), requires_grad=experts.down.requires_grad)


def keep_groups(attention: Attention, indices: torch.Tensor) -> None:
    """Keep only the key-value groups `indices` with their query heads (the heads `indices` of latent attention), in
    place.

    Norms over all heads together (OLMoE) lose the same channels.
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


def resize_linear(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Replace the weight of `linear` by `weight` [out, in], in place. The caller adapts the bias.

    Raises UserError for a matrix that is not stored dense.
    """
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"{type(linear).__name__}: its matrix is stored as factors and cannot lose rows or columns; "
            "remove parts before matrices are factored"
        )
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def synchronise(model: nn.Module) -> nn.Module:
    """Update the counts stored in modules and configuration to the shapes of the tensors; return the model.

    Where widths differ between blocks, the configuration states the largest; `lib.models.checkpoints.io.save` writes
    the widths of each block into its manifest. Remaining blocks keep their entries in the configuration's lists. Raises
    NotApplicable if removing attention from a block would give other blocks a cache of the wrong kind.
    """
    view = anatomy(model)
    _keep_entries(view)
    with_attention = 0  # only blocks with attention have a layer in the cache
    for block in view.blocks:
        if block.attention.kind != "none":
            block.attention.module.layer_idx = with_attention
            with_attention += 1
        for linear in (module for module in block.module.modules() if isinstance(module, nn.Linear)):
            linear.out_features, linear.in_features = linear.weight.shape
        _synchronise_block(block)
    _state_in_config(view)
    return model


def _keep_entries(view: Anatomy) -> None:
    """Reduce the configuration's per-block lists to the entries of the remaining blocks."""
    positions = []
    for block in view.blocks:
        default = getattr(block.attention.module, "layer_idx", block.index)
        positions.append(getattr(block.module, POSITION, default))
        setattr(block.module, POSITION, block.index)
    for name in BY_BLOCK:
        entries = getattr(view.config, name, None)
        if entries:
            setattr(view.config, name, [entries[min(position, len(entries) - 1)] for position in positions])
    kinds = getattr(view.config, "layer_types", None) or []
    cached = [kind for kind, block in zip(kinds, view.blocks) if block.attention.kind != "none"]
    if cached != kinds[: len(cached)]:  # layer i of a cache takes entry i of `layer_types`
        raise NotApplicable("its blocks attend differently (sliding, full): attention cannot be removed from one block")


def _synchronise_block(block: Block) -> None:
    view = view_attention(block.attention.module)
    module = view.module
    if view.kind != "none":
        module.num_key_value_groups = view.heads // view.key_value_heads
    counts = {"num_heads": view.heads, "num_attention_heads": view.heads, "num_key_value_heads": view.key_value_heads}
    for name in counts.keys() & vars(module).keys():
        setattr(module, name, counts[name])
    dense, experts = block.feed_forward.dense, block.feed_forward.experts
    if dense is not None:
        dense.intermediate_size = block.feed_forward.channels
    if experts is not None:
        experts.module.num_experts = experts.router.num_experts = experts.count
        experts.module.intermediate_dim = experts.channels


def _state_in_config(view: Anatomy) -> None:
    """Write the decoder's dimensions into its configuration."""
    config, blocks = view.config, anatomy(view.model).blocks
    config.num_hidden_layers = len(blocks)
    config.num_attention_heads = max(block.attention.heads for block in blocks)
    config.num_key_value_heads = max(block.attention.key_value_heads for block in blocks)
    sizes = {block.attention.head_dim for block in blocks if block.attention.kind == "grouped_query"}
    if sizes:  # if left out, transformers derives it from the number of heads
        config.head_dim = max(sizes)
    dense = [block.feed_forward for block in blocks if block.feed_forward.kind == "dense"]
    if dense:
        config.intermediate_size = max(part.channels for part in dense)
    routed = [block.feed_forward.experts for block in blocks if block.feed_forward.experts]
    if routed:
        name = "n_routed_experts" if hasattr(config, "n_routed_experts") else "num_experts"
        setattr(config, name, max(part.count for part in routed))
        width = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
        setattr(config, width, max(part.channels for part in routed))
        shared = [block.feed_forward.channels for block in blocks if block.feed_forward.experts]
        if hasattr(config, "shared_expert_intermediate_size") and any(shared):
            config.shared_expert_intermediate_size = max(shared)
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mlp_layer_types = ["sparse" if block.feed_forward.kind == "experts" else "dense" for block in blocks]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = next(
            (block.index for block in blocks if block.feed_forward.experts), len(blocks)
        )
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = [block.index for block in blocks if block.feed_forward.kind != "experts"]
        config.decoder_sparse_step = 1  # the list alone says which blocks are dense
