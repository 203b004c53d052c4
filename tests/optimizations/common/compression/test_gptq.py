"""GPTQ: equal to a slow reference that re-solves for the best remaining weights, better than rounding, the same
bytes.
"""

import pytest
import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.calibration.inverse_factor import DAMPING
from lib.models.structure.replacements import quantized
from lib.optimizations.common.compression import gptq
from lib.optimizations.common.compression.weight_only import weight_only


def _inputs(count: int, tokens: int, seed: int) -> torch.Tensor:
    """Return correlated inputs [T, I], like hidden states."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, count, generator=random) + 3 * torch.randn(1, count, generator=random)
    return torch.randn(tokens, count, generator=random) @ mix


def reference(weight_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    """Return the weights [O, I] after rounding columns in order and, after each, setting the free ones to the
    least-squares answer to all errors so far. One group.
    """
    gram = gram_II.double() + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    free, fixed = weight_OI.double().clone(), torch.zeros_like(weight_OI, dtype=torch.float64)
    scale, zero = quantized.grid(weight_OI)
    for j in range(len(gram_II)):
        column = free[:, j : j + 1].float()
        fixed[:, j : j + 1] = quantized.at_steps(quantized.steps(column, scale, zero), scale, zero)
        rest = slice(j + 1, None)
        errors = weight_OI.double()[:, : j + 1] - fixed[:, : j + 1]
        free[:, rest] = weight_OI.double()[:, rest] + errors @ gram[: j + 1, rest] @ torch.linalg.pinv(gram[rest, rest])
    return fixed.float()


def _restored(chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    steps, scale, zero = chosen
    groups = scale.shape[-1]
    grouped = steps.view(*steps.shape[:-1], groups, -1)
    return quantized.at_steps(grouped, scale, zero).view(steps.shape)


@pytest.mark.parametrize("seed", range(5))
def test_gptq_matches_the_reference(seed):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    x = _inputs(16, 200, seed)
    gram = x.T @ x
    ours = _restored(gptq.quantize(weight[None], gram[None]))[0]
    assert torch.allclose(ours, reference(weight, gram), atol=1e-4)


@pytest.mark.parametrize("width", [96, 256])
def test_outputs_are_closer_than_with_rounding(width):
    for seed in range(5):
        weight, x = torch.randn(32, width, generator=torch.Generator().manual_seed(seed)), _inputs(width, 1000, seed)
        (ours,) = gptq.packed(weight, x.T @ x)
        errors = []
        for packed in (ours, quantized.pack(weight, 4)):
            restored = quantized.restored(*packed, tuple(weight.shape), quantized.has_kernel(weight, 4))
            errors.append(float(((restored - weight) @ x.T).square().sum()))
        assert errors[0] < 0.9 * errors[1]


def test_independent_inputs_are_rounded_to_nearest():
    weight = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    for ours, rounded in zip(gptq.packed(weight, torch.stack([torch.eye(64), torch.zeros(64, 64)])), weight):
        values, scales = quantized.pack(rounded, 4)
        assert torch.equal(ours[0], values) and torch.equal(ours[1], scales)


def test_an_expert_is_quantized_as_if_it_were_alone():
    weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1))
    grams = torch.stack([(x := _inputs(64, 300, seed)).T @ x for seed in range(3)])
    together = gptq.packed(weight, grams)
    for index, (values, scales) in enumerate(together):
        alone = gptq.packed(weight[index], grams[index])[0]
        assert torch.equal(alone[0], values) and torch.equal(alone[1], scales)


def test_an_odd_width_is_refused():
    with pytest.raises(UserError, match="33 inputs"):
        gptq.packed(torch.randn(4, 33), torch.eye(33))


def test_a_model_takes_the_bytes_of_rounding_and_has_closer_outputs(tiny, name, batch):
    model = tiny(name)
    rounded, ours = weight_only(model, 4), weight_only(model, 4, calibration=[batch])
    assert cost_model.weights_bytes(ours) == cost_model.weights_bytes(rounded) < cost_model.weights_bytes(model)
    with torch.inference_mode():
        logits = [arm(**batch).logits.float() for arm in (model, rounded, ours)]
    assert (logits[2] - logits[0]).square().mean() < (logits[1] - logits[0]).square().mean()


def test_eight_bit_errors_need_no_compensation(tiny, batch):
    with pytest.raises(ValueError, match="8 bits"):
        weight_only(tiny("qwen3-4b-instruct-2507"), 8, calibration=[batch])
