"""Absorbed use of the matrix that expands latents to the keys and values of all heads (`kv_b_proj`): it maps queries
into the latent space, and weighted sums of latents back to values.

A dense matrix is used in place. Of a factored matrix, the outer factor is applied head by head and the inner factor to
the result, so that no dense matrix is formed. A sparse or quantized matrix or factor cannot be sliced for queries and
values: it is restored in each call, which costs less than expanding a whole cache with it. (vLLM restores it once and
keeps the copy; here a model holds only its weights.) Knows nothing of attention or caches.

Shapes: B batch, Q heads, T new tokens, N no-rotary and D value width, R latent, K rank of a factored matrix (otherwise
R), O = Q·(N + D).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lib.models.decoding import latent_products
from lib.models.structure.replacements.factored import FactoredLinear
from lib.models.structure.replacements.quantized import QuantizedLinear
from lib.models.structure.replacements.sparse import is_dense


@dataclass(frozen=True)
class Expansion:
    """The matrix for one call: its rows for queries and for values, by head, and the inner factor [K, R] or None."""

    up_QNK: torch.Tensor
    down_QDK: torch.Tensor
    inner_KR: torch.Tensor | None = None

    def into(self, query_BQTN: torch.Tensor) -> torch.Tensor:
        """Return the queries in latent space, [B, Q, T, R]."""
        query_BQTK = latent_products.into(query_BQTN, self.up_QNK)
        return query_BQTK if self.inner_KR is None else query_BQTK @ self.inner_KR

    def out_of(self, latent_BQTR: torch.Tensor) -> torch.Tensor:
        """Return weighted sums of latents expanded to the values of each head, [B, Q, T, D]."""
        inner = self.inner_KR
        latent_BQTK = latent_BQTR if inner is None else nn.functional.linear(latent_BQTR, inner)
        return latent_products.out_of(latent_BQTK, self.down_QDK)


def of(projection: Any, heads: int, nope: int, dtype: torch.dtype) -> Expansion:
    """Return the expansion of `projection`, a linear layer from R inputs to N (= `nope`) + D outputs per head."""
    factors = isinstance(projection, FactoredLinear)
    inner = _restored(projection.inner, dtype) if factors else None
    outer = _restored(projection.outer if factors else projection, dtype)
    outer_QEK = outer.unflatten(0, (heads, -1))
    return Expansion(outer_QEK[:, :nope], outer_QEK[:, nope:], inner)


def _restored(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of a linear layer as a dense matrix, uncopied if it is stored dense."""
    if isinstance(linear, QuantizedLinear):
        return linear.restored().to(dtype)
    return linear.weight if is_dense(linear.weight) else linear.weight.to_dense().to(dtype)


def elements_per_token(projection: Any, latent: int, width: int) -> float:
    """Return the number of multiplications that expand one latent of size `latent` for one head of N + D = `width`.

    Those of an inner factor are divided among all heads, which share it.
    """
    if not isinstance(projection, FactoredLinear):
        return latent * width
    return projection.rank * (width + latent * width / projection.out_features)
