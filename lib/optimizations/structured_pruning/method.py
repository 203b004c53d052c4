"""Structured pruning: whole experts, feed-forward channels, heads or blocks are removed, and the tensors really shrink.

Four granularities, each written once against the anatomy:

- experts: REAP (Lasby et al. 2025): mean over an expert's tokens of router weight × ‖output‖₂; slices the 3-D tensors,
  the router's rows and its correction bias.
- channels: mean |activation| × ‖column of the down projection‖₂, for dense parts and inside experts.
- heads: a whole key-value group with its query heads; for latent attention single heads; by mean ‖contribution‖₂.
- depth: by block influence 1 − cos(input, output) (Men et al. 2024, ShortGPT), or greedily by what
  skipping a block does to the output.

Every block loses the same number, so shapes stay uniform. Controls: `magnitude` ranks by weight norms alone, `random`
by chance. Knows nothing of measuring; `apply` never changes the caller's model.

Shapes: E experts, I width of one expert, C channels, H hidden, Q heads, G key-value groups.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.calibration.activations import Observation, observe
from lib.models.calibration.distillation import distil, divergence
from lib.models.structure.anatomy import Anatomy, Block, anatomy, synchronise
from lib.models.structure.sparse import stored
from lib.models.structure.surgery import (
    head_projections,
    keep_channels,
    keep_expert_channels,
    keep_experts,
    keep_groups,
)
from lib.optimizations.common import options
from lib.optimizations.structured_pruning.saliency import SALIENCIES, Scores, saliency_scores

NAME = "structured_pruning"
GRANULARITIES = ("experts", "channels", "heads", "depth")
HELD_OUT = 4  # batches
MOST_REMOVED = 0.9
CHANNEL_MULTIPLE = 8  # kept widths are multiples of this: matrix kernels are built for aligned rows

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "ratio": {
        "type": "float",
        "range": (0.0, MOST_REMOVED),
        "default": 0.3,
        "help": "share of the decoder's parameters removed",
    },
    "granularity": {"type": "categorical", "choices": ("auto", *GRANULARITIES), "default": "auto"},
    "saliency": {"type": "categorical", "choices": SALIENCIES, "default": "activation"},
    "depth_criterion": {"type": "categorical", "choices": ("influence", "divergence"), "default": "influence"},
    "finetune_steps": {"type": "int", "range": (0, 1000), "default": 0, "help": "steps of distillation afterwards"},
}

COMPOSES = {
    "touches": ("shapes",),
    "needs": ("whole channels", "stacked experts"),
    "invalidates": ("statistics",),
    "trial": {},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None, or why no row or column can be removed: the matrices are stored sparse."""
    return "matrices stored sparse cannot lose rows or columns; remove parts first" if stored(model) else None


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    ratio: float = 0.3,
    granularity: str = "auto",
    saliency: str = "activation",
    depth_criterion: str = "influence",
    finetune_steps: int = 0,
    learning_rate: float = 3e-4,
    recovery: Sequence[dict[str, torch.Tensor]] | None = None,
    observation: Observation | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a smaller model: about `ratio` of the decoder's parameters removed, then `finetune_steps` of distillation.

    granularity: one of GRANULARITIES, or "auto" (experts where there are any, else channels).
    observation: what `observe(model, calibration)` returned, to prune several times from one pass; recovery: the
    batches to distil on (default: calibration). Raises UserError for a value out of range or a ratio out of reach.
    Without recovery, embeddings and head are those of `model`, not copies: train neither in place.
    """
    options.in_range(NAME, "ratio", ratio, 0, MOST_REMOVED, closed="low")
    choices = {"granularity": granularity, "saliency": saliency, "depth_criterion": depth_criterion}
    for name, value in choices.items():
        options.one_of(NAME, name, value, SEARCH_SPACE[name]["choices"])
    options.applies(NAME, model, applies_to)
    shares = plan(model, ratio, granularity)
    pruned = copy.deepcopy(model, _replaced(model, shares))
    if not any(shares.values()):
        return pruned
    if saliency == "activation" and observation is None:
        observation = observe(model, calibration)
    view = anatomy(pruned)
    statistics = [None] * len(view.blocks) if observation is None else observation.blocks
    scores = [saliency_scores(*pair, saliency, seed) for pair in zip(view.blocks, statistics)]
    for block, score in zip(view.blocks, scores):
        _prune_block(block, score, shares)
    if blocks := round(shares["depth"] * len(view.blocks)):
        by_divergence = saliency == "activation" and depth_criterion == "divergence"
        depth = torch.tensor([score["depth"] for score in scores])
        least = greedy_depth(model, calibration, blocks) if by_divergence else _least(depth, blocks, view.fixed_blocks)
        remove_blocks(pruned, least)
    synchronise(pruned)
    if finetune_steps:
        batches = recovery or calibration
        pruned, _ = recover(pruned, model, batches, steps=finetune_steps, learning_rate=learning_rate, seed=seed)
    return pruned


def recover(
    pruned: nn.Module,
    model: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> tuple[nn.Module, list[float]]:
    """Return a copy of `pruned` after `steps` of distillation from `model`, and the loss of each step, nats per token.

    Up to HELD_OUT batches (a quarter at most) are not trained on; the weights that do best on them are returned, be it
    those before training. Without steps it is `pruned` itself.
    """
    if not steps:
        return pruned, []
    student = copy.deepcopy(pruned)
    count = min(HELD_OUT, len(batches) // 4)
    losses = distil(
        student,
        model,
        batches[count:],
        held_out=batches[:count],
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    return student, losses


# --- how much goes ---------------------------------------------------------------------------------------------------


def decoder_parameters(model: nn.Module) -> int:
    """Return the parameters of all decoder blocks: what `ratio` is a share of."""
    return sum(parameter.numel() for block in anatomy(model).blocks for parameter in block.module.parameters())


def plan(model: nn.Module, ratio: float, granularity: str = "auto") -> dict[str, float]:
    """Return the share of experts, channels, heads and blocks to remove so that `ratio` of the decoder's parameters go.

    Experts, groups and blocks come whole: the share is rounded to what they can give.
    Raises UserError with the largest ratio in reach.
    """
    view, total = anatomy(model), decoder_parameters(model)
    name = _resolve(view, granularity)
    weight = _removable(view, name)
    share = ratio * total / max(1, weight)
    if share > _most(view, name):
        reach = weight * _most(view, name) / total
        raise UserError(f"structured_pruning: ratio {ratio} is out of reach by {granularity}; at most {reach:.2f}")
    return dict.fromkeys(GRANULARITIES, 0.0) | {name: _whole(view, name, share)}


def _whole(view: Anatomy, granularity: str, share: float) -> float:
    """Return the nearest share that whole experts, groups or blocks can give, at least one of them.

    Channels are fine enough as they are.
    """
    counts = {
        "experts": [block.feed_forward.experts.count for block in view.blocks if block.feed_forward.experts],
        "heads": [b.attention.key_value_heads for b in view.blocks if b.attention.kind != "none"],
        "depth": [len(view.blocks)],
    }.get(granularity)
    return share if counts is None or share <= 0 else max(1, round(share * counts[0])) / counts[0]


def _resolve(view: Anatomy, granularity: str) -> str:
    routed = any(block.feed_forward.experts for block in view.blocks)
    if granularity == "auto":
        return "experts" if routed else "channels"
    if granularity == "experts" and not routed:
        raise NotApplicable("this model has no experts; choose channels, heads or depth")
    return granularity


def _removable(view: Anatomy, granularity: str) -> int:
    """Return the parameters that are proportional to the count of this granularity."""
    total = 0
    for block in view.blocks:
        experts, part = block.feed_forward.experts, block.feed_forward
        if granularity == "experts" and experts:
            total += experts.gate_up.numel() + experts.down.numel() + experts.router.weight.numel()
        if granularity == "channels":
            total += 3 * part.down.weight.numel() if part.down is not None else 0
            total += experts.gate_up.numel() + experts.down.numel() if experts else 0
        if granularity == "depth":
            total += sum(parameter.numel() for parameter in block.module.parameters())
        if granularity == "heads":
            total += sum(linear.weight.numel() for linear in head_projections(block.attention))
    return total


def _most(view: Anatomy, granularity: str) -> float:
    """Return the largest share that may go: top-k experts, one group, a few channels, one block stay."""
    if granularity == "experts":
        routed = [block.feed_forward.experts for block in view.blocks if block.feed_forward.experts]
        return min(1 - experts.top_k / experts.count for experts in routed)
    if granularity == "heads":
        return min(1 - 1 / b.attention.key_value_heads for b in view.blocks if b.attention.kind != "none")
    if granularity == "depth":
        return 1 - max(1, view.fixed_blocks) / len(view.blocks)
    return 0.95


# --- what goes -------------------------------------------------------------------------------------------------------


def _kept(scores: torch.Tensor, share: float, multiple: int = 1, least: int = 1) -> torch.Tensor:
    """Return the indices to keep along the last dimension, ascending: all but about `share`, the most salient ones."""
    size = scores.shape[-1]
    count = min(size, max(least, multiple, round(size * (1 - share) / multiple) * multiple))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def _least(scores: torch.Tensor, count: int, protected: int) -> list[int]:
    """Return the `count` least salient of the blocks behind the `protected` first ones."""
    return sorted((scores[protected:].topk(int(count), largest=False).indices + protected).tolist())


# --- taking it away --------------------------------------------------------------------------------------------------


def _replaced(model: nn.Module, shares: dict[str, float]) -> dict[int, torch.Tensor]:
    """Return the tensors that a copy need not hold anew: embeddings, head, and what smaller ones will take the place
    of at once (`_prune_block`).
    """
    view = anatomy(model)
    tensors = [view.embeddings.weight, view.head.weight]
    for part in (block.feed_forward for block in view.blocks):
        if part.experts is not None and (shares["channels"] or shares["experts"]):
            tensors += [part.experts.gate_up, part.experts.down]
        if shares["channels"]:
            tensors += [linear.weight for linear in (part.gate, part.up, part.down) if linear is not None]
    return {id(tensor): tensor for tensor in tensors}


def _prune_block(block: Block, scores: Scores, shares: dict[str, float]) -> None:
    part = block.feed_forward
    if shares["heads"] and block.attention.kind != "none":
        keep_groups(block.attention, _kept(scores["heads"], shares["heads"]))
    if shares["channels"] and part.dense is not None:
        keep_channels(block, _kept(scores["channels"], shares["channels"], CHANNEL_MULTIPLE))
    if shares["channels"] and part.experts is not None:
        keep_expert_channels(part.experts, _kept(scores["expert_channels"], shares["channels"], CHANNEL_MULTIPLE))
    if shares["experts"] and part.experts is not None:
        keep_experts(part.experts, _kept(scores["experts"], shares["experts"], least=part.experts.top_k))


def remove_blocks(model: nn.Module, removed: Sequence[int]) -> None:
    """Remove whole blocks in place; `synchronise` must follow."""
    decoder = anatomy(model).decoder
    decoder.layers = nn.ModuleList(layer for index, layer in enumerate(decoder.layers) if index not in set(removed))


def greedy_depth(model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], count: int) -> list[int]:
    """Return `count` blocks, chosen one after another: the one whose skipping diverges least (nats) from `model`."""
    view = anatomy(model)
    removed: list[int] = []
    for _ in range(count):
        losses = {}
        for index in range(view.fixed_blocks, len(view.blocks)):
            if index not in removed:
                student = without_blocks(model, [*removed, index])
                losses[index] = sum(float(divergence(student, model, inputs)) for inputs in calibration)
        removed.append(min(losses, key=losses.__getitem__))
    return sorted(removed)


def without_blocks(model: nn.Module, removed: Sequence[int]) -> nn.Module:
    """Return a copy of `model` that lacks the blocks `removed` and shares every tensor with it: for reading only."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    student = copy.deepcopy(model, shared)
    remove_blocks(student, removed)
    return synchronise(student)
