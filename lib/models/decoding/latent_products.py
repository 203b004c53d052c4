"""The three products of attention over latents, computed without copying a cache or a weight.

Written as `a @ b.transpose(-1, -2)`, each copies its second operand on a CPU in half precision: matmul folds a batch of
one into a plain product, and batched products repack a transposed right side in every call. Measured on one core,
bfloat16, 8,192 latents of 512 numbers, 20 heads: scores 7.4 ms against 0.5 ms here, back from the latents 2.4 ms
against 0.35 ms. `scores` works for any keys shared by all rows. Knows nothing of caches, masks or pages.

Shapes: B batch, Q heads, T new tokens, X rows (heads × new tokens), S cached tokens, R latent, N key and D value width.
"""

import torch


def into(query_BQTN: torch.Tensor, up_QNR: torch.Tensor) -> torch.Tensor:
    """Return the queries in latent space, [B, Q, T, R]."""
    batch, heads, new, _ = query_BQTN.shape
    rows_QXN = query_BQTN.transpose(0, 1).reshape(heads, batch * new, -1)
    return torch.bmm(rows_QXN, up_QNR).view(heads, batch, new, -1).transpose(0, 1)


def out_of(latent_BQTR: torch.Tensor, down_QDR: torch.Tensor) -> torch.Tensor:
    """Return weighted sums of latents expanded to the values of each head, [B, Q, T, D]."""
    batch, heads, new, _ = latent_BQTR.shape
    columns_QRX = latent_BQTR.permute(1, 3, 0, 2).reshape(heads, -1, batch * new)
    return torch.bmm(down_QDR, columns_QRX).view(heads, -1, batch, new).permute(2, 0, 3, 1)


def scores(rows_BXR: torch.Tensor, keys_BSR: torch.Tensor) -> torch.Tensor:
    """Return the products of all rows with all keys, [B, X, S]. Heads share the keys, so each head adds rows."""
    return torch.bmm(rows_BXR, keys_BSR.transpose(1, 2))
