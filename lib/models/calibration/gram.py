"""Gram matrices of what enters each matrix of the decoder while calibration text runs through it, through the anatomy.

One pass with hooks. Padding is left out; kept are sums only, in float64. Experts are seen by their own tokens, each
weighted by what the router gave it: X·Xᵀ of all tokens that enter, and one per expert of what enters its down
projection. Knows nothing of what the matrices are used for.

Shapes: T tokens, E experts, H hidden, I width of one expert, N inputs of a matrix.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.activations import real_T
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.factored import FactoredExperts, FactoredLinear, shared_factors


@dataclass
class Gram:
    """Σ x·xᵀ [N, N], or one per expert [E, N, N], and over how many tokens."""

    sum: torch.Tensor | None = None
    tokens: int = 0

    def add(self, product: torch.Tensor, tokens: int) -> None:
        self.sum = product.double() if self.sum is None else self.sum + product
        self.tokens += tokens


@dataclass
class Grams:
    """Gram matrices by the module's name: of a linear layer's input; of what enters experts; of what enters their
    down projections."""

    linear: dict[str, Gram] = field(default_factory=dict)
    experts_input: dict[str, Gram] = field(default_factory=dict)
    experts_down: dict[str, Gram] = field(default_factory=dict)
    tokens: int = 0


def linears(model: nn.Module, block: Block) -> dict[str, nn.Linear]:
    """Return the dense linear layers of one block by their name in `model`; factors are none."""
    inside = {
        id(part)
        for module in block.module.modules()
        if isinstance(module, FactoredLinear) or shared_factors(module)
        for part in module.modules()
    }
    names = {id(module): name for name, module in model.named_modules()}
    found = (part for part in block.module.modules() if isinstance(part, nn.Linear) and id(part) not in inside)
    return {names[id(part)]: part for part in found}


def experts_name(model: nn.Module, block: Block) -> str | None:
    """Return the name in `model` of the block's stacked experts, or None where there are none."""
    if block.feed_forward.experts is None:
        return None
    return next(name for name, module in model.named_modules() if module is block.feed_forward.experts.module)


def observe_grams(model: nn.Module, calibration: Iterable[dict[str, torch.Tensor]]) -> Grams:
    """Run `calibration` (keyword arguments of the model, batch by batch) and return every Gram matrix.

    Raises UserError where there is no calibration token at all.
    """
    seen, watch, view = Grams(), _Watch(), anatomy(model)
    hooks = []
    for block in view.blocks:
        for name, linear in linears(model, block).items():
            gram = seen.linear.setdefault(name, Gram())
            hooks.append(linear.register_forward_pre_hook(lambda module, args, gram=gram: watch.linear(gram, args[0])))
        if name := experts_name(model, block):
            grams = seen.experts_input.setdefault(name, Gram()), seen.experts_down.setdefault(name, Gram())
            experts = block.feed_forward.experts.module
            hooks.append(
                experts.register_forward_pre_hook(lambda module, args, grams=grams: watch.experts(grams, module, *args))
            )
    try:
        with torch.no_grad():
            for inputs in calibration:
                seen.tokens += watch.start(inputs)
                model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if seen.tokens == 0:
        raise UserError("calibration: no token to observe; give at least one sequence")
    return seen


class _Watch:
    """What the hooks share while one batch runs: its mask, and the last product, which query, key and value share."""

    def start(self, inputs: dict[str, torch.Tensor]) -> int:
        self.mask_T = real_T(inputs)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        return int(self.mask_T.sum())

    def linear(self, gram: Gram, x: torch.Tensor) -> None:
        if self.last is None or self.last[0] is not x:
            x_TN = x.reshape(-1, x.shape[-1])[self.mask_T].float()
            self.last = x, x_TN.T @ x_TN
        gram.add(self.last[1], int(self.mask_T.sum()))

    def experts(
        self,
        grams: tuple[Gram, Gram],
        module: nn.Module,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        hidden_TH, chosen_TK, weight_TK = (tensor[self.mask_T] for tensor in (hidden, chosen, weight.float()))
        scaled_TH = hidden_TH.float() * weight_TK.square().sum(1, keepdim=True).sqrt()
        grams[0].add(scaled_TH.T @ scaled_TH, len(hidden_TH))
        inside_TP = module.enter(hidden_TH) if isinstance(module, FactoredExperts) else hidden_TH
        count, width = module.down_proj.shape[0], module.down_proj.shape[2]
        down_EII = torch.zeros(count, width, width, device=hidden.device)
        for expert in range(count):
            token, position = torch.where(chosen_TK == expert)
            if token.numel():
                inner = module._apply_gate(nn.functional.linear(inside_TP[token], module.gate_up_proj[expert]))
                scaled = inner.float() * weight_TK[token, position, None]
                down_EII[expert] = scaled.T @ scaled
        grams[1].add(down_EII, len(hidden_TH))
