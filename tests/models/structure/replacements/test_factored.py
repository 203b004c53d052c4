"""Factored modules against their dense equivalents; then disk, cost, observation, and who must refuse them."""

import json

import pytest
import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.calibration.activations import observe
from lib.models.calibration.second_moments import matrices
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored as factors
from lib.models.structure.surgery import resize_linear
from lib.optimizations.common.compression.weight_only import weight_only
from tests.measure.roofline import counted_flops


def factored(model, rank: int = 8):
    """Factor every matrix of every block with random factors; return the dense model of the same matrices too."""
    view = anatomy(model)
    for block in view.blocks:
        linears = [matrix for matrix in matrices(model, block=block.index) if matrix.part != "experts"]
        for matrix in linears:
            (rows, columns), name = matrix.weight.shape, matrix.module_name
            factors.factor_linear(model, name, torch.randn(rows, rank) / 4, torch.randn(rank, columns) / 4)
        if block.feed_forward.experts:
            name = _name(model, block.feed_forward.experts.module)
            experts, wide, hidden = block.feed_forward.experts.gate_up.shape
            gate_up = (torch.randn(experts, wide, rank) / 4, torch.randn(rank, hidden) / 4)
            down = (torch.randn(hidden, 2 * rank) / 4, torch.randn(experts, 2 * rank, wide // 2) / 4)
            factors.factor_experts(model, name, gate_up=gate_up, down=down)
    return model


def dense_like(model, dense):
    """Give `dense` the matrices of the factored `model`, multiplied out."""
    for name, module in model.named_modules():
        if isinstance(module, factors.FactoredLinear):
            dense.get_submodule(name).weight = torch.nn.Parameter(module.weight, requires_grad=False)
        if isinstance(module, factors.FactoredExperts):
            gate_up = torch.einsum("eip,ph->eih", module.gate_up_proj, module.input_factor.weight)
            down = torch.einsum("hq,eqi->ehi", module.output_factor.weight, module.down_proj)
            dense.get_submodule(name).gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
            dense.get_submodule(name).down_proj = torch.nn.Parameter(down, requires_grad=False)
    return dense


def same_answers(arm, reference, batch) -> None:
    """Compare up to rounding: tensors of a file have other addresses, at which kernels sum in another order."""
    torch.testing.assert_close(arm(**batch).logits, reference(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_two_thin_products_equal_the_dense_matrix(tiny, name, batch, backend):
    dense = tiny(name)
    model = factored(tiny(name))
    dense_like(model, dense)
    if any(block.feed_forward.experts for block in anatomy(model).blocks):
        dense.set_experts_implementation(backend)
        model.set_experts_implementation(backend)
    assert torch.allclose(model(**batch).logits, dense(**batch).logits, atol=2e-4, rtol=1e-3)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] <= batch["input_ids"].shape[1] + 3


def test_the_dense_matrix_is_never_made(tiny, name, batch, monkeypatch):
    def forbidden(self):
        raise AssertionError("a dense matrix was made")

    model = factored(tiny(name))
    monkeypatch.setattr(factors.FactoredLinear, "weight", property(forbidden))
    model(**batch)


def test_disk_round_trip_keeps_every_bit_of_the_weights(tiny, name, batch, tmp_path):
    model = factored(tiny(name))
    view = anatomy(model)
    dense_attention = view.blocks[1].attention.module  # dense and factored side by side, and another rank
    dense_attention.o_proj = tiny(name, seed=3).get_submodule(_name(model, dense_attention)).o_proj
    back = io.load_folder(io.save(model, tmp_path), torch.float32)
    assert io.weights_hash(back) == io.weights_hash(model)
    same_answers(back, model, batch)
    assert factors.ranks(back) == factors.ranks(model)
    manifest = json.loads((tmp_path / "workbench.json").read_text())
    manifest["factors"]["model.nothing"] = {"rank": 8}
    (tmp_path / "workbench.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no module model\.nothing"):
        io.load_folder(tmp_path)


def _name(model, module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def test_a_stack_may_be_factored_alone(tiny, batch, tmp_path):
    model = tiny("qwen3-coder-30b")
    for block in anatomy(model).blocks:
        down = (torch.randn(32, 8), torch.randn(8, 8, 32))
        factors.factor_experts(model, _name(model, block.feed_forward.experts.module), down=down)
    back = io.load_folder(io.save(model, tmp_path), torch.float32)
    assert io.weights_hash(back) == io.weights_hash(model)
    same_answers(back, model, batch)
    assert set(map(str, factors.ranks(back).values())) == {"{'input_rank': None, 'output_rank': 8}"}


@torch.no_grad()
def test_cost_counts_factors_not_the_dense_shape(tiny, name):
    dense, model = tiny(name), factored(tiny(name))
    assert cost_model.prefill_flops(model, 16, 2) == counted_flops.prefill(model, 16, 2)
    assert cost_model.weights_bytes(model) == sum(p.nbytes for p in {*model.parameters(), *model.buffers()})
    assert cost_model.active_parameters(model) < cost_model.active_parameters(dense)
    assert cost_model.step_bytes(model, 1, 16) < cost_model.step_bytes(dense, 1, 16)
    for factored_block, reference in zip(anatomy(model).blocks, anatomy(dense).blocks):
        assert factored_block.feed_forward.channels == reference.feed_forward.channels
        assert (factored_block.attention.heads, factored_block.attention.key_value_heads) == (
            reference.attention.heads,
            reference.attention.key_value_heads,
        )


def test_expansion_of_latents_is_counted_in_factors(tiny):
    dense, model = tiny("glm-4.7-flash"), factored(tiny("glm-4.7-flash"), rank=2)
    grown = [cost_model.decode_flops(arm, 101) - cost_model.decode_flops(arm, 1) for arm in (dense, model)]
    assert grown[1] < grown[0]


def test_observation_sees_through_factors(tiny, name, batch):
    model = factored(tiny(name))
    dense = dense_like(model, tiny(name))
    for arm, reference in zip(observe(model, [batch]).blocks, observe(dense, [batch]).blocks):
        for field in ("channel_activation_C", "head_contribution_Q", "expert_contribution_E", "expert_tokens_E"):
            if (value := getattr(arm, field)) is not None:
                assert torch.allclose(value, getattr(reference, field), rtol=1e-2, atol=1e-2), field


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_factors_keep_heads_and_channels_unchanged(tiny, bits):
    """Int4 values lie two to a byte, so only half of them were counted."""
    dense, model = tiny("qwen3-4b-instruct-2507"), factored(tiny("qwen3-4b-instruct-2507"))
    for packed, reference in zip(anatomy(weight_only(model, bits)).blocks, anatomy(dense).blocks):
        assert packed.feed_forward.channels == reference.feed_forward.channels
        assert packed.attention.heads == reference.attention.heads
        assert packed.attention.key_value_heads == reference.attention.key_value_heads
        assert packed.attention.output.rank == 8


def test_removing_rows_of_factors_is_refused(tiny):
    block = anatomy(factored(tiny("qwen3-4b-instruct-2507"))).blocks[0]
    with pytest.raises(UserError, match="before matrices are factored"):
        resize_linear(block.feed_forward.up, torch.zeros(8, 32))
