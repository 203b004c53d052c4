"""The attention function that a pattern of blocks or pages makes sparse, and its mask function, registered by name
with transformers.

A name without a mask function gets no mask at all, so both are registered. Left-padded sequences are computed one by
one without their padding. Full attention handles what a pattern cannot: short prompts, parts of a prompt that do not
start at a block edge, masks that are not causal (the vision tower calls the same function), padding in the middle, and
modules without a `Sparsity`.

Shapes: B batch, H query heads, G key-value heads, T query tokens, K key tokens, D and V head sizes, N and M blocks,
E expanded size of a head, L latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from lib.errors import NotApplicable
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention import page_controls
from lib.optimizations.adaptive_sparse_attention import paged_cache as paged

NAME = "adaptive_sparse"


@dataclass
class Sparsity:
    """The knobs of one attention module, and its counts: prompt blocks kept and causal, cached tokens read and held.

    `observed_BGK` holds what the end of the last prompt attended to, if `page_choice` needs it
    (`page_controls.observe`). `watch`, if set, is called while decoding with the block's index and the exact share of
    mass [B, H] in the pages read, or in the best `watched_pages` pages if that is set, even if more are read.
    """

    index: int
    tau: float
    block_size: int
    stride: int
    max_density: float
    full_last: int
    pages: int
    page_size: int
    page_choice: str
    pattern: str
    seed: int
    kept: float = 0.0
    causal: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    observed_BGK: torch.Tensor | None = None
    watch: Callable[[int, torch.Tensor], object] | None = None
    watched_pages: int = 0


def check_context(model: nn.Module | object, tokens: int, behind: int = 0) -> None:
    """Raise NotApplicable if a context of `tokens` tokens, followed by up to `behind` more, exceeds the positions of a
    model or configuration.
    """
    longest = most_positions(model)
    if longest and tokens + behind > longest:
        after = f", with {behind} more after it," if behind else ""
        limit = f"{longest - behind}, the model's {longest} minus these {behind}" if behind else longest
        raise NotApplicable(
            f"adaptive_sparse_attention: a context of {tokens} tokens{after} is longer than this model allows; "
            f"expected at most {limit} (max_position_embeddings)"
        )


def most_positions(model: nn.Module | object) -> int:
    """Return the longest context that a model or configuration allows; 0 if it states none."""
    config = anatomy(model).config if isinstance(model, nn.Module) else model
    return getattr(config, "max_position_embeddings", None) or 0


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    config: object = None,
    **kwargs,
) -> torch.Tensor | None:
    """Return the mask for `attention`: None for plain causal, bool [B, K] of real tokens for padding on the left or on
    the right only, else the stock mask [B, 1, T, K].

    Raises NotApplicable for a context longer than the model allows.
    """
    check_context(config, kv_length + kv_offset)
    real_BK = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    plain = mask_function is causal_mask_function and kv_offset == 0 and q_offset + q_length == kv_length
    if plain:
        if real_BK is None or bool(real_BK.all()):
            return None
        if _one_sided(real_BK, q_length == kv_length):
            return real_BK
    options = {"mask_function": mask_function, "attention_mask": attention_mask} | kwargs
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options | {"allow_is_causal_skip": False})


def _one_sided(real_BK: torch.Tensor, right_too: bool) -> bool:
    """Return whether each sequence is padded only on the left, or (if `right_too`) only on the right."""
    step_BK = real_BK[:, 1:].int() - real_BK[:, :-1].int()
    left_B, right_B = (step_BK >= 0).all(1) & real_BK[:, -1], (step_BK <= 0).all(1) & real_BK[:, 0]
    return bool((left_B | right_B if right_too else left_B).all())


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function: query [B, H, T, D], key [B, G, K, D], value [B, G, K, V] → [B, T, H, V]."""
    state: Sparsity | None = getattr(module, "sparsity", None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling  # the stock attention's own default
    layer: paged.PagedLayer | None = getattr(key, "pages", lambda: None)()
    square = attention_mask is not None and attention_mask.dim() == 4
    if layer is not None and layer.latent:
        assert state is not None, "only the attention of a sparse model makes paged caches"
        pages = 0 if square else state.pages
        padding: dict[str, Any] = {"square": attention_mask} if square else {"start_B": _start(attention_mask)}
        weight_HEL = module.kv_b_proj.weight.view(query.shape[1], -1, layer.cached()[0].shape[-1])
        if not square:  # with a square mask all pages are read and nothing is counted, as without latents
            _count_read(state, layer, query, scale, weight_HEL)
        padding["rank"] = _rank(state)
        return paged.decode_latent(query[:, :, 0], layer, scale, pages, weight_HEL, **padding)[:, None], None
    if state is None or not causal or square or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs)
    if query.shape[2] == 1 and layer is not None:
        _count_read(state, layer, query, scale)
        chosen: dict[str, Any] = {"start_B": _start(attention_mask), "rank": _rank(state)}
        return paged.decode(query[:, :, 0], layer, scale, state.pages, **chosen)[:, None], None
    if query.shape[2] > 1:
        if state.page_choice == "observed":
            state.observed_BGK = page_controls.observe(query, key, scale)
        spans = _spans(attention_mask, len(query), key.shape[2])
        if _fits(state, query.shape[2], key.shape[2], spans):
            return _sparse(state, query, key, value, scale, spans).transpose(1, 2).contiguous(), None
    full = _square(attention_mask, query.shape[2], key.shape[2], query.device)
    return sdpa_attention_forward(module, query, key, value, full, dropout, scaling, causal, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def _spans(real_BK: torch.Tensor | None, batch: int, length: int) -> list[tuple[int, int]]:
    """Return the (start, end) of the real tokens of each sequence."""
    if real_BK is None:
        return [(0, length)] * batch
    starts = real_BK.int().argmax(1).tolist()
    return [(start, start + count) for start, count in zip(starts, real_BK.sum(1).tolist())]


def _fits(state: Sparsity, tokens: int, length: int, spans: list[tuple[int, int]]) -> bool:
    """Return whether a pattern applies to these queries: they start at a block edge and see more than two blocks."""
    aligned = all(max(0, length - tokens - start) % state.block_size == 0 for start, _ in spans)
    return aligned and max(end - start for start, end in spans) > 2 * state.block_size


def _sparse(state: Sparsity, query, key, value, scaling: float, spans: list[tuple[int, int]]) -> torch.Tensor:
    """Return sparse attention [B, H, T, V], sequence by sequence, without the padding outside of `spans`.

    The last `full_last` real queries, the question, attend to everything: keys that only they look for weigh little in
    the mean of their block.
    """
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    before = key.shape[2] - query.shape[2]
    for row, (start, end) in enumerate(spans):
        first, last = max(0, start - before), end - before
        if last <= first:
            continue
        parts = query[row, :, first:last], key[row, :, start:end], value[row, :, start:end]
        kept_HNM = pattern(state, *parts[:2], scaling)
        out[row, :, first:last] = blocks.attend(*parts, kept_HNM, scaling, state.block_size)
        dense = min(state.full_last, last - first)
        if dense and _leaves_out(kept_HNM, blocks.blocks_of(dense, state.block_size) + 1):
            out[row, :, last - dense : last] = blocks.attend_all(parts[0][:, -dense:], *parts[1:], scaling)
            state.kept += _more_kept(kept_HNM, last - first, dense, state.block_size)
    return out


def _leaves_out(kept_HNM: torch.Tensor, rows: int) -> bool:
    """Return whether the last `rows` blocks of queries leave out a visible block."""
    causal_NM = blocks.causal_blocks(kept_HNM.shape[1], kept_HNM.shape[2], device=kept_HNM.device)
    return not bool(torch.equal(kept_HNM[:, -rows:], causal_NM[-rows:].expand_as(kept_HNM[:, -rows:])))


def _more_kept(kept_HNM: torch.Tensor, tokens: int, dense: int, size: int) -> float:
    """Return the number of extra blocks read because the last `dense` of `tokens` queries attend to everything."""
    causal_N = blocks.causal_blocks(*kept_HNM.shape[1:]).sum(1)
    more = 0.0
    for row in range(max(0, (tokens - dense) // size), kept_HNM.shape[1]):
        begin, end = row * size, min((row + 1) * size, tokens)
        share = (end - max(begin, tokens - dense)) / (end - begin)
        more += share * (len(kept_HNM) * int(causal_N[row]) - int(kept_HNM[:, row].sum()))
    return more


def _rank(state: Sparsity) -> paged.Rank:
    return page_controls.rank_of(state.page_choice, state.seed + state.index, state.observed_BGK)


def pattern(state: Sparsity, query_HTD: torch.Tensor, key_GKD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the kept blocks [H, N, M] of one sequence, and add them to the counts of `state`."""
    size = state.block_size
    share_HNM = blocks.scores(query_HTD, key_GKD, scaling, size, state.stride)
    kept_HNM = blocks.choose(share_HNM, state.tau, state.max_density)
    if state.pattern != "antidiagonal":
        mass = blocks.exact_mass(query_HTD, key_GKD, scaling, size) if state.pattern == "oracle" else None
        kept_HNM = blocks.same_budget(kept_HNM, state.pattern, mass, state.seed + state.index)
    rows, columns = kept_HNM.shape[1:]
    state.kept += int(kept_HNM.sum())
    state.causal += len(kept_HNM) * int(blocks.causal_blocks(rows, columns).sum())
    return kept_HNM


def _count_read(state: Sparsity, layer: paged.PagedLayer, query, scaling: float, weight_HEL=None) -> None:
    cached = layer.get_seq_length()
    left_out = max(0, layer.full_pages - state.pages) * layer.page_size if state.pages else 0
    state.read_tokens += cached - left_out
    state.cached_tokens += cached
    if state.watch is not None:
        pages = state.watched_pages or state.pages
        held_BH = paged.mass_read(query[:, :, 0], layer, scaling, pages, weight_HEL, _rank(state))
        state.watch(state.index, held_BH)


def _start(real_BK: torch.Tensor | None) -> torch.Tensor | None:
    """Return the index of the first real token of each sequence [B], or None without padding."""
    return None if real_BK is None else real_BK.int().argmax(1)


def _square(real_BK: torch.Tensor | None, tokens: int, length: int, device) -> torch.Tensor | None:
    """Return the full mask [B, 1, T, K] for the result of `mask`; None if stock attention needs none."""
    if real_BK is None and (tokens == length or tokens == 1):
        return None
    causal_TK = torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)
    return causal_TK[None, None] if real_BK is None else causal_TK & real_BK[:, None, None, :]


def page_the_cache(decoder: Any, args: tuple, kwargs: dict):
    """Forward pre-hook of the decoder: pass a paged cache where it would create a cache or got an empty stock one."""
    cache, use_cache = cache_names.pop_from(kwargs), kwargs.get("use_cache")
    kwargs |= cache_names.as_kwargs(cache)
    attentions = [block.self_attn for block in decoder.layers if not getattr(block.self_attn, "absent", False)]
    if use_cache is False or (use_cache is None and not getattr(decoder.config, "use_cache", True)):
        return None
    if cache is None:
        cache = DynamicCache(config=decoder.config)
        kwargs |= cache_names.as_kwargs(cache)
    stock = isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if stock and cache.get_seq_length() == 0 and isinstance(cache, DynamicCache):
        cache.layers[:] = [_paged_layer(module) for module in attentions]  # one per attention
    return args, kwargs


def _paged_layer(module: Any) -> paged.PagedLayer:
    return paged.PagedLayer(module.sparsity.page_size, latent="expand_kv" in module.__dict__)


def expand_or_not(module: Any, latent_B1KL: torch.Tensor, rope_B1KE: torch.Tensor):
    """Replacement of `expand_kv`: for one new token over a paged cache the latents stay as they are; otherwise, and if
    the expansion matrix is not stored dense, all are expanded.
    """
    layer = getattr(latent_B1KL, "pages", lambda: None)()
    dense = isinstance(module.kv_b_proj, nn.Linear)
    if dense and layer is not None and layer.added == 1 and layer.get_seq_length() > 1:
        return latent_B1KL, rope_B1KE
    return type(module).expand_kv(module, latent_B1KL, rope_B1KE)
