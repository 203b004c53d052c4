"""Statistics of a model on calibration text: activations, routing, contributions of heads, influence of blocks.

Collected in one pass from block to block (`lib.models.calibration.walk`), with hooks on one block at a time, for every
optimization that ranks parts. Padding is left out, and only sums over tokens are stored, never activations. Knows
nothing of how a part is ranked or removed.

Shapes: T tokens of a batch without padding, E experts, I width of one expert, C channels, Q heads, D value size.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lib.errors import UserError
from lib.models.calibration.walk import NO_NUMBERS, Walk
from lib.models.structure.anatomy import Block
from lib.models.structure.replacements.factored import FactoredExperts


@dataclass
class BlockStatistics:
    """Sums over the calibration tokens for one block, float32 on the model's device; None for parts that it lacks."""

    tokens: int = 0
    channel_activation_C: torch.Tensor | None = None  # Σ |activation| at the down projection of the dense part
    head_contribution_Q: torch.Tensor | None = None  # Σ ‖contribution of the head to the hidden state‖₂
    influence: float = 0.0  # Σ (1 − cos(block input, block output)), Men et al. 2024 (ShortGPT), section 3
    expert_tokens_E: torch.Tensor | None = None  # tokens routed to each expert
    expert_contribution_E: torch.Tensor | None = None  # Σ router weight × ‖expert output‖₂ over its tokens
    expert_norm_E: torch.Tensor | None = None  # Σ ‖expert output‖₂ over its tokens
    expert_channel_activation_EI: torch.Tensor | None = None  # Σ |activation| over its tokens


@dataclass
class Observation:
    """Statistics of every block, and the number of calibration tokens."""

    blocks: list[BlockStatistics] = field(default_factory=list)
    tokens: int = 0


def observe(model: nn.Module, calibration: Iterable[dict[str, torch.Tensor]]) -> Observation:
    """Return the statistics of each block of `model` on `calibration` (keyword arguments of the model, by batch).

    Raises UserError without any calibration token, and for a block whose weights or outputs are not finite.
    """
    walk = Walk(model, calibration)
    observation = Observation(tokens=walk.tokens)
    for block in walk:
        outputs: list[torch.Tensor] = []
        observation.blocks.append(block_statistics(walk, block, outputs))
        walk.carry_on(outputs)
    return observation


@torch.no_grad()
def block_statistics(walk: Walk, block: Block, outputs: list[torch.Tensor] | None = None) -> BlockStatistics:
    """Return the statistics of the current `block` of `walk`; append its outputs to `outputs`, if given.

    Raises UserError if its outputs are not finite, since a ranking by such statistics would be arbitrary.
    """
    statistics, masks = BlockStatistics(), dict[str, torch.Tensor]()

    def real(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(-1, hidden.shape[-1])[masks["mask"]]

    hooks = _watch_block(block, statistics, real, masks)
    try:
        running = walk.outputs()
        for batch in walk.carried:
            masks["mask"] = batch.mask_T
            output = next(running)
            if outputs is not None:
                outputs.append(output)
    finally:
        for hook in hooks:
            hook.remove()
    if not math.isfinite(statistics.influence):
        raise UserError(f"block {block.index}: its outputs {NO_NUMBERS}")
    return statistics


def _watch_block(
    block: Block,
    statistics: BlockStatistics,
    real: Callable[[torch.Tensor], torch.Tensor],
    batch: dict[str, torch.Tensor],
) -> list[RemovableHandle]:
    hooks = [
        block.module.register_forward_hook(
            lambda module, args, kwargs, output: _add_influence(statistics, real, args, kwargs, output),
            with_kwargs=True,
        ),
    ]
    if block.attention.kind != "none":
        hooks.append(
            block.attention.output.register_forward_pre_hook(
                lambda module, args: _add_heads(statistics, block, real(args[0]))
            )
        )
    part = block.feed_forward
    if part.down is not None:
        hooks.append(part.down.register_forward_pre_hook(lambda module, args: _add_channels(statistics, real(args[0]))))
    if part.experts is not None:
        hooks.append(
            part.experts.module.register_forward_pre_hook(
                lambda module, args: _add_experts(statistics, module, *(tensor[batch["mask"]] for tensor in args))
            )
        )
    return hooks


def _add(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if total is None else total + value


def _add_influence(
    statistics: BlockStatistics,
    real: Callable[[torch.Tensor], torch.Tensor],
    args: tuple,
    kwargs: dict,
    output: torch.Tensor | tuple,
) -> None:
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    cosine = torch.nn.functional.cosine_similarity(real(before).float(), real(after).float(), dim=-1)
    statistics.influence += float((1 - cosine).sum())
    statistics.tokens += cosine.shape[0]


def _add_channels(statistics: BlockStatistics, activation_TC: torch.Tensor) -> None:
    statistics.channel_activation_C = _add(statistics.channel_activation_C, activation_TC.float().abs().sum(0))


def _add_heads(statistics: BlockStatistics, block: Block, heads_TF: torch.Tensor) -> None:
    """Add the norm of each head's contribution, ‖W_o[:, head] · a‖, computed from the head's Gram matrix."""
    attention = block.attention
    heads_TQD = heads_TF.float().view(heads_TF.shape[0], attention.heads, attention.value_dim)
    weight_HQD = attention.output.weight.float().view(-1, attention.heads, attention.value_dim)
    gram_QDD = torch.einsum("hqd,hqe->qde", weight_HQD, weight_HQD)
    squared_TQ = torch.einsum("tqd,qde,tqe->tq", heads_TQD, gram_QDD, heads_TQD)
    statistics.head_contribution_Q = _add(statistics.head_contribution_Q, squared_TQ.clamp_min(0).sqrt().sum(0))


def _add_experts(
    statistics: BlockStatistics,
    module: Any,
    hidden_TH: torch.Tensor,
    chosen_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> None:
    """Add the statistics of each expert, which runs once more on its own tokens."""
    count, _, width = module.down_proj.shape
    tokens_E, contribution_E, norm_E = (hidden_TH.new_zeros(count, dtype=torch.float32) for _ in range(3))
    activation_EI = hidden_TH.new_zeros(count, width, dtype=torch.float32)
    factored = isinstance(module, FactoredExperts)
    entering = module.enter(hidden_TH) if factored else hidden_TH
    for expert in range(count):
        token, position = torch.where(chosen_TK == expert)
        if token.numel() == 0:
            continue
        inner = module._apply_gate(nn.functional.linear(entering[token], module.gate_up_proj[expert]))
        output = nn.functional.linear(inner, module.down_proj[expert])
        output = module.leave(output) if factored else output
        tokens_E[expert] = token.numel()
        norm_T = output.float().norm(dim=-1)
        norm_E[expert] = norm_T.sum()
        contribution_E[expert] = (weight_TK[token, position].float() * norm_T).sum()
        activation_EI[expert] = inner.float().abs().sum(0)
    statistics.expert_tokens_E = _add(statistics.expert_tokens_E, tokens_E)
    statistics.expert_contribution_E = _add(statistics.expert_contribution_E, contribution_E)
    statistics.expert_norm_E = _add(statistics.expert_norm_E, norm_E)
    statistics.expert_channel_activation_EI = _add(statistics.expert_channel_activation_EI, activation_EI)
