"""A key-value cache in pages with the bounds of every page, and attention of one new token to the best pages (Quest).

Keys and values lie in buffers with room to grow: a new token is written in place, whereas the stock cache copies all it
holds. Every full page also stores its largest and smallest key, channel by channel: Σ max(q·max, q·min) bounds every
score of the page from above (Tang et al. 2024, Quest, section 3). Full pages never change, so the bounds are computed
once. The last page, full or not, is not ranked but always read: it holds the new token's key.

Query heads that share keys also share pages: a page is ranked by its highest score among these heads, relative to each
head's best page. For latent attention a page holds latents and rotary keys, shared by all heads.

Shapes: B batch, G key-value heads, R query heads of each, D and V sizes, C tokens cached, P full pages before the
last one, N chosen pages.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from lib.models.decoding import latent_products

ROOM_TOKENS = 256  # least free room after the tokens when a buffer grows
SHRUNK = 2.0**-8  # factor on float16 queries, whose products with the bounds of a page would overflow
Rank = Callable[[torch.Tensor, "PagedLayer"], torch.Tensor]  # queries and cache → scores of the full pages


class PagedLayer(DynamicLayer):
    """One layer of a transformers cache whose tensors can be read page by page.

    `latent`: bounds cover keys and values together (the latents and rotary keys of latent attention). `added` is the
    number of tokens added by the last update.
    """

    def __init__(self, page_size: int, latent: bool = False):
        super().__init__()
        self.page_size, self.latent = page_size, latent
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.added = 0
        self._bounds_BGPE: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append keys and values [B, G, new tokens, ·]; return all of them, as views with a reference to this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        buffers = self.buffers if self._holds(old) else None
        if buffers is None or new > buffers[0].shape[-2]:
            buffers = self._grow(key_states, value_states, old, new)
        for buffer, states in zip(buffers, (key_states, value_states)):
            buffer[..., old:new, :] = states
        keys, values = (self._view(buffer, new) for buffer in buffers)
        self.keys, self.values = keys, values
        self.added = new - old
        if self._bounds_BGPE is not None:
            self._bounds_BGPE = self._bounds_BGPE[:, :, : old // self.page_size]  # after a crop, pages are refilled
        return keys, values

    def cached(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, as views. Raises AssertionError before the first update."""
        assert self.keys is not None and self.values is not None, "nothing is cached yet"
        return self.keys, self.values

    def _view(self, buffer: torch.Tensor, length: int) -> torch.Tensor:
        """Return the first `length` tokens of a buffer, with a reference to this layer."""
        view: Any = buffer[..., :length, :]  # Any: the reference is an attribute that tensors do not have
        view.pages = weakref.ref(self)
        return view

    def _holds(self, length: int) -> bool:
        """Return whether the buffers still back the cached tensors: beam search replaces them."""
        if self.buffers is None or length == 0:
            return False
        keys, buffer = self.cached()[0], self.buffers[0]
        backed = keys.data_ptr() == buffer.data_ptr() and keys.stride() == buffer.stride()
        return backed and keys.shape[:2] == buffer.shape[:2]

    def _grow(
        self, key_states: torch.Tensor, value_states: torch.Tensor, old: int, new: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new buffers with room for more than `new` tokens, filled with the `old` tokens."""
        if not self._holds(old):
            self._bounds_BGPE = None
        room = new + max(ROOM_TOKENS, new // 8)
        room += -room % self.page_size
        grown = []
        for index, states in enumerate((key_states, value_states)):
            buffer = states.new_zeros(*states.shape[:2], room, states.shape[-1])
            if old:
                buffer[..., :old, :] = self.cached()[index]
            grown.append(buffer)
        self.buffers = (grown[0], grown[1])
        return self.buffers

    @property
    def full_pages(self) -> int:
        """The number of pages before the last one, which is always read, full or not: it holds the newest token."""
        return max(0, self.get_seq_length() - 1) // self.page_size

    def bounds(self) -> torch.Tensor:
        """Return [B, G, P, 2·D]: the largest, then the smallest key of every full page, channel by channel."""
        bounds_BGPE, pages = self._bounds_BGPE, self.full_pages
        known = 0 if bounds_BGPE is None else bounds_BGPE.shape[2]
        if bounds_BGPE is None or known < pages:
            place = slice(known * self.page_size, pages * self.page_size)
            parts = [part[..., place, :] for part in (self.cached() if self.latent else self.cached()[:1])]
            paged = torch.cat(parts, dim=-1).unflatten(2, (pages - known, self.page_size))
            new_BGPE = torch.cat([paged.amax(3), paged.amin(3)], dim=-1)
            bounds_BGPE = new_BGPE if bounds_BGPE is None or known == 0 else torch.cat([bounds_BGPE, new_BGPE], dim=2)
            self._bounds_BGPE = bounds_BGPE
        return bounds_BGPE

    def gather(self, page_BGN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the chosen pages and the last page: [B, G, N·page + rest, ·]."""
        batch, groups, chosen = page_BGN.shape
        edge, gathered = self.full_pages * self.page_size, []
        assert self.buffers is not None, "nothing is cached yet"
        for buffer, states in zip(self.buffers, self.cached()):
            pages = buffer.shape[2] // self.page_size
            first_BG1 = torch.arange(batch * groups, device=buffer.device).view(batch, groups, 1) * pages
            row_X = (page_BGN + first_BG1).flatten()
            picked = buffer.view(batch * groups * pages, -1).index_select(0, row_X)
            picked = picked.view(batch, groups, chosen * self.page_size, -1)
            gathered.append(torch.cat([picked, states[:, :, edge:]], dim=2))
        return gathered[0], gathered[1]


def page_scores(query_BGRD: torch.Tensor, bounds_BGPE: torch.Tensor) -> torch.Tensor:
    """Return an upper bound on the scores in every page, [B, G, R, P]."""
    both_BGRE = torch.cat([query_BGRD.clamp_min(0), query_BGRD.clamp_max(0)], dim=-1)
    return latent_products.scores(both_BGRE.flatten(0, 1), bounds_BGPE.flatten(0, 1)).unflatten(
        0, bounds_BGPE.shape[:2]
    )


def by_bounds(query_BGRD: torch.Tensor, layer: PagedLayer) -> torch.Tensor:
    """Return the score of every full page, [B, G, R, P], from the bounds of its keys.

    In float16 all are scaled by SHRUNK, since a bound may overflow where no score does.
    """
    shrunk = query_BGRD * SHRUNK if query_BGRD.dtype == torch.float16 else query_BGRD
    return page_scores(shrunk, layer.bounds())


def best_pages(
    query_BGRD, layer: PagedLayer, pages: int, start_B: torch.Tensor | None = None, rank: Rank = by_bounds
) -> torch.Tensor:
    """Return the indices of the `pages` best full pages by `rank`, ascending, [B, G, N]; the first page with real
    tokens is always among them.

    `start_B` is the first real token of each sequence if sequences are padded on the left.
    """
    score_BGRP = rank(query_BGRD, layer).float()
    first_B = torch.zeros(len(score_BGRP), dtype=torch.long, device=score_BGRP.device)
    if start_B is not None:
        first_B = (start_B // layer.page_size).clamp_max(layer.full_pages - 1)
        page_P = torch.arange(layer.full_pages, device=score_BGRP.device)
        score_BGRP = score_BGRP.masked_fill((page_P < first_B[:, None])[:, None, None], float("-inf"))
    score_BGP = (score_BGRP - score_BGRP.amax(-1, keepdim=True)).amax(2)
    score_BGP.scatter_(2, first_B.view(-1, 1, 1).expand(-1, score_BGP.shape[1], 1), float("inf"))
    return score_BGP.topk(pages, dim=-1).indices.sort(-1).values


def real_tokens(page_BGN: torch.Tensor, layer: PagedLayer, start_B: torch.Tensor | None) -> torch.Tensor | None:
    """Return bool [B, G, 1, gathered tokens]: which tokens are not padding; None if nothing is padded."""
    if start_B is None:
        return None
    size, length = layer.page_size, layer.get_seq_length()
    place_BGX = (page_BGN[..., None] * size + torch.arange(size, device=page_BGN.device)).flatten(2)
    rest_X = torch.arange(layer.full_pages * size, length, device=page_BGN.device)
    place_BGX = torch.cat([place_BGX, rest_X.expand(*place_BGX.shape[:2], -1)], dim=2)
    return (place_BGX >= start_B.view(-1, 1, 1))[:, :, None]


def decode(
    query_BHD,
    layer: PagedLayer,
    scaling: float,
    pages: int,
    start_B: torch.Tensor | None = None,
    rank: Rank = by_bounds,
) -> torch.Tensor:
    """Return attention [B, H, V] of one new token to the best `pages` pages and the last page.

    If `pages` is 0 or there are no more than that, the token attends to all, by the same kernel. Query heads that share
    keys are rows of one product.
    """
    groups = layer.cached()[0].shape[1]
    query_BGRD = query_BHD.unflatten(1, (groups, -1))
    if pages and layer.full_pages > pages:
        page_BGN = best_pages(query_BGRD, layer, pages, start_B, rank)
        key_BGXD, value_BGXV = layer.gather(page_BGN)
        mask = real_tokens(page_BGN, layer, start_B)
    else:
        key_BGXD, value_BGXV = layer.cached()
        place_X = torch.arange(key_BGXD.shape[2], device=key_BGXD.device)
        mask = None if start_B is None else place_X >= start_B.view(-1, 1, 1, 1)
    return scaled_dot_product_attention(query_BGRD, key_BGXD, value_BGXV, attn_mask=mask, scale=scaling).flatten(1, 2)


def decode_latent(
    query_BHD,
    layer: PagedLayer,
    scaling: float,
    pages: int,
    weight_HEL: torch.Tensor,
    start_B: torch.Tensor | None = None,
    square: torch.Tensor | None = None,
    rank: Rank = by_bounds,
) -> torch.Tensor:
    """Return attention [B, H, V] of one new token over latents: only the chosen pages are read, and none is expanded.

    `weight_HEL` would expand latents (L) to keys and values of each head (E = D_nope + V); instead it is multiplied
    into the query and into the result (absorbed, exact up to rounding). `layer` caches latents [B, 1, C, L] as keys and
    rotary keys [B, 1, C, ·] as values. If `pages` is 0 (all), `square` may be any mask [B, 1, 1, C].
    """
    latent_B1CL, rope_B1CE = layer.cached()
    latent_width, rope_width = latent_B1CL.shape[-1], rope_B1CE.shape[-1]
    nope = query_BHD.shape[-1] - rope_width
    up_HDL, down_HVL = weight_HEL[:, :nope], weight_HEL[:, nope:]
    query_BHL = latent_products.into(query_BHD[..., None, :nope], up_HDL)[:, :, 0]
    query_B1HL = torch.cat([query_BHL, query_BHD[..., nope:]], dim=-1)[:, None]
    if pages and layer.full_pages > pages:
        page_B1N = best_pages(query_B1HL, layer, pages, start_B, rank)
        latent_B1XL, rope_B1XE = layer.gather(page_B1N)
        mask = real_tokens(page_B1N, layer, start_B)
    else:
        latent_B1XL, rope_B1XE, mask = latent_B1CL, rope_B1CE, square
        if start_B is not None:
            place_X = torch.arange(latent_B1XL.shape[2], device=start_B.device)
            mask = place_X >= start_B.view(-1, 1, 1, 1)
    logits_BHX = latent_products.scores(query_B1HL[:, 0, :, :latent_width], latent_B1XL[:, 0])
    logits_BHX = logits_BHX + latent_products.scores(query_B1HL[:, 0, :, latent_width:], rope_B1XE[:, 0])
    logits_B1HX = logits_BHX[:, None].float() * scaling
    if mask is not None:
        logits_B1HX = logits_B1HX.masked_fill(~mask, float("-inf"))
    share_BHX = logits_B1HX[:, 0].softmax(-1).to(latent_B1XL.dtype)
    mixed_BHL = torch.bmm(share_BHX, latent_B1XL[:, 0])
    return latent_products.out_of(mixed_BHL[:, :, None], down_HVL)[:, :, 0]


def mass_read(
    query_BHD, layer: PagedLayer, scaling: float, pages: int, weight_HEL=None, rank: Rank = by_bounds
) -> torch.Tensor:
    """Return the exact share of attention mass [B, H] in the chosen pages and the last page.

    Computed from full probabilities over the whole cache, in single precision and without padding. `weight_HEL`: see
    `decode_latent`.
    """
    key_BGCD, value_BGCV = layer.cached()
    groups = key_BGCD.shape[1]
    if weight_HEL is not None:
        nope = query_BHD.shape[-1] - value_BGCV.shape[-1]
        latent_BHL = torch.einsum("bhd,hdl->bhl", query_BHD[..., :nope], weight_HEL[:, :nope])
        query_BHD = torch.cat([latent_BHL, query_BHD[..., nope:]], dim=-1)
        key_BGCD = torch.cat([key_BGCD, value_BGCV], dim=-1)
    query_BGRD = query_BHD.unflatten(1, (groups, -1))
    share_BGRC = ((query_BGRD.float() @ key_BGCD.float().transpose(-1, -2)) * scaling).softmax(-1)
    if not pages or layer.full_pages <= pages:
        return torch.ones_like(query_BHD[..., 0], dtype=torch.float32)
    page_BGN = best_pages(query_BGRD, layer, pages, rank=rank)
    edge = layer.full_pages * layer.page_size
    share_BGRP = share_BGRC[..., :edge].unflatten(-1, (layer.full_pages, layer.page_size)).sum(-1)
    chosen_BGR = share_BGRP.gather(-1, page_BGN[:, :, None].expand(-1, -1, share_BGRP.shape[2], -1)).sum(-1)
    return (chosen_BGR + share_BGRC[..., edge:].sum(-1)).flatten(1)
