"""Linear layers and stacked experts with weights in int8 or int4 and activations in full precision.

Only weights are quantized, rounded to nearest: int8 symmetric with a scale per output row; int4 asymmetric with scale
and zero point per group of 128 inputs (if 128 does not divide the width, the largest of 64, 32, 16 that does). No
calibration text is needed. Products run in torch's own kernels for packed weights (`_weight_int8pack_mm`,
`_weight_int4pack_mm`). They are fast only in bfloat16 (on a CPU, float32 takes a hundred times as long), so scales are
bfloat16, and inputs are converted to it for the product. The matrix is restored for a product if no kernel accepts its
shape, and in int8 for many tokens, when arithmetic is the bottleneck. Forward pass only. Knows nothing of which
matrices are quantized.

Shapes: T tokens, O outputs, I inputs, G inputs of a group, E experts, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lib.errors import UserError

BITS = (8, 4)
GROUPS = (128, 64, 32, 16)  # group sizes; the first that divides the width is used
KERNEL_GROUPS = (32, 64, 128, 256)
FEW_TOKENS = 32  # up to this number, reading the weights is the bottleneck
LANES = 32  # inputs that the int8 kernel processes at a time; it reads beyond the end of narrower rows
SCALES = torch.bfloat16
TILES = 8  # inner tiles in the layout of the int4 kernel on CUDA
STACKS = ("gate_up_proj", "down_proj")
Packed = tuple[torch.Tensor, torch.Tensor]  # values and scales, as `pack` returns them


def group_size(inputs: int) -> int:
    """Return how many inputs of a row share a scale in int4: 128 if it divides the number of `inputs`."""
    return next((group for group in GROUPS if inputs % group == 0), inputs)


def has_kernel(weight_OI: torch.Tensor, bits: int) -> bool:
    """Return whether torch has a kernel that multiplies with this matrix packed in `bits`."""
    outputs, inputs = weight_OI.shape
    if bits == 8:
        return outputs % 16 == 0 and inputs % LANES == 0
    if group_size(inputs) not in KERNEL_GROUPS:
        return False
    if weight_OI.is_cuda:
        return outputs % 8 == 0 and inputs % (TILES * 16) == 0
    return outputs % 16 == 0


def pack(weight_OI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed values, scales) of a matrix.

    int8: [O, I] and [O]. int4: values in the layout of the kernel, or without one two to a byte [O, I/2], and scale
    with zero point [I/G, O, 2]. Raises UserError for an odd width in int4.
    """
    weight = weight_OI.detach().float()
    if bits == 8:
        scale_O = (weight.abs().amax(-1) / 127).clamp_min(1e-12).to(SCALES)
        return (weight / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale_O
    outputs, inputs = weight.shape
    require_pairs(inputs)
    grouped = weight.view(outputs, -1, group_size(inputs))
    scale_OG, zero_OG = grid(grouped)
    return pack_steps(steps(grouped, scale_OG, zero_OG).view(outputs, inputs), scale_OG, zero_OG)


def require_pairs(inputs: int) -> None:
    """Raise UserError if int4 cannot pack a width of `inputs`, because it is odd."""
    if inputs % 2:
        raise UserError(f"int4 packs two weights to a byte, but this matrix has {inputs} inputs")


def grid(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero point) [...] of the int4 grid of 16 values for groups of weights [..., I]."""
    low, high = weights.amin(-1), weights.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12).to(SCALES)
    return scale, (low + 8 * scale.float()).to(SCALES)


def steps(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the nearest step (0 to 15) of the group's grid for each of the weights [..., I], float32."""
    return ((weights - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)


def at_steps(steps: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the weights [..., I] that `steps` of a group's grid represent, float32."""
    return (steps - 8) * scale.float()[..., None] + zero.float()[..., None]


def pack_steps(
    steps_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed values, scales) in int4, as `pack` does, for given steps of the grids."""
    values_OI = steps_OI.to(torch.int32)
    scales = torch.stack([scale_OG, zero_OG], -1).transpose(0, 1).contiguous()
    if not has_kernel(values_OI, 4):
        return _two_to_a_byte(values_OI), scales
    if values_OI.is_cuda:
        return torch._convert_weight_to_int4pack(_two_to_a_byte(values_OI), TILES), scales
    return torch._convert_weight_to_int4pack_for_cpu(values_OI, TILES), scales


def _two_to_a_byte(values_OI: torch.Tensor) -> torch.Tensor:
    return ((values_OI[:, ::2] << 4) | values_OI[:, 1::2]).to(torch.uint8)


def restored(values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], kernel: bool) -> torch.Tensor:
    """Return the matrix [O, I] that packed values represent, float32."""
    if values.dtype == torch.int8:
        return values.float() * scales.float()[:, None]
    if kernel:  # only the kernel can read its layout: a product with the identity gives the transposed matrix
        eye_II = torch.eye(shape[1], dtype=scales.dtype, device=scales.device)
        return _int4_product(values, scales, eye_II).float().T
    both = torch.stack([values >> 4, values & 15], -1).view(shape[0], scales.shape[0], -1).float()
    scale, zero = scales.float().transpose(0, 1).unbind(-1)
    return ((both - 8) * scale[..., None] + zero[..., None]).view(shape)


def product(
    x_TI: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], kernel: bool
) -> torch.Tensor:
    """Return x·Wᵀ [T, O] in the dtype of x for packed values of a matrix of `shape`."""
    if not len(x_TI):
        return x_TI.new_zeros(0, shape[0])
    if kernel and values.dtype != torch.int8:
        return _int4_product(values, scales, x_TI.to(SCALES).contiguous()).to(x_TI.dtype)
    if kernel and len(x_TI) <= FEW_TOKENS:
        return torch._weight_int8pack_mm(x_TI.to(SCALES).contiguous(), values, scales).to(x_TI.dtype)
    return nn.functional.linear(x_TI, restored(values, scales, shape, kernel).to(x_TI.dtype))


def _int4_product(values: torch.Tensor, scales: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    multiply: Callable = torch._weight_int4pack_mm if x_TI.is_cuda else torch._weight_int4pack_mm_for_cpu
    return multiply(x_TI, values, x_TI.shape[1] // scales.shape[-3], scales)


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is packed in `bits`; the bias is unchanged.

    `packed`: values and scales to use instead of rounding to nearest.
    """

    def __init__(self, dense: nn.Linear, bits: int, packed: Packed | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.weight.shape
        self.bits, self.kernel = bits, has_kernel(dense.weight, bits)
        values, scales = packed or pack(dense.weight, bits)
        self.weight, self.scales, self.bias = _fixed(values), _fixed(scales), dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.out_features, self.in_features
        y_TO = product(x.reshape(-1, self.in_features), self.weight, self.scales, shape, self.kernel)
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.view(*x.shape[:-1], self.out_features)

    @property
    def elements(self) -> int:
        """Number of weights that the packed values represent."""
        return self.out_features * self.in_features

    def restored(self) -> torch.Tensor:
        """Return the matrix [O, I] that the packed values represent, float32."""
        return restored(self.weight, self.scales, (self.out_features, self.in_features), self.kernel)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, int{self.bits}"


class QuantizedExperts(nn.Module):
    """Routed experts whose matrices are packed in `bits`; they run one after the other, each on its own tokens.

    `packed`: the values and scales of each expert, by stack, to use instead of rounding to nearest.
    """

    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, dense: Any, bits: int, packed: Mapping[str, Sequence[Packed]] | None = None) -> None:
        super().__init__()
        self.act_fn, self.num_experts, self.bits = dense.act_fn, len(dense.down_proj), bits
        self.intermediate_dim = dense.down_proj.shape[2]
        self.input_factor = getattr(dense, "input_factor", None)
        self.output_factor = getattr(dense, "output_factor", None)
        self.shapes: dict[str, tuple[int, int]] = {}
        self.kernels: dict[str, bool] = {}
        for name in STACKS:
            stack = getattr(dense, name).data
            chosen = packed[name] if packed else [pack(weight, bits) for weight in stack]
            self.shapes[name], self.kernels[name] = tuple(stack.shape[1:]), has_kernel(stack[0], bits)
            setattr(self, name, _fixed(torch.stack([values for values, _ in chosen])))
            setattr(self, f"{name}_scales", _fixed(torch.stack([scales for _, scales in chosen])))

    def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        entering_TH = hidden_TH if self.input_factor is None else self.input_factor(hidden_TH)
        total_TH = hidden_TH.new_zeros(len(hidden_TH), self.shapes["down_proj"][0])
        for expert in index_TK.unique().tolist():
            token, position = torch.where(index_TK == expert)
            gate, up = self.multiply("gate_up_proj", expert, entering_TH[token]).chunk(2, dim=-1)
            out = self.multiply("down_proj", expert, self.act_fn(gate) * up) * weight_TK[token, position, None]
            total_TH.index_add_(0, token, out.to(total_TH.dtype))
        return total_TH if self.output_factor is None else self.output_factor(total_TH)

    @property
    def elements(self) -> int:
        """Number of weights that the packed values of all experts represent."""
        return self.num_experts * sum(outputs * inputs for outputs, inputs in self.shapes.values())

    def multiply(self, name: str, expert: int, x_TI: torch.Tensor) -> torch.Tensor:
        """Return the product of x [T, I] with the matrix of `expert` in the stack `name`."""
        values, scales = getattr(self, name)[expert], getattr(self, f"{name}_scales")[expert]
        return product(x_TI, values, scales, self.shapes[name], self.kernels[name])


def stored(part: QuantizedLinear | QuantizedExperts) -> list[torch.Tensor]:
    """Return the packed values and scales of a part, without its bias."""
    return [tensor for name, tensor in part.named_parameters(recurse=False) if name != "bias"]
