"""Packed matrices against their rounded equivalents, and against the original dense model."""

import copy

import pytest
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.calibration.second_moments import matrices
from lib.models.checkpoints import io
from lib.models.structure.replacements.quantized import QuantizedLinear, group_size, has_kernel, pack, product, restored
from lib.optimizations.common.compression.weight_only import weight_only, without_kernel


def rounded(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a matrix rounded row by row (int8) or group by group (int4), value by value."""
    size = weight_OI.shape[1] if bits == 8 else group_size(weight_OI.shape[1])
    result = torch.empty_like(weight_OI)
    for row in range(len(weight_OI)):
        for start in range(0, weight_OI.shape[1], size):
            part = weight_OI[row, start : start + size]
            if bits == 8:
                scale = (part.abs().max() / 127).bfloat16().float()
                result[row, start : start + size] = (part / scale).round() * scale
            else:
                scale = ((part.max() - part.min()) / 15).bfloat16().float()
                zero = (part.min() + 8 * scale).bfloat16().float()
                steps = ((part - zero) / scale + 8).round().clamp(0, 15) - 8
                result[row, start : start + size] = steps * scale + zero
    return result


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(32, 256), (48, 192), (20, 48), (16, 32)])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_a_product_equals_that_of_the_rounded_matrix(bits, shape, tokens):
    weight, x_TI = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.randn(tokens, shape[1])
    values, scales = pack(weight, bits)
    kernel = has_kernel(weight, bits)
    expected = rounded(weight, bits)
    coarse = 2e-2 if kernel and bits == 4 else 1e-6  # the kernel's results are bfloat16
    assert torch.allclose(restored(values, scales, shape, kernel), expected, atol=coarse)
    computed, exact = product(x_TI, values, scales, shape, kernel), x_TI @ expected.T
    assert computed.shape == exact.shape and (computed - exact).norm() <= 0.01 * exact.norm()
    assert values.nbytes == weight.numel() * bits // 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_takes_any_batch_shape_and_its_bias(bits, dtype):
    dense = nn.Linear(128, 48).to(dtype)
    layer = QuantizedLinear(dense, bits)
    for shape in ((1, 128), (2, 3, 128), (50, 128)):
        x = torch.randn(shape).to(dtype)
        lost = (layer(x) - dense(x)).float().norm() / dense(x).float().norm()
        assert layer(x).shape == dense(x).shape and layer(x).dtype == dtype and lost < {8: 0.02, 4: 0.15}[bits]


def test_groups_of_128_need_a_divisible_width():
    assert [group_size(width) for width in (2560, 192, 96, 48, 30)] == [128, 64, 32, 16, 30]
    with pytest.raises(UserError, match="15 inputs"):
        pack(torch.randn(4, 15), 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_takes_fewer_bytes_and_answers_nearly_the_same(tiny, name, batch, bits):
    model = tiny(name)
    before, small = io.weights_hash(model), weight_only(model, bits)
    dense = sum(matrix.weight.nbytes for matrix in matrices(model))
    saved = cost_model.weights_bytes(model) - cost_model.weights_bytes(small)
    assert {8: 0.7, 4: 0.6}[bits] * dense < saved < (1 - bits / 32) * dense
    assert io.weights_hash(model) == before and matrices(small) == []
    narrow = sum(matrix.weight.shape[-1] % 32 > 0 for matrix in matrices(model))
    assert without_kernel(model, 8) >= narrow
    with torch.no_grad():
        ours, theirs = (arm(**batch).logits.log_softmax(-1) for arm in (small, model))
    lost = nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
    assert lost < {8: 0.01, 4: 1.0}[bits]
    assert torch.equal(copy.deepcopy(small)(**batch).logits, small(**batch).logits)


def test_a_packed_model_is_refused_before_anything_is_saved(tiny, tmp_path):
    with pytest.raises(UserError, match="save the model before quantizing"):
        io.save(weight_only(tiny("qwen3-coder-30b"), 4), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_only_the_named_part_is_quantized(tiny):
    model = tiny("qwen3-coder-30b")
    small = weight_only(model, 8, "experts")
    assert {matrix.part for matrix in matrices(small)} == {"attention"}
    assert small.model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
