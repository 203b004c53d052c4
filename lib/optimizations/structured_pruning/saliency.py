"""The saliency of each part of a block: from its activations on calibration text, from its weights, or random.

Independent of what is removed, and how much.

Shapes: E experts, I width of one expert, C channels, Q heads, G key-value groups.
"""

from typing import Any

import torch

from lib.models.calibration.activations import BlockStatistics
from lib.models.structure.anatomy import Attention, Block, Experts

SALIENCIES = ("activation", "magnitude", "random")
OF_EXPERTS = ("frequency", "ean")  # further saliencies, for experts only
UNSEEN = 1e-6  # share of the mean score that caps the channels of an expert that no token reached
Scores = dict[str, Any]  # granularity → tensor of scores; "depth" → one number


def saliency_scores(
    block: Block, statistics: BlockStatistics | None, saliency: str = "activation", seed: int = 0
) -> Scores:
    """Return the saliency of a block's parts; larger is more salient.

    Keys: experts [E], channels [C], expert_channels [E, I], heads [G] and depth (one number), without those that the
    block lacks. "activation" needs the block's `statistics` and raises ValueError if they lack a part. For experts it
    is REAP; channels of an expert that no token reached are ranked by its weights. "frequency" and "ean" differ from
    "activation" only in the score of experts: their token counts, or the summed norms of their outputs (expert
    activation norm, Jaiswal et al. 2025).
    """
    if saliency == "random":
        return _random_scores(block, torch.Generator().manual_seed(seed * 10_007 + block.index))
    if saliency == "magnitude":
        return _weight_norms(block)
    if statistics is None:
        raise ValueError("saliency by activation needs statistics of calibration text")
    part, scores = block.feed_forward, Scores()
    if part.down is not None:
        scores["channels"] = part.down.weight.float().norm(dim=0) * _observed(statistics.channel_activation_C)
    if part.experts is not None:
        scores["expert_channels"] = _of_expert_channels(part.experts, statistics)
        scores["experts"] = _of_experts(statistics, saliency)
    if block.attention.kind != "none":
        scores["heads"] = _per_group(block.attention, _observed(statistics.head_contribution_Q))
    scores["depth"] = statistics.influence
    return scores


def _of_experts(statistics: BlockStatistics, saliency: str) -> torch.Tensor:
    tokens_E = _observed(statistics.expert_tokens_E)
    if saliency == "frequency":
        return tokens_E
    if saliency == "ean":
        return _observed(statistics.expert_norm_E)
    return _observed(statistics.expert_contribution_E) / tokens_E.clamp_min(1)


def _of_expert_channels(experts: Experts, statistics: BlockStatistics) -> torch.Tensor:
    """Return mean |activation| × norm of the down column, [E, I], with means over each expert's own tokens.

    Channels of an expert that no token reached are ranked by its weights, far below those of every other expert.
    """
    up_EI, down_EI = _expert_norms(experts)
    tokens_E1 = _observed(statistics.expert_tokens_E)[:, None]
    mean_EI = down_EI * _observed(statistics.expert_channel_activation_EI) / tokens_E1.clamp_min(1)
    weights_EI = down_EI * up_EI
    below_EI = weights_EI * (UNSEEN * mean_EI.mean() / weights_EI.max().clamp_min(1e-12))
    return torch.where(tokens_E1 > 0, mean_EI, below_EI)


def _observed(statistic: torch.Tensor | None) -> torch.Tensor:
    if statistic is None:
        raise ValueError("the calibration text was observed on a model without this part")
    return statistic


def _weight_norms(block: Block) -> Scores:
    part, scores = block.feed_forward, Scores()
    if part.down is not None and part.gate is not None and part.up is not None:
        column_C = part.down.weight.float().norm(dim=0)
        rows_C = torch.hypot(part.gate.weight.float().norm(dim=1), part.up.weight.float().norm(dim=1))
        scores["channels"] = column_C * rows_C
    if part.experts is not None:
        up_EI, down_EI = _expert_norms(part.experts)
        scores["expert_channels"] = down_EI * up_EI
        scores["experts"] = torch.sqrt(up_EI.square().sum(1) + down_EI.square().sum(1))
    if block.attention.kind != "none":
        attention = block.attention
        output_HQD = attention.output.weight.float().view(-1, attention.heads, attention.value_dim)
        scores["heads"] = _per_group(attention, output_HQD.square().sum((0, 2)).sqrt())
    squares = sum(parameter.float().square().sum() for parameter in block.module.parameters())
    scores["depth"] = float(squares**0.5)
    return scores


def _per_group(attention: Attention, heads_Q: torch.Tensor) -> torch.Tensor:
    """Return the sum over the query heads of each key-value group."""
    return heads_Q.view(attention.key_value_heads, -1).sum(1)


def _random_scores(block: Block, generator: torch.Generator) -> Scores:
    """Return random scores on the block's device, drawn on the CPU so that every device gets the same."""
    part, device = block.feed_forward, next(block.module.parameters()).device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    scores: Scores = {"heads": uniform(block.attention.key_value_heads)}
    scores["depth"] = float(torch.rand(1, generator=generator))
    if part.dense is not None:
        scores["channels"] = uniform(part.channels)
    if part.experts is not None:
        scores["experts"] = uniform(part.experts.count)
        scores["expert_channels"] = uniform(part.experts.count, part.experts.channels)
    return scores


def _expert_norms(experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of each channel's gate and up rows, and of its down column, both [E, I]."""
    rows = experts.gate_up.float().norm(dim=2)
    return torch.hypot(rows[:, : experts.channels], rows[:, experts.channels :]), experts.down.float().norm(dim=1)
