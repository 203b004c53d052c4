"""Adaptive sparse attention: prompts attend to the blocks that hold the attention mass, new tokens to the best pages.

- Prefill: block-sparse, with a pattern per input and head from anti-diagonal scores, the fewest blocks that reach τ
  (Xu et al. 2025, XAttention); `block_pattern`.
- Decode: the best pages of the cache by the bounds of their keys (Tang et al. 2024, Quest); `paged_cache`. Latent
  attention is decoded in the latent space, so that only the chosen pages are read and the cache is not expanded.

Both are one attention function, in `kernels`. `apply` shares every weight with the caller's model and does not change
it; `revert` restores the stock attention.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.decoding import mla_absorption
from lib.models.structure import beyond_files, slice_depth
from lib.models.structure.anatomy import anatomy
from lib.models.structure.sharing import sharing
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention.kernels import NAME, Sparsity, expand_or_not, page_the_cache
from lib.optimizations.adaptive_sparse_attention.page_controls import PAGE_CHOICES
from lib.optimizations.common.compression import options

WHERE, APPLYING = "adaptive_sparse_attention", f"{__name__}:apply"
SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "tau": {"type": "float", "range": (0.05, 1.0), "default": 0.9, "help": "share of estimated mass to keep"},
    "block_size": {"type": "int", "range": (16, 512), "default": 128, "levels": (32, 64, 128)},
    "stride": {"type": "int", "range": (2, 64), "default": 16, "levels": (8, 16)},  # side of the squares scored
    "max_density": {"type": "float", "range": (0.05, 1.0), "default": 1.0, "help": "most blocks a row may keep"},
    "full_last": {"type": "int", "range": (0, 4096), "default": 64, "levels": (0, 16, 64)},  # queries that read all
    "pages": {"type": "int", "range": (0, 4096), "default": 64, "levels": (0, 16, 64)},  # of a new token; 0: all
    "page_size": {"type": "int", "range": (4, 64), "default": 16, "levels": (8, 16)},
    "dense_blocks": {
        "type": "int",
        "range": (0, 64),
        "default": 2,
        "levels": (0, 2),
        "help": "first blocks, all pages",
    },
    "page_choice": {"type": "categorical", "choices": PAGE_CHOICES, "default": "bounds"},
    "pattern": {"type": "categorical", "choices": blocks.PATTERNS, "default": "antidiagonal"},
}

COMPOSES = {
    "touches": ("attention", "cache"),
    "needs": ("stock attention",),
    "invalidates": ("stock attention",),
    "mildest": {"tau": 1.0},
    "trial": {"block_size": 64},  # so that prompts of a few hundred tokens have blocks to leave out
}


def applies_to(model: nn.Module) -> str | None:
    """Return None if the method applies to `model`, else the reason why not.

    Blocks with a sliding window are sparse already, and the kernels here cannot cap or shift scores before the softmax,
    as Gemma 2 does (transformers has no sdpa for it).
    """
    if any(block.attention.window is not None for block in anatomy(model).blocks):
        return "its blocks attend to a sliding window already"
    plain = getattr(model, "_supports_sdpa", True)
    return None if plain else "its attention is not a plain softmax of scaled products (capped scores, Gemma 2)"


def apply(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]] = (),
    *,
    tau: float = 0.9,
    block_size: int = 128,
    stride: int = 16,
    max_density: float = 1.0,
    full_last: int = 64,
    pages: int = 64,
    page_size: int = 16,
    dense_blocks: int = 2,
    page_choice: str = "bounds",
    pattern: str = "antidiagonal",
    seed: int = 0,
) -> nn.Module:
    """Return a model with the same weights (shared, not copied) that attends sparsely.

    The pattern is computed from each input, so `calibration` is not used. The last `full_last` queries of a prompt
    attend to everything; the first `dense_blocks` blocks of the model read all pages when decoding, as in Quest.
    Values of `pattern` other than "antidiagonal", and of `page_choice` other than "bounds", are controls: as many
    blocks in every row, or as many pages, chosen in other ways. Raises UserError for a knob out of range.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "calibration")}
    check(tau, block_size, stride, max_density, full_last, pages, page_size, pattern, dense_blocks, page_choice)
    options.applies(WHERE, model, applies_to)
    sparse: Any = sharing(revert(model) if is_sparse(model) else model)  # Any: a model of transformers
    view = anatomy(sparse)
    view.decoder.stock_decoding = mla_absorption.is_absorbed(sparse)
    mla_absorption.expand(sparse)  # sparse attention decodes in the latent space by itself
    knobs = (tau, block_size, stride, max_density, full_last)
    for block in view.blocks:
        module, read = block.attention.module, 0 if block.index < dense_blocks else pages
        setattr(block.module, slice_depth.ALONE, read != pages)  # a deeper model has no more such blocks
        module.sparsity = Sparsity(block.index, *knobs, read, page_size, page_choice, pattern, seed)
        if block.attention.kind == "latent" and isinstance(module.kv_b_proj, nn.Linear):
            module.expand_kv = types.MethodType(expand_or_not, module)
    view.decoder.stock_attention = view.config._attn_implementation
    view.decoder.sparse_hook = view.decoder.register_forward_pre_hook(page_the_cache, with_kwargs=True)
    sparse.set_attn_implementation(NAME)
    return beyond_files.note(sparse, APPLYING, **arguments)


def revert(model: nn.Module) -> nn.Module:
    """Return a model with the same weights (shared) and the attention it had before `apply`."""
    stock: Any = sharing(model)  # Any: a model of transformers
    view = anatomy(stock)
    for block in view.blocks:
        for name in ("sparsity", "expand_kv"):
            block.attention.module.__dict__.pop(name, None)
        block.module.__dict__.pop(slice_depth.ALONE, None)
    if hook := view.decoder.__dict__.pop("sparse_hook", None):
        view.decoder._forward_pre_hooks.pop(hook.id, None)
        view.decoder._forward_pre_hooks_with_kwargs.pop(hook.id, None)
    if view.decoder.__dict__.pop("stock_decoding", False):
        mla_absorption.absorb(stock)
    if before := view.decoder.__dict__.pop("stock_attention", None):
        stock.set_attn_implementation(before)
    return beyond_files.forget(stock, APPLYING)


def is_sparse(model: nn.Module) -> bool:
    """Return whether `model` is the result of `apply`."""
    return any(hasattr(block.attention.module, "sparsity") for block in anatomy(model).blocks)


def check(
    tau: float,
    block_size: int,
    stride: int,
    max_density: float,
    full_last: int,
    pages: int,
    page_size: int,
    pattern: str = "antidiagonal",
    dense_blocks: int = 2,
    page_choice: str = "bounds",
) -> None:
    """Raise a one-line UserError for the first knob that is out of range."""
    for name, share in (("tau", tau), ("max_density", max_density)):
        options.in_range(WHERE, name, share, 0, 1, closed="high")
    for name, size in (("block_size", block_size), ("stride", stride), ("page_size", page_size)):
        options.in_range(WHERE, name, size, *SEARCH_SPACE[name]["range"])
    if block_size % stride:
        least, most = SEARCH_SPACE["block_size"]["range"]
        multiples = [size for size in range(stride, most + 1, stride) if size >= least]
        nearest = min(multiples, key=lambda size: abs(size - block_size))
        raise UserError(
            f"{WHERE}: stride {stride} does not divide block_size {block_size}; choose a multiple of the stride, "
            f"for example {nearest}"
        )
    options.at_least(WHERE, "pages", pages, 0, "all pages")
    options.at_least(WHERE, "full_last", full_last, 0, "none")
    options.at_least(WHERE, "dense_blocks", dense_blocks, 0, "none")
    options.one_of(WHERE, "page_choice", page_choice, PAGE_CHOICES)
    options.one_of(WHERE, "pattern", pattern, blocks.PATTERNS)


def sparsities(model: nn.Module) -> list[Sparsity]:
    """Return the state of every block's attention of a sparse model, in order."""
    return [block.attention.module.sparsity for block in anatomy(model).blocks]


def density(model: nn.Module) -> dict[str, float | None]:
    """Return the shares since `reset_counts` of prompt blocks kept and of cached tokens read while decoding; None if
    nothing was counted.
    """
    states = sparsities(model)
    causal, cached = sum(state.causal for state in states), sum(state.cached_tokens for state in states)
    return {
        "blocks": sum(state.kept for state in states) / causal if causal else None,
        "tokens": sum(state.read_tokens for state in states) / cached if cached else None,
    }


def left_out(model: nn.Module) -> float:
    """Return how much was left out since `reset_counts`: the number of prompt blocks plus that of cached tokens.

    While it does not grow, the model attends to everything and answers as with full attention.
    """
    return sum(s.causal - s.kept + s.cached_tokens - s.read_tokens for s in sparsities(model))


def reset_counts(model: nn.Module) -> None:
    """Set the counts of a sparse model to zero."""
    for state in sparsities(model):
        state.kept, state.causal, state.read_tokens, state.cached_tokens = 0.0, 0, 0, 0
