"""The products of attention over latents against their plain einsums: every batch, number of tokens and precision."""

import itertools

import pytest
import torch

from lib.models.decoding import latent_products


@pytest.mark.parametrize("batch, new, dtype", [*itertools.product((1, 3), (1, 4), (torch.float32, torch.bfloat16))])
def test_they_are_the_plain_products(batch, new, dtype):
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
    part = keys[:, :length]  # a view of a longer buffer, as caches with room are
    torch.testing.assert_close(latent_products.scores(rows, part), torch.einsum("bxr,bsr->bxs", rows, part), **near)
