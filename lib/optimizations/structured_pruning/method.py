"""Structured pruning: whole experts, feed-forward channels, heads or blocks are removed, and the tensors shrink.

Four granularities, each written once against the anatomy:

- experts: REAP (Lasby et al. 2025): mean over an expert's tokens of router weight × ‖output‖₂; slices the 3-D tensors,
  the router's rows and its correction bias.
- channels: mean |activation| × ‖column of the down projection‖₂, for dense layers and inside experts.
- heads: mean ‖contribution‖₂ of a key-value group with its query heads, or of single heads for latent attention.
- depth: by block influence 1 − cos(input, output) (Men et al. 2024, ShortGPT), greedily by the effect of skipping a
  block on the output, or one contiguous span (`depth`).

Every block loses the same number of parts, so shapes stay uniform, unless budgets follow outliers. Matrices that read
removed channels or heads are refitted to compensate (`compensation`), and the model may then be distilled. Controls:
`magnitude` ranks by weight norms alone, `random` at random; for experts also `frequency` and `ean`. Blocks are pruned
one by one. Independent of measurement; `apply` never changes the caller's model, but shares unchanged tensors with it.

Shapes: E experts, I width of one expert, C channels, H hidden, Q heads, G key-value groups.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from lib.errors import NotApplicable
from lib.models.calibration.activations import Observation, observe
from lib.models.calibration.distillation import Lessons, can_split, distil
from lib.models.structure.anatomy import Anatomy, anatomy
from lib.models.structure.replacements.sparse import stored
from lib.models.structure.sharing import sharing
from lib.models.structure.surgery import head_projections, synchronise
from lib.optimizations.common.compression import options
from lib.optimizations.common.compression.budgets import BUDGETS, OUTLIER, by_outliers
from lib.optimizations.structured_pruning import cutting, depth
from lib.optimizations.structured_pruning.saliency import OF_EXPERTS, SALIENCIES, Scores, saliency_scores

NAME = "structured_pruning"
GRANULARITIES = ("experts", "channels", "heads", "depth")
MOST_REMOVED = 0.9

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
    "mildest": {"ratio": 0.0},
    "trial": {},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None if the method applies, else the reason: matrices stored sparse cannot lose rows or columns."""
    return "matrices stored sparse cannot lose rows or columns; remove parts first" if stored(model) else None


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    ratio: float = 0.3,
    granularity: str = "auto",
    saliency: str = "activation",
    depth_criterion: str = "influence",
    budget: str = "uniform",
    compensate: bool | None = None,
    finetune_steps: int = 0,
    learning_rate: float = 3e-4,
    recovery: Sequence[dict[str, torch.Tensor]] | None = None,
    observation: Observation | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a smaller model: about `ratio` of the decoder's parameters removed, then `finetune_steps` of distillation.

    granularity: one of GRANULARITIES, or "auto" (experts if there are any, otherwise channels). budget: "uniform", or
    "owl" for channels: blocks with more outliers lose fewer channels. compensate: refit the matrices that read removed
    channels or heads, by least squares on the calibration text; None: only if that has at least two sequences, since
    the fit is judged on held-out text. observation: the result of `observe(model, calibration)`, to prune several times
    from one pass. recovery: batches to distil on (default: calibration). Raises UserError for a value out of range, a
    ratio out of reach, and weights that are not finite. Without recovery, unchanged tensors are shared with `model`:
    train neither in place.
    """
    check(ratio, granularity, saliency)
    options.choices(NAME, {"depth_criterion": (depth_criterion, depth.CRITERIA), "budget": (budget, BUDGETS)})
    options.applies(NAME, model, applies_to)
    shares = plan(model, ratio, granularity)
    pruned = sharing(model)
    if not any(shares.values()):
        return pruned
    by_statistics = saliency in ("activation", *OF_EXPERTS)
    if by_statistics and observation is None:
        observation = observe(model, calibration)
    view = anatomy(pruned)
    statistics = [None] * len(view.blocks) if observation is None else observation.blocks
    scores = [saliency_scores(*pair, saliency, seed) for pair in zip(view.blocks, statistics)]
    if count := round(shares["depth"] * len(view.blocks)):
        influence = torch.tensor([score["depth"] for score in scores])
        criterion = depth_criterion if by_statistics else "influence"
        depth.remove_blocks(pruned, _blocks_to_remove(model, calibration, count, influence, criterion))
        synchronise(pruned)
    else:
        fitted = can_split(calibration) if compensate is None else compensate
        cutting.prune_blocks(pruned, calibration, scores, _by_block(scores, shares, budget), fitted)
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
) -> tuple[nn.Module, Lessons]:
    """Return a copy of `pruned` after `steps` of distillation from `model`, and the log of the training.

    Part of the batches is held out (`distillation.split`); the weights that do best on it are returned, which may be
    those before training. With zero steps `pruned` itself is returned.
    """
    if not steps:
        return pruned, Lessons([], {})
    student = copy.deepcopy(pruned)
    return student, distil(student, model, batches, steps=steps, learning_rate=learning_rate, seed=seed)


def check(ratio: float, granularity: str, saliency: str) -> None:
    """Raise UserError for an option out of its range or choices."""
    options.in_range(NAME, "ratio", ratio, 0, MOST_REMOVED, closed="low")
    options.one_of(NAME, "granularity", granularity, ("auto", *GRANULARITIES))
    options.one_of(NAME, "saliency", saliency, (*SALIENCIES, *OF_EXPERTS))


# --- how much to remove ----------------------------------------------------------------------------------------------


def decoder_parameters(model: nn.Module) -> int:
    """Return the number of parameters in all decoder blocks; `ratio` is a share of them."""
    return sum(parameter.numel() for block in anatomy(model).blocks for parameter in block.module.parameters())


def plan(model: nn.Module, ratio: float, granularity: str = "auto") -> dict[str, float]:
    """Return the shares of experts, channels, heads and blocks whose removal takes `ratio` of the decoder's parameters.

    Shares are rounded to whole experts, groups and blocks. Raises NotApplicable naming the largest reachable ratio.
    """
    view, total = anatomy(model), decoder_parameters(model)
    name = _resolve(view, granularity)
    weight = _removable(view, name)
    share = ratio * total / max(1, weight)
    if share > _most(view, name):
        reach = math.floor(100 * weight * _most(view, name) / total) / 100  # rounded up, it would be refused
        raise NotApplicable(f"{NAME}: ratio {ratio:.3g} is out of reach by {name}; at most {reach:.2f}")
    shares = dict.fromkeys(GRANULARITIES, 0.0) | {name: _whole(view, name, share)}
    if shares["heads"]:
        _require_valid_heads(view, shares["heads"])
    return shares


def planned(model: nn.Module, ratio: float, granularity: str = "auto") -> tuple[float, float]:
    """Return the smallest and the largest share of the decoder's parameters that the `plan` can remove.

    The two differ for channels by the rounding to multiples, and for blocks by the sizes of the blocks.
    """
    view, total = anatomy(model), decoder_parameters(model)
    name = _resolve(view, granularity)
    share = plan(model, ratio, granularity)[name]
    if name == "depth":
        sizes = sorted(sum(parameter.numel() for parameter in block.module.parameters()) for block in view.blocks)
        count = round(share * len(sizes))
        return sum(sizes[:count]) / total, sum(sizes[len(sizes) - count :]) / total
    slack = 0.0
    if name == "channels" and share:
        parts = [block.feed_forward for block in view.blocks]
        widths = [part.down.weight.shape[1] for part in parts if part.down is not None]
        widths += [part.experts.channels for part in parts if part.experts]
        slack = min(1.0, cutting.CHANNEL_MULTIPLE / 2 / min(widths))
    weight = _removable(view, name) / total
    return max(0.0, share - slack) * weight, (share + slack) * weight


def _require_valid_heads(view: Anatomy, share: float) -> None:
    """Raise NotApplicable if the architecture's configuration does not allow the number of heads left."""
    attention = next(block.attention for block in view.blocks if block.attention.kind != "none")
    groups = round(attention.key_value_heads * (1 - share))
    config = copy.deepcopy(view.config)
    config.num_key_value_heads = groups
    config.num_attention_heads = heads = groups * (attention.heads // attention.key_value_heads)
    try:
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        reason = str(error.__cause__ or error).strip()
        raise NotApplicable(
            f"{NAME}: {heads} heads in place of {attention.heads}: {type(config).__name__} refuses it ({reason}); "
            "choose another ratio or channels"
        ) from None


def _whole(view: Anatomy, granularity: str, share: float) -> float:
    """Return `share` rounded to whole experts, groups or blocks, at least one.

    Channels are fine-grained enough not to need it.
    """
    routed = [block.feed_forward.experts for block in view.blocks if block.feed_forward.experts]
    counts = {
        "experts": [experts.count for experts in routed],
        "heads": [b.attention.key_value_heads for b in view.blocks if b.attention.kind != "none"],
        "depth": [len(view.blocks)],
    }.get(granularity)
    if counts is None or share <= 0:
        return share
    at_once = routed[0].groups if granularity == "experts" else 1  # one of each group of experts
    return at_once * max(1, round(share * counts[0] / at_once)) / counts[0]


def _resolve(view: Anatomy, granularity: str) -> str:
    routed = any(block.feed_forward.experts for block in view.blocks)
    if granularity == "auto":
        return "experts" if routed else "channels"
    if granularity == "experts" and not routed:
        raise NotApplicable("this model has no experts; choose channels, heads or depth")
    return granularity


def _removable(view: Anatomy, granularity: str) -> int:
    """Return the number of parameters that scale with the count of this granularity."""
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
    """Return the largest share that may be removed: top-k experts, one group, a few channels or one block must stay."""
    if granularity == "experts":
        routed = [block.feed_forward.experts for block in view.blocks if block.feed_forward.experts]
        return min(1 - experts.least_per_group * experts.groups / experts.count for experts in routed)
    if granularity == "heads":
        return min(1 - 1 / b.attention.key_value_heads for b in view.blocks if b.attention.kind != "none")
    if granularity == "depth":
        return 1 - max(1, view.fixed_blocks) / len(view.blocks)
    return 0.95


# --- what to remove --------------------------------------------------------------------------------------------------


def _by_block(scores: Sequence[Scores], shares: dict[str, float], budget: str) -> list[dict[str, float]]:
    """Return the shares of every block: all equal, or for "owl" fewer channels where more of them are outliers."""
    if budget == "uniform" or not shares["channels"]:
        return [shares] * len(scores)
    outliers, sizes = {}, {}
    for index, score in enumerate(scores):
        parts = [score[name] for name in ("channels", "expert_channels") if name in score]
        sizes[index] = float(sum(part.numel() for part in parts))
        if "expert_channels" in score:  # without experts that no token reached: their score is 0
            parts[-1] = parts[-1][score["experts"] > 0]
        above = sum(float((part > OUTLIER * part.mean()).sum()) for part in parts)
        outliers[index] = above / max(1, sum(part.numel() for part in parts))
    by_index = by_outliers(outliers, sizes, shares["channels"])
    return [shares | {"channels": by_index[index]} for index in range(len(scores))]


def _blocks_to_remove(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    count: int,
    influence: torch.Tensor,
    criterion: str,
) -> list[int]:
    if criterion == "divergence":
        return depth.greedy(model, calibration, count, influence)
    if criterion == "span":
        return depth.span(model, calibration, count)
    return depth.least(influence, count, anatomy(model).fixed_blocks)
