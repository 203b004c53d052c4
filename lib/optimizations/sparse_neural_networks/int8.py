"""Linear layers and experts with int8 weights: one scale per output row, inputs quantized per token as they come.

A yardstick for other compressions: a quarter of float32's bytes, without choosing anything. Round to nearest, symmetric
(the dynamic quantization of torch.ao, per channel, without calibration). Knows nothing of measuring; runs forward only.

Shapes: T tokens, O outputs, I inputs, E experts, K experts per token.
"""

import copy
from typing import Any

import torch
from torch import nn

from lib.models.calibration.second_moments import matrices

LEAST_ROWS = 17  # tokens of a product of integers on CUDA


class Int8Linear(nn.Module):
    """A linear layer with `weight` int8 [O, I] and `scale` [O]."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.weight.shape
        self.weight, self.scale = (nn.Parameter(t, requires_grad=False) for t in quantize(dense.weight.data))
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_TO = product(self.weight, self.scale, x.reshape(-1, self.in_features))
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.view(*x.shape[:-1], self.out_features)


class Int8Experts(nn.Module):
    """Routed experts with int8 matrices [E, 2I, H] and [E, H, I] and a scale per row; one after the other."""

    gate_up_proj: nn.Parameter
    gate_up_proj_scale: nn.Parameter
    down_proj: nn.Parameter
    down_proj_scale: nn.Parameter

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.act_fn = dense.act_fn
        self.num_experts = len(dense.down_proj)
        self.intermediate_dim = dense.intermediate_dim
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = quantize(getattr(dense, name).data)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        total_TH = torch.zeros_like(hidden_TH)
        for expert in index_TK.unique().tolist():
            token, position = torch.where(index_TK == expert)
            both = product(self.gate_up_proj[expert], self.gate_up_proj_scale[expert], hidden_TH[token])
            gate, up = both.chunk(2, dim=-1)
            out = product(self.down_proj[expert], self.down_proj_scale[expert], self.act_fn(gate) * up)
            total_TH.index_add_(0, token, out * weight_TK[token, position, None].to(out.dtype))
        return total_TH


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 values, scale of each last row) such that values × scale is near x [..., I]."""
    scale = (x.float().abs().amax(-1) / 127).clamp_min(1e-12)
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def product(weight_OI: torch.Tensor, scale_O: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ [T, O] in the dtype of x: integers multiplied, sums in int32."""
    values_TI, scale_T = quantize(x_TI)
    missing = max(0, LEAST_ROWS - len(values_TI)) if values_TI.is_cuda else 0
    sums_TO = torch._int_mm(nn.functional.pad(values_TI, (0, 0, 0, missing)), weight_OI.T)[: len(x_TI)]
    return (sums_TO.float() * scale_T[:, None] * scale_O).to(x_TI.dtype)


def int8(model: nn.Module, part: str = "all") -> nn.Module:
    """Return a copy of the model whose decoder matrices of `part` (see
    `lib.models.calibration.second_moments.matrices`) are int8.
    """
    model = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    for owner in {matrix.owner: None for matrix in matrices(model, part)}:
        model.set_submodule(names[owner], Int8Linear(owner) if isinstance(owner, nn.Linear) else Int8Experts(owner))
    return model
