"""Controls for the pages that a new token reads: the same number of pages, not chosen by the bounds of their keys.

- recent: the first page and the latest (StreamingLLM, Xiao et al. 2024);
- random: the first page and others at random;
- observed: the pages to which the prompt's last queries attended most, the same for every new token, and all pages
  after the prompt (SnapKV, Li et al. 2024).

Shapes: B batch, H query heads, G key-value heads, R query heads of each, T query tokens, K key tokens, D head size, P
full pages before the last one.
"""

import torch
from torch.nn.functional import pad

from lib.optimizations.adaptive_sparse_attention.paged_cache import PagedLayer, Rank, by_bounds

PAGE_CHOICES = ("bounds", "recent", "random", "observed")
OBSERVED_QUERIES = 32  # at the end of a prompt


def rank_of(choice: str, seed: int = 0, observed_BGK: torch.Tensor | None = None) -> Rank:
    """Return the ranking function for one of PAGE_CHOICES; `observed_BGK`: see `observe`."""
    if choice == "bounds":
        return by_bounds
    if choice == "recent":
        return lambda _query, layer: _places(layer)
    if choice == "random":
        return lambda _query, layer: _at_random(layer, seed)
    return lambda _query, layer: _observed(layer, observed_BGK)


def observe(query_BHTD: torch.Tensor, key_BGKD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the mean attention mass [B, G, K] from the last queries of a prompt to every key, the maximum over the
    query heads of each key-value head.
    """
    query_BHTD, groups = query_BHTD[:, :, -OBSERVED_QUERIES:], key_BGKD.shape[1]
    tokens, length = query_BHTD.shape[2], key_BGKD.shape[2]
    query_BGRTD = query_BHTD.unflatten(1, (groups, -1))
    logits_BGRTK = (query_BGRTD @ key_BGKD[:, :, None].transpose(-1, -2)).float() * scaling
    later_TK = torch.ones(tokens, length, dtype=torch.bool, device=key_BGKD.device).triu(length - tokens + 1)
    return logits_BGRTK.masked_fill(later_TK, float("-inf")).softmax(-1).mean(3).amax(2)


def _places(layer: PagedLayer) -> torch.Tensor:
    batch, groups = layer.cached()[0].shape[:2]
    place_P = torch.arange(layer.full_pages, device=layer.cached()[0].device)
    return place_P.expand(batch, groups, 1, -1).float()


def _at_random(layer: PagedLayer, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.get_seq_length())
    draw_BG1P = torch.rand(_places(layer).shape, generator=generator)
    return draw_BG1P.to(layer.cached()[0].device)


def _observed(layer: PagedLayer, observed_BGK: torch.Tensor | None) -> torch.Tensor:
    assert observed_BGK is not None, "no prompt was observed"
    batch, groups = layer.cached()[0].shape[:2]
    if observed_BGK.shape[1] != groups:  # latents are shared by all heads
        observed_BGK = observed_BGK.amax(1, keepdim=True)
    length = layer.full_pages * layer.page_size
    behind = max(0, length - observed_BGK.shape[2])
    held_BGK = pad(observed_BGK[..., :length], (0, behind), value=1.0)  # pages after the prompt rank highest
    return held_BGK.unflatten(-1, (layer.full_pages, layer.page_size)).sum(-1)[:, :, None].expand(batch, -1, -1, -1)
