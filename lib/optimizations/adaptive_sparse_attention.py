"""Adaptive sparse attention: a prompt attends to the blocks that hold the mass, a new token to the pages that matter.

- Prefill: block-sparse, found per input and per head from anti-diagonal scores, the fewest blocks that reach τ
  (Xu et al. 2025, XAttention); `lib.models.block_attention`.
- Decode: the best pages of the cache by the bounds of their keys (Tang et al. 2024, Quest); `lib.models.pages`. Latent
  attention is decoded in the latent space, so that only chosen pages are read and the cache is not expanded again.

Both are one attention function, registered by name together with its mask function: a name without a mask function gets
no mask at all. Left-padded sequences are computed one by one without their padding. What the pattern cannot serve goes
through full attention: short prompts, pieces of a prompt that do not begin at a block's edge, masks that are not causal
(the vision tower calls the same function), padding in the middle. `apply` shares every weight with the caller's model
and leaves it as it is; `revert` gives the stock attention back. Knows nothing of measuring.

Shapes: B batch, H query heads, G key-value heads, T query tokens, K key tokens, D and V head sizes, N and M blocks.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from lib.errors import UserError
from lib.models import block_attention as blocks
from lib.models import pages as paged
from lib.models.anatomy import anatomy
from lib.models.heads import sharing

NAME = "adaptive_sparse"

KNOBS = {
    "tau": {"type": "float", "range": (0.05, 1.0), "default": 0.9, "help": "share of estimated mass to keep"},
    "block_size": {"type": "int", "range": (16, 512), "default": 128, "help": "tokens of a block"},
    "stride": {"type": "int", "range": (2, 64), "default": 16, "help": "side of the squares that are scored"},
    "max_density": {"type": "float", "range": (0.05, 1.0), "default": 1.0, "help": "most blocks a row may keep"},
    "pages": {"type": "int", "range": (0, 4096), "default": 64, "help": "pages a new token reads; 0: all"},
    "page_size": {"type": "int", "range": (4, 64), "default": 16, "help": "tokens of a page"},
    "pattern": {"type": "categorical", "choices": blocks.PATTERNS, "default": "antidiagonal"},
}


@dataclass
class Sparsity:
    """The knobs of one attention module, and what it kept: blocks of prompts, pages and tokens of decoded tokens.

    `watch`, where given, is called while decoding with (index, exact share of mass [B, H] that the pages read hold).
    """

    index: int
    tau: float
    block_size: int
    stride: int
    max_density: float
    pages: int
    page_size: int
    pattern: str
    seed: int
    kept: int = 0
    causal: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    watch: Callable | None = None


def applies_to(model: nn.Module) -> str | None:
    """Return None, or why not: a decoder whose blocks attend to a sliding window is sparse already."""
    kinds = getattr(anatomy(model).config, "layer_types", None) or []
    return "its blocks attend to a sliding window already" if "sliding_attention" in kinds else None


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]] = (),
    *,
    tau: float = 0.9,
    block_size: int = 128,
    stride: int = 16,
    max_density: float = 1.0,
    pages: int = 64,
    page_size: int = 16,
    pattern: str = "antidiagonal",
    seed: int = 0,
) -> nn.Module:
    """Return a model with the same weights (shared, not copied) that attends sparsely.

    The pattern is found from each input, so `calibration` is not looked at. `pattern` other than "antidiagonal" are
    controls with as many blocks in every row, chosen otherwise. Raises UserError for a knob out of range.
    """
    check(tau, block_size, stride, max_density, pages, page_size, pattern)
    if reason := applies_to(model):
        raise UserError(f"adaptive_sparse_attention: {reason}")
    sparse = sharing(revert(model) if is_sparse(model) else model)
    view = anatomy(sparse)
    knobs = (tau, block_size, stride, max_density, pages, page_size, pattern, seed)
    for block in view.blocks:
        module = block.attention.module
        module.sparsity = Sparsity(block.index, *knobs)
        if block.attention.kind == "latent" and isinstance(module.kv_b_proj, nn.Linear):
            module.expand_kv = types.MethodType(_expand_or_not, module)
    view.decoder.stock_attention = view.config._attn_implementation
    view.decoder.sparse_hook = view.decoder.register_forward_pre_hook(_page_the_cache, with_kwargs=True)
    sparse.set_attn_implementation(NAME)
    return sparse


def revert(model: nn.Module) -> nn.Module:
    """Return a model with the same weights (shared) and the attention that it had before."""
    stock = sharing(model)
    view = anatomy(stock)
    for block in view.blocks:
        for name in ("sparsity", "expand_kv"):
            block.attention.module.__dict__.pop(name, None)
    if hook := view.decoder.__dict__.pop("sparse_hook", None):
        view.decoder._forward_pre_hooks.pop(hook.id, None)
        view.decoder._forward_pre_hooks_with_kwargs.pop(hook.id, None)
    if before := view.decoder.__dict__.pop("stock_attention", None):
        stock.set_attn_implementation(before)
    return stock


def is_sparse(model: nn.Module) -> bool:
    """Whether `apply` made this model."""
    return any(hasattr(block.attention.module, "sparsity") for block in anatomy(model).blocks)


def check(tau, block_size, stride, max_density, pages, page_size, pattern) -> None:
    """Raise UserError, one line, for the first knob that cannot be."""
    told = "adaptive_sparse_attention: "
    for name, value in (("tau", tau), ("max_density", max_density)):
        if not 0 < value <= 1:
            raise UserError(f"{told}{name} {value} is out of range; expected 0 < {name} <= 1")
    for name, value in (("block_size", block_size), ("stride", stride), ("page_size", page_size)):
        low, high = KNOBS[name]["range"]
        if not low <= value <= high:
            raise UserError(f"{told}{name} {value} is out of range; expected {low} to {high}")
    if block_size % stride:
        raise UserError(
            f"{told}stride {stride} does not divide block_size {block_size}; choose a multiple of the stride, "
            f"for example {max(1, round(block_size / stride)) * stride}"
        )
    if pages < 0:
        raise UserError(f"{told}pages {pages} is out of range; expected 0 (all pages) or more")
    if pattern not in blocks.PATTERNS:
        raise UserError(f'{told}pattern "{pattern}"; expected one of {", ".join(blocks.PATTERNS)}')


def check_context(model: nn.Module | object, tokens: int) -> None:
    """Raise UserError where `tokens` of context are more than the model, or its configuration, allows."""
    config = anatomy(model).config if isinstance(model, nn.Module) else model
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokens > longest:
        raise UserError(
            f"adaptive_sparse_attention: a context of {tokens} tokens is longer than this model allows; "
            f"expected at most {longest} (max_position_embeddings)"
        )


def sparsities(model: nn.Module) -> list[Sparsity]:
    """Return the state of every block's attention of a sparse model, in order."""
    return [block.attention.module.sparsity for block in anatomy(model).blocks]


def density(model: nn.Module) -> dict[str, float | None]:
    """Return the shares since `forget`: blocks of prompts kept, cached tokens read by decoding; None where none ran."""
    seen = sparsities(model)
    causal, cached = sum(one.causal for one in seen), sum(one.cached_tokens for one in seen)
    return {
        "blocks": sum(one.kept for one in seen) / causal if causal else None,
        "tokens": sum(one.read_tokens for one in seen) / cached if cached else None,
    }


def forget(model: nn.Module) -> None:
    """Set the counts of a sparse model to zero."""
    for one in sparsities(model):
        one.kept = one.causal = one.read_tokens = one.cached_tokens = 0


# --- the registered functions ----------------------------------------------------------------------------------------


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
    """Return what the attention function needs to know: None for plain causal, bool [B, K] of real tokens where the
    padding is on the left or on the right, else the stock mask [B, 1, T, K].

    Raises UserError for a context longer than the model allows.
    """
    check_context(config, kv_length + kv_offset)
    real_BK = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    plain = mask_function is causal_mask_function and kv_offset == 0 and q_offset + q_length == kv_length
    if plain and (real_BK is None or bool(real_BK.all())):
        return None
    if plain and _one_sided(real_BK, q_length == kv_length):
        return real_BK
    options = {"mask_function": mask_function, "attention_mask": attention_mask} | kwargs
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options | {"allow_is_causal_skip": False})


def _one_sided(real_BK: torch.Tensor, right_too: bool) -> bool:
    """Whether every sequence is padded on the left alone, or (where `right_too`) on the right alone."""
    step_BK = real_BK[:, 1:].int() - real_BK[:, :-1].int()
    left_B, right_B = (step_BK >= 0).all(1) & real_BK[:, -1], (step_BK <= 0).all(1) & real_BK[:, 0]
    return bool((left_B | right_B if right_too else left_B).all())


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers: query [B, H, T, D], key [B, G, K, D], value [B, G, K, V] → [B, T, H, V]."""
    state: Sparsity | None = getattr(module, "sparsity", None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = getattr(key, "pages", lambda: None)()
    square = attention_mask is not None and attention_mask.dim() == 4
    if layer is not None and layer.latent:
        pages = 0 if square else state.pages
        padding = {"square": attention_mask} if square else {"start_B": _start(attention_mask)}
        weight_HEL = module.kv_b_proj.weight.view(query.shape[1], -1, layer.keys.shape[-1])
        _count_read(state, layer, query, scaling, weight_HEL)
        return paged.decode_latent(query[:, :, 0], layer, scaling, pages, weight_HEL, **padding)[:, None], None
    if state is None or not causal or square or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs)
    if query.shape[2] == 1 and layer is not None:
        _count_read(state, layer, query, scaling)
        if state.pages and layer.full_pages > state.pages:
            return paged.decode(query[:, :, 0], layer, scaling, state.pages, _start(attention_mask))[:, None], None
    elif query.shape[2] > 1:
        starts = [0] * len(query) if attention_mask is None else _start(attention_mask).tolist()
        if _fits(state, query.shape[2], key.shape[2], starts):
            return _sparse(state, query, key, value, scaling, starts).transpose(1, 2).contiguous(), None
    square = _square(attention_mask, query.shape[2], key.shape[2], query.device)
    return sdpa_attention_forward(module, query, key, value, square, dropout, scaling, causal, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def _fits(state: Sparsity, tokens: int, length: int, starts: list[int]) -> bool:
    """Whether a pattern can serve these queries, from a block's edge on, and leave out any: more than two blocks."""
    aligned = all(max(0, length - tokens - start) % state.block_size == 0 for start in starts)
    return aligned and length - min(starts) > 2 * state.block_size


def _sparse(state: Sparsity, query, key, value, scaling: float, starts: list[int]) -> torch.Tensor:
    """Return sparse attention [B, H, T, V], sequence by sequence, without the padding before `starts`."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    before = key.shape[2] - query.shape[2]
    for row, start in enumerate(starts):
        skip = max(0, start - before)
        parts = query[row, :, skip:], key[row, :, start:], value[row, :, start:]
        kept_HNM = pattern(state, *parts[:2], scaling)
        out[row, :, skip:] = blocks.attend(*parts, kept_HNM, scaling, state.block_size)
    return out


def pattern(state: Sparsity, query_HTD: torch.Tensor, key_GKD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the kept blocks [H, N, M] of one sequence, and count them."""
    size = state.block_size
    kept_HNM = blocks.choose(
        blocks.scores(query_HTD, key_GKD, scaling, size, state.stride), state.tau, state.max_density
    )
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
        state.watch(state.index, paged.mass_read(query[:, :, 0], layer, scaling, state.pages, weight_HEL))


def _start(real_BK: torch.Tensor | None) -> torch.Tensor | None:
    """Return the first real token of each sequence [B], or None where nothing is padded."""
    return None if real_BK is None else real_BK.int().argmax(1)


def _square(real_BK: torch.Tensor | None, tokens: int, length: int, device) -> torch.Tensor | None:
    """Return the full mask [B, 1, T, K] that `mask` stands for; None where stock attention knows it by itself."""
    if real_BK is None and (tokens == length or tokens == 1):
        return None
    causal_TK = torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)
    return causal_TK[None, None] if real_BK is None else causal_TK & real_BK[:, None, None, :]


# --- the cache, and sharing weights ----------------------------------------------------------------------------------


def _page_the_cache(decoder: nn.Module, args: tuple, kwargs: dict):
    """Before the decoder runs: give it a cache in pages where it would make one, or was given an empty stock one."""
    name = "past_key_values" if kwargs.get("past_key_values") is not None else "cache"
    cache, wanted = kwargs.get(name), kwargs.get("use_cache")
    view_blocks = decoder.layers
    if wanted is False or (wanted is None and not getattr(decoder.config, "use_cache", True)):
        return None
    if cache is None:
        kwargs[name] = cache = DynamicCache(config=decoder.config)
    stock = isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if stock and cache.get_seq_length() == 0 and isinstance(cache, DynamicCache):
        cache.layers[:] = [_paged_layer(block.self_attn) for block in view_blocks]
    return args, kwargs


def _paged_layer(module: nn.Module) -> paged.PagedLayer:
    return paged.PagedLayer(module.sparsity.page_size, latent="expand_kv" in module.__dict__)


def _expand_or_not(module: nn.Module, latent_B1KL: torch.Tensor, rope_B1KE: torch.Tensor):
    """In place of `expand_kv`: one new token over a cache in pages keeps the latents as they are; else all expand."""
    layer = getattr(latent_B1KL, "pages", lambda: None)()
    if layer is not None and layer.added == 1 and layer.get_seq_length() > 1:
        return latent_B1KL, rope_B1KE
    return type(module).expand_kv(module, latent_B1KL, rope_B1KE)
