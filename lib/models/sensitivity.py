"""How much an error in each matrix's output costs: the mean squared gradient of the loss there, by one backward pass.

The loss is the negative log-likelihood of tokens drawn from the model's own answers, so that its squared gradient is
the Fisher information: to second order ½ · sensitivity · ‖error‖² is the divergence in nats that an error causes, were
errors independent and alike in all directions. Knows nothing of what causes the errors.

Shapes: T tokens, V vocabulary, H hidden, E experts, K experts per token, I width of one expert.
"""

from collections.abc import Iterable

import torch
from torch import nn

from lib.models.anatomy import anatomy
from lib.models.factors import FactoredExperts
from lib.models.gram import experts_name, linears

ENOUGH_TOKENS = 4096


def sensitivities(model: nn.Module, calibration: Iterable[dict[str, torch.Tensor]], seed: int = 0) -> dict[str, float]:
    """Return the mean over tokens of ‖∂loss/∂output‖² / width, by the module's name; of stacked experts twice:

    `name:input` at what leaves gate and up, as if the router's weight were 1, per pair of token and expert;
    `name:output` at the weighted sum. Reads batches of `calibration` until it has seen ENOUGH_TOKENS.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        seen = found.setdefault(name, [0.0, 0])
        seen[0] += float(gradient.float().square().sum()) / gradient.shape[-1]
        seen[1] += gradient.numel() // gradient.shape[-1]

    view, tokens = anatomy(model), 0
    hooks = [view.embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_() * 1)]
    for block in view.blocks:
        hooks += [_watch_linear(one, name, add) for name, one in linears(model, block).items()]
        if name := experts_name(model, block):
            hooks.append(_watch_experts(block.feed_forward.experts.module, name, add))
    random = torch.Generator().manual_seed(seed)
    try:
        for inputs in calibration:
            with torch.enable_grad():
                _loss(model, inputs, random).backward()
            tokens += inputs["input_ids"].numel()
            if tokens >= ENOUGH_TOKENS:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / count for name, (total, count) in found.items()}


def _loss(model: nn.Module, inputs: dict[str, torch.Tensor], random: torch.Generator) -> torch.Tensor:
    """Return the summed loss of tokens drawn from the model's own answers at every real position."""
    logits = model(**inputs, use_cache=False).logits.float()
    mask = inputs.get("attention_mask")
    logits_TV = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
    drawn_T = torch.multinomial(logits_TV.detach().softmax(-1).cpu(), 1, generator=random)[:, 0]
    return nn.functional.cross_entropy(logits_TV, drawn_T.to(logits.device), reduction="sum")


def _watch_linear(linear: nn.Module, name: str, add):
    return linear.register_forward_hook(
        lambda module, args, output: (
            output.register_hook(lambda gradient: add(name, gradient)) and None if output.requires_grad else None
        )
    )


def _watch_experts(experts: nn.Module, name: str, add):
    def forward(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        hidden_TH, chosen_TK, _ = (tensor.detach() for tensor in args)

        def backward(gradient_TH: torch.Tensor) -> None:
            add(f"{name}:output", gradient_TH)
            _add_entering(module, hidden_TH, chosen_TK, gradient_TH.detach(), lambda one: add(f"{name}:input", one))

        output.register_hook(backward)

    return experts.register_forward_hook(forward)


def _add_entering(
    module: nn.Module, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, gradient_TH: torch.Tensor, add
) -> None:
    """Carry the gradient of the experts' sum back to what leaves gate and up, expert by expert on its own tokens."""
    inside_TP = module.enter(hidden_TH) if isinstance(module, FactoredExperts) else hidden_TH
    if getattr(module, "output_factor", None) is not None:
        gradient_TH = gradient_TH @ module.output_factor.weight
    for expert in range(module.down_proj.shape[0]):
        token = torch.where(chosen_TK == expert)[0]
        if token.numel() == 0:
            continue
        with torch.enable_grad():
            leaving = nn.functional.linear(inside_TP[token], module.gate_up_proj[expert]).requires_grad_()
            inner = module._apply_gate(leaving)
            add(torch.autograd.grad(inner, leaving, gradient_TH[token] @ module.down_proj[expert])[0])
