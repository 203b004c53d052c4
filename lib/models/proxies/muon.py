"""Muon for models with experts: torch's optimizer, which accepts only matrices, applied to each matrix of a stack.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by an approximation of its nearest semi-orthogonal matrix,
and needs about half the steps of Adam at the size of a proxy model. Each expert of a stack is a separate matrix.

Shapes: E experts.
"""

from collections.abc import Callable, Iterable
from typing import overload

import torch


class MatrixMuon(torch.optim.Muon):
    """torch's Muon for matrices and for stacks of matrices [E, out, in], whose slices it updates in place."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        weights = list(parameters)
        self.stacks = [(weight, weight.detach().unbind()) for weight in weights if weight.ndim == 3]
        matrices = [weight for weight in weights if weight.ndim == 2]
        slices = [matrix for _, matrices_E in self.stacks for matrix in matrices_E]
        super().__init__([*matrices, *slices], lr=lr, weight_decay=weight_decay)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every matrix that has a gradient; return the loss of `closure`, which computes the gradients."""
        loss = None if closure is None else closure()
        for weight, matrices_E in self.stacks:
            if weight.grad is not None:
                for matrix, gradient in zip(matrices_E, weight.grad.unbind()):
                    matrix.grad = gradient
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of matrices and stacks."""
        super().zero_grad(set_to_none)
        for weight, _ in self.stacks:
            weight.grad = None
