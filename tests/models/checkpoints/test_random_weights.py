"""Tiled random weights: like drawn ones in size and spread, no two rows alike, the same for the same seed."""

import pytest
import torch
from torch import nn

from lib.models.checkpoints import io, random_weights
from lib.models.checkpoints.random_weights import Tiled


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(random_weights, "TILE", 1021)
    monkeypatch.setattr(random_weights, "LARGE", 4096)


def _drawn(draw, *shape, tiled=True, seed=3) -> torch.Tensor:
    tensor = torch.empty(*shape)
    torch.manual_seed(seed)
    if tiled:
        with Tiled():
            return draw(tensor)
    return draw(tensor)


@pytest.mark.parametrize("shape", [(200, 64), (4, 60, 64), (20_000,)])
@pytest.mark.parametrize(
    "draw",
    [
        lambda tensor: nn.init.normal_(tensor, mean=0.0, std=0.02),
        lambda tensor: tensor.normal_(0.0, 0.02),
        lambda tensor: nn.init.uniform_(tensor, -0.02 * 3**0.5, 0.02 * 3**0.5),
    ],
)
def test_large_tensors_have_the_requested_spread(draw, shape):
    drawn = _drawn(draw, *shape)
    assert drawn.std() == pytest.approx(0.02, rel=0.1) and abs(float(drawn.mean())) < 0.002
    assert torch.equal(drawn, _drawn(draw, *shape)) and not torch.equal(drawn, _drawn(draw, *shape, seed=4))
    flat = drawn.flatten()
    assert torch.equal(flat[:1021], flat[1021:2042])
    rows = drawn.reshape(-1, drawn.shape[-1])
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_matrix_has_full_rank():
    drawn = _drawn(lambda tensor: nn.init.normal_(tensor), 128, 96)
    assert torch.linalg.matrix_rank(drawn) == 96


def test_small_tensors_and_layers_are_drawn_as_usual():
    def draw(tensor):
        return nn.init.normal_(tensor, std=0.1)

    assert torch.equal(_drawn(draw, 40, 64), _drawn(draw, 40, 64, tiled=False))
    with Tiled():
        layer = nn.Linear(64, 80)
    assert layer.weight.requires_grad and 0 < layer.weight.std() < 0.125 + 0.01


def test_weights_to_be_trained_are_drawn_in_full(monkeypatch):
    monkeypatch.setattr(random_weights, "repeat", lambda flat: pytest.fail("a tile was repeated"))
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "intermediate_size": 128}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    io.build(config, "qwen3")
    with pytest.raises(pytest.fail.Exception, match="a tile was repeated"):
        io.build(config, "qwen3", tiled=True)
