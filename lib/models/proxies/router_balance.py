"""Balances the experts of a model in training: auxiliary loss, correction bias of the routers, shares of the experts.

Shapes: E experts, N tokens of a batch, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from lib.models.structure.anatomy import Anatomy, Experts


@dataclass
class RouterBalance:
    """Observes the routers of a model: the balance loss of a forward pass, and the number of tokens of each expert.

    keep_N: mask of the tokens of the next forward pass to include, without padding; None for all.
    """

    view: Anatomy
    keep_N: torch.Tensor | None = None
    loss: torch.Tensor | float = 0.0
    counts: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = [(block.index, block.feed_forward.experts) for block in self.view.blocks]
        self.experts: dict[int, Experts] = {index: experts for index, experts in blocks if experts is not None}
        self.handles = [
            experts.router.register_forward_hook(self._observer(index, experts))
            for index, experts in self.experts.items()
        ]

    def _observer(self, index: int, experts: Experts) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
            logits_NE, _, chosen_NK = output
            if self.keep_N is not None:
                logits_NE, chosen_NK = logits_NE[self.keep_N], chosen_NK[self.keep_N]
            count_E = torch.bincount(chosen_NK.flatten(), minlength=experts.count).float()
            self.counts[index] = self.counts.get(index, 0) + count_E
            if torch.is_grad_enabled():
                sigmoid = experts.correction_bias is not None
                share_NE = logits_NE.float().sigmoid() if sigmoid else logits_NE.float().softmax(-1)
                mean_E = (share_NE / share_NE.sum(-1, keepdim=True)).mean(0)
                self.loss = self.loss + experts.count * (count_E / count_E.sum() * mean_E).sum() / len(self.experts)

        return hook

    def reset(self) -> None:
        """Reset the loss and the counts."""
        self.loss, self.counts = 0.0, {}

    def adjust(self, rate: float) -> None:
        """Raise the correction bias of experts below their fair share, lower the others' (Wang et al., 2024)."""
        for index, experts in self.experts.items():
            bias_E, count_E = experts.correction_bias, self.counts[index]
            if bias_E is not None:
                bias_E += rate * torch.sign(count_E.mean() - count_E)

    def shares(self) -> dict[int, list[float]]:
        """Return by block the number of tokens of each expert divided by its fair share."""
        return {index: (count_E / count_E.mean()).tolist() for index, count_E in self.counts.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
