"""int8 matrices against the dense ones they were made of."""

import torch
from torch import nn

from lib.measure.roofline import cost_model
from lib.models.calibration.second_moments import matrices
from lib.models.checkpoints import io
from lib.optimizations.sparse_neural_networks.int8 import Int8Linear, int8, quantize


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    x = torch.randn(5, 32) * torch.tensor([1e-3, 1, 10, 100, 0])[:, None]
    values, scale = quantize(x)
    assert (
        values.dtype == torch.int8
        and (values.float() * scale[:, None] - x).abs().max(1).values.le(scale / 2 + 1e-6).all()
    )


def test_the_layer_is_near_the_dense_one_for_any_batch_shape():
    dense = nn.Linear(64, 48)
    layer = Int8Linear(dense)
    for shape in ((1, 64), (2, 3, 64), (17, 64)):
        x = torch.randn(shape)
        assert layer(x).shape == dense(x).shape and (layer(x) - dense(x)).norm() < 0.02 * dense(x).norm()


def test_a_model_takes_a_quarter_of_its_matrices_bytes_and_says_nearly_the_same(tiny, name, batch):
    model = tiny(name)
    before, small = io.weights_hash(model), int8(model)
    dense = sum(matrix.weight.nbytes for matrix in matrices(model))
    scales = sum(4 * matrix.weight.numel() // matrix.weight.shape[-1] for matrix in matrices(model))
    assert cost_model.weights_bytes(model) - cost_model.weights_bytes(small) == dense - dense // 4 - scales
    assert io.weights_hash(model) == before and matrices(small) == []
    with torch.no_grad():
        ours, theirs = (one(**batch).logits.log_softmax(-1) for one in (small, model))
    assert nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean() < 0.05
