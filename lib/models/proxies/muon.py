"""The optimizer that trains the stand-ins: Muon for matrices, Adam for the rest.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix, found by five
Newton-Schulz iterations. It needs about half the steps of Adam at these sizes. Stacks of matrices (experts) are
treated matrix by matrix. Knows nothing of models or data; the caller sorts the parameters.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix_SMN: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Return the approximate nearest semi-orthogonal matrices of a stack, same shape."""
    a, b, c = COEFFICIENTS
    tall = matrix_SMN.shape[-2] > matrix_SMN.shape[-1]
    x_SMN = matrix_SMN.mT if tall else matrix_SMN
    x_SMN = x_SMN / (x_SMN.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x_SMN @ x_SMN.mT
        x_SMN = a * x_SMN + (b * gram + c * gram @ gram) @ x_SMN
    return x_SMN.mT if tall else x_SMN


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalized; parameters are matrices or stacks of matrices of one shape or several."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient; equal shapes are orthogonalized together."""
        for group in self.param_groups:
            same: dict[tuple[int, int], list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
            for shape, parameters in same.items():
                stack = torch.cat([self._momentum(p, group["momentum"]).view(-1, *shape) for p in parameters])
                update = orthogonal(stack) * max(1, shape[0] / shape[1]) ** 0.5
                counts = [parameter.numel() // (shape[0] * shape[1]) for parameter in parameters]
                for parameter, part in zip(parameters, update.split(counts)):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(part.view_as(parameter), alpha=-group["lr"])

    def _momentum(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
