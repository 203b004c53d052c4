"""Sparse weights loaded from a file: on the model's device, in a dtype that its kernels support."""

import pytest
import torch

from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import sparse

NAME = "model.layers.0.mlp.down_proj.weight"


def kept(model, layout):
    """Return half of a weight of the model, its description, and the functions that read its parts."""
    weight = model.get_parameter(NAME).data
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, ::2] = True
    stored = sparse.parts(sparse.compress(weight.bfloat16(), mask, layout, 4))
    read = {f"{NAME}.{part}": lambda tensor=tensor: tensor for part, tensor in stored.items()}
    return weight * mask, {NAME: {"layout": layout, "shape": list(weight.shape)}}, read


@pytest.mark.parametrize("layout", ["csr", "columns"])
def test_weights_load_on_the_device_of_the_model(tiny, layout):
    model = tiny("qwen3-4b-instruct-2507")
    _, described, read = kept(model, layout)
    sparse.restore(model, described, read, device="meta")
    assert sparse.stored(model)[NAME].device.type == "meta" and not read


def test_values_stored_on_cuda_are_multiplied_on_a_cpu(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    dense, described, read = kept(model, "csr")
    values = read[f"{NAME}.values"]
    read[f"{NAME}.values"] = lambda: values().bfloat16()  # where the model's own dtype has kernels
    sparse.restore(model, described, read)
    assert sparse.stored(model)[NAME].dtype == torch.float32
    x_TI = torch.randn(3, dense.shape[1])
    product = anatomy(model).blocks[0].feed_forward.down(x_TI)
    assert torch.allclose(product, x_TI @ dense.T, atol=0.05, rtol=0.05)
