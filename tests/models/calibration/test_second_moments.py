"""Second moments against sums over the captured inputs, token by token."""

import pytest
import torch

from lib.errors import UserError
from lib.models.calibration.second_moments import matrices, moments
from lib.models.structure.anatomy import anatomy


def by_router(model, batch):
    return moments(model, [batch], matrices(model), gram=True, dtype=torch.float64, weighting="router")


def test_gram_matrices_match_the_real_tokens(tiny, name, batch):
    model = tiny(name)
    block = anatomy(model).blocks[-1]
    inputs, routed = {}, []
    down = block.feed_forward.down if block.feed_forward.dense is not None else block.attention.output
    down.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0]))
    if block.feed_forward.experts:
        block.feed_forward.experts.module.register_forward_pre_hook(lambda module, args: routed.extend(args))
    by_name = by_router(model, batch)
    by_place = {(matrix.owner, matrix.attribute): by_name[matrix.name] for matrix in matrices(model)}
    mask_T = batch["attention_mask"].bool().flatten()
    x_TI = inputs["x"].flatten(0, -2)[mask_T].double()
    linear = by_place[down, "weight"]
    assert linear.tokens == mask_T.sum() and torch.allclose(linear.gram, x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)
    if routed:
        experts, (hidden, chosen, weight) = block.feed_forward.experts, (tensor[mask_T] for tensor in routed)
        inner_II, entering_II = torch.zeros(32, 32), torch.zeros(32, 32)
        for token, position in zip(*torch.where(chosen == 3)):
            inner = experts.module._apply_gate(experts.gate_up[3] @ hidden[token]) * weight[token, position]
            inner_II += torch.outer(inner, inner)
        for token, position in ((token, position) for token in range(len(hidden)) for position in range(2)):
            entering = hidden[token] * weight[token, position]
            entering_II += torch.outer(entering, entering)
        assert torch.allclose(by_place[experts.module, "down_proj"].gram[3].float(), inner_II, rtol=1e-3, atol=1e-4)
        gate_up = by_place[experts.module, "gate_up_proj"]
        assert gate_up.tokens == mask_T.sum()
        assert torch.allclose(gate_up.gram.float(), entering_II, rtol=1e-3, atol=1e-3)


def test_squares_are_the_diagonal(tiny, name, batch):
    for sums in by_router(tiny(name), batch).values():
        assert sums.gram.dtype == sums.squares.dtype == torch.float64
        assert torch.allclose(sums.squares, sums.gram.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-4)


def test_the_pass_ends_after_the_last_observed_block(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    ran = []
    for block in anatomy(model).blocks:
        block.module.register_forward_hook(lambda module, args, output, index=block.index: ran.append(index))
    moments(model, [batch], matrices(model, block=1))
    assert ran == [0, 1]


def test_calibration_without_tokens_is_refused(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    padding = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    for calibration in ([], [padding]):
        with pytest.raises(UserError, match="no token"):
            moments(model, calibration, matrices(model))
    assert moments(model, [], []) == {}
