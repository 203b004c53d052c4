"""Cheaper parts without copies: heads, channels and experts are sorted by saliency once, so that the most salient ones
come first and every cut is a view of the same tensors.

One sorted copy of a part serves any number of cuts, so a library takes the memory of one more model. Sorting changes
answers only by rounding.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lib.models.structure.anatomy import Block, Experts
from lib.models.structure.anatomy import attention as view_attention
from lib.models.structure.anatomy import feed_forward as view_feed_forward
from lib.models.structure.surgery import (
    head_projections,
    keep_channels,
    keep_experts,
    keep_groups,
    norms_over_heads,
)


def ordered(block: Block, part: str, scores: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of one part of a block ("attention" or "feed_forward") sorted by falling saliency.

    `scores`: "heads" [G], "channels" [C] or "experts" [E], whichever the part has.
    """
    source = getattr(block, part).module
    config = getattr(source, "config", None)
    copied = copy.deepcopy(source, {id(config): config})
    if part == "attention":
        keep_groups(view_attention(copied), _falling(scores["heads"]))
        return copied
    view = replace(block, feed_forward=view_feed_forward(copied))
    if view.feed_forward.experts is not None:
        keep_experts(view.feed_forward.experts, _falling(scores["experts"]))
    else:
        keep_channels(view, _falling(scores["channels"]))
    return copied


def _falling(scores_N: torch.Tensor) -> torch.Tensor:
    return scores_N.argsort(descending=True, stable=True)


def sharing(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its tensors."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    config = getattr(module, "config", None)
    return copy.deepcopy(module, {**shared, id(config): config})


def first_groups(module: nn.Module, count: int) -> None:
    """Keep the first `count` key-value groups of an attention module in place, as views."""
    attention = view_attention(module)
    share = attention.key_value_heads
    *inputs, output = head_projections(attention)
    for norm in norms_over_heads(attention):
        scale = norm.weight.data[: norm.weight.shape[0] // share * count]
        norm.weight = nn.Parameter(scale, requires_grad=norm.weight.requires_grad)
    for linear in inputs:
        _cut(linear, rows=linear.weight.shape[0] // share * count)
    _cut(output, columns=output.weight.shape[1] // share * count)
    counted: Any = module
    if hasattr(module, "num_heads"):
        counted.num_heads = view_attention(module).heads


def first_channels(block: Block, count: int) -> None:
    """Keep the first `count` channels of the dense part of a block in place, as views."""
    part = block.feed_forward
    assert part.gate is not None and part.up is not None and part.down is not None, "the block has no dense part"
    for linear in (part.gate, part.up):
        _cut(linear, rows=count)
    _cut(part.down, columns=count)


def first_experts(experts: Experts, count: int) -> None:
    """Keep the first `count` experts in place, as views: tensors, router rows and correction bias."""
    module, router = experts.module, experts.router
    for owner, name in ((module, "gate_up_proj"), (module, "down_proj"), (router, "weight")):
        tensor = getattr(owner, name)
        setattr(owner, name, nn.Parameter(tensor.data[:count], requires_grad=tensor.requires_grad))
    if experts.correction_bias is not None:
        router.e_score_correction_bias = experts.correction_bias[:count]
    module.num_experts = router.num_experts = count


def _cut(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    weight = linear.weight.data[:rows, :columns]
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None and rows is not None:
        linear.bias = nn.Parameter(linear.bias.data[:rows], requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = weight.shape
