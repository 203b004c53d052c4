"""Tests latent attention products against plain einsums: every batch, token count and precision, and every storage form
of the expansion.
"""

import itertools

import pytest
import torch
from torch import nn

from lib.models.decoding import latent_expansion, latent_products
from lib.models.structure.replacements.factored import FactoredLinear
from lib.models.structure.replacements.quantized import QuantizedLinear
from lib.models.structure.replacements.sparse import SparseLinear, compress


@pytest.mark.parametrize("batch, new, dtype", [*itertools.product((1, 3), (1, 4), (torch.float32, torch.bfloat16))])
def test_products_equal_plain_einsums(batch, new, dtype):
    torch.manual_seed(0)
    heads, nope, value, width, length = 5, 6, 10, 16, 33
    weight_QER = torch.randn(heads, nope + value, width).to(dtype)
    query, mixed = torch.randn(batch, heads, new, nope).to(dtype), torch.randn(batch, heads, new, width).to(dtype)
    rows, keys = torch.randn(batch, heads * new, width).to(dtype), torch.randn(batch, 2 * length, width).to(dtype)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.02}
    torch.testing.assert_close(
        latent_products.into(query, weight_QER[:, :nope]),
        torch.einsum("bqtn,qnr->bqtr", query, weight_QER[:, :nope]),
        **near,
    )
    torch.testing.assert_close(
        latent_products.out_of(mixed, weight_QER[:, nope:]),
        torch.einsum("bqtr,qdr->bqtd", mixed, weight_QER[:, nope:]),
        **near,
    )
    part = keys[:, :length]  # a view of a longer buffer, as in caches with spare room
    torch.testing.assert_close(latent_products.scores(rows, part), torch.einsum("bxr,bsr->bxs", rows, part), **near)


HEADS, NOPE, VALUE, LATENT = 4, 24, 8, 64


def _stored(form: str, dtype: torch.dtype) -> nn.Module:
    """Return an expansion in one of its forms; the int8 and int4 kernels support its shape."""
    dense = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False).to(dtype).requires_grad_(False)
    if form == "factored":
        return FactoredLinear(*(nn.Linear(*size, bias=False).to(dtype) for size in ((LATENT, 9), (9, 128))))
    if form in ("int8", "int4"):
        return QuantizedLinear(dense, int(form[-1]))
    if form == "dense":
        return dense
    columns_I = torch.arange(LATENT) % 3 == 0
    kept_OI = columns_I.expand_as(dense.weight) if form == "columns" else torch.rand(dense.weight.shape) < 0.4
    return SparseLinear(compress(dense.weight.data, kept_OI, form, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "factored", "int8", "int4", "csr", "columns"])
@torch.no_grad()
def test_an_expansion_is_absorbed_in_every_storage_form(form, dtype):
    """Reference: the layer's own matrix, read off its products with single latents."""
    torch.manual_seed(1)
    projection = _stored(form, dtype)
    weight_QER = projection(torch.eye(LATENT, dtype=dtype)).T.reshape(HEADS, NOPE + VALUE, LATENT).float()
    query, mixed = torch.randn(2, HEADS, 3, NOPE).to(dtype), torch.randn(2, HEADS, 3, LATENT).to(dtype)
    made = latent_expansion.of(projection, HEADS, NOPE, dtype)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    for found, expected in (
        (made.into(query), torch.einsum("bqtn,qnr->bqtr", query.float(), weight_QER[:, :NOPE])),
        (made.out_of(mixed), torch.einsum("bqtr,qdr->bqtd", mixed.float(), weight_QER[:, NOPE:])),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, **near)


def test_factors_expand_a_latent_with_fewer_products():
    dense, factored = _stored("dense", torch.float32), _stored("factored", torch.float32)
    assert latent_expansion.elements_per_token(dense, LATENT, NOPE + VALUE) * HEADS == dense.weight.numel()
    numbers = sum(parameter.numel() for parameter in factored.parameters())
    assert latent_expansion.elements_per_token(factored, LATENT, NOPE + VALUE) * HEADS == numbers
