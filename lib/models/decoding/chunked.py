"""Chunked prefill, chunked losses and a stream of tokens, which bound the memory of activations at unchanged results.

A chunk attends to all earlier tokens through the cache, so the result is that of the whole prompt, up to rounding. Acts
on the decoder: image features, positions and masks are split along with the prompt. Knows nothing of where weights are
stored.

Shapes: B batch, T tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lib.errors import UserError
from lib.models.decoding import cache_names
from lib.models.structure import beyond_files
from lib.models.structure.anatomy import anatomy, reset_rope_deltas
from lib.models.structure.logits import logits_of

CHUNKING = f"{__name__}:chunk_prefill"


def chunk_prefill(model: nn.Module, tokens: int) -> nn.Module:
    """Make `model` process prompts in chunks of at most `tokens`, in place; return the model.

    From then on, the model raises UserError for a context with more tokens than it has positions, before processing any
    of it. Tokens that a cache with a window has dropped take no position, so a text may be longer. Raises UserError for
    `tokens` below 1.
    """
    if tokens < 1:
        raise UserError(f"prefill_chunk {tokens}: expected at least 1 token")
    decoder = anatomy(model).decoder
    decoder.forward = types.MethodType(functools.partial(_forward, tokens), decoder)
    return beyond_files.note(model, CHUNKING, tokens=tokens)


def whole_prefill(model: nn.Module) -> nn.Module:
    """Undo `chunk_prefill` in place; return the model."""
    anatomy(model).decoder.__dict__.pop("forward", None)
    return beyond_files.forget(model, CHUNKING)


def _forward(tokens: int, decoder: Any, input_ids: torch.Tensor | None = None, **arguments) -> object:
    """Replacement of the decoder's forward, which processes at most `tokens` tokens at a time."""
    stock = functools.partial(type(decoder).forward, decoder)
    cache = cache_names.pop_from(arguments)
    names = {"input_ids": input_ids, "inputs_embeds": arguments.pop("inputs_embeds", None)}
    name, prompt = next((name, value) for name, value in names.items() if value is not None)
    length = prompt.shape[1]
    if length <= tokens or not _forgets(cache):
        _check_context(decoder.config, length + (0 if cache is None else cache.get_seq_length()))
    mask = arguments.pop("attention_mask", None)
    if length <= tokens or (mask is not None and (isinstance(mask, dict) or mask.ndim != 2)):
        return stock(**{name: prompt}, attention_mask=mask, **cache_names.as_kwargs(cache), **arguments)
    use_cache = arguments.pop("use_cache", None)
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    cached = 0 if mask is None else mask.shape[1] - length
    hidden = []
    for first in range(0, length, tokens):
        last = min(first + tokens, length)
        _check_context(decoder.config, cache.get_seq_length() + last - first)
        part = None if mask is None else mask[:, : cached + last]
        cut = _cut(arguments, first, last)
        cut |= cache_names.as_kwargs(cache)
        output = stock(**{name: prompt[:, first:last]}, attention_mask=part, use_cache=True, **cut)
        hidden.append(output.last_hidden_state)
    cache_kwargs = cache_names.as_kwargs(None if use_cache is False else cache)
    return type(output)(last_hidden_state=torch.cat(hidden, dim=1), **cache_kwargs)


def _forgets(cache: Any) -> bool:
    """Return whether a cache drops tokens and so uses fewer positions; its layers then count `forgotten` tokens."""
    return any(hasattr(layer, "forgotten") for layer in getattr(cache, "layers", ()))


def _cut(arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """Return the decoder's other arguments (positions, image features) for tokens `first` to `last` - 1."""
    cut = dict(arguments)
    if cut.get("position_ids") is not None:
        cut["position_ids"] = cut["position_ids"][..., first:last]
    images_BT = cut.get("visual_pos_masks")
    if images_BT is not None:
        at = images_BT.nonzero()[:, 1]
        inside = (at >= first) & (at < last)
        any_inside = bool(inside.any())
        cut["visual_pos_masks"] = images_BT[:, first:last] if any_inside else None
        features = cut["deepstack_visual_embeds"]
        cut["deepstack_visual_embeds"] = [feature[inside] for feature in features] if any_inside and features else None
    return cut


def _check_context(config: Any, context: int) -> None:
    if context > config.max_position_embeddings:
        raise UserError(
            f"a context of {context} tokens is longer than this model's {config.max_position_embeddings} positions; "
            "shorten it, or give a cache with a window (lib.optimizations.streaming_computation.sink_window)"
        )


@torch.inference_mode()
def losses(model: nn.Module, ids_BT: torch.Tensor, *, rows: int, cache: object = None) -> torch.Tensor:
    """Return the loss of each next token [B, T - 1], nats, float32; computes the logits of `rows` tokens at a time."""
    if rows < 1:
        raise UserError(f"logit_rows {rows}: expected at least 1")
    reset_rope_deltas(model)
    cache_kwargs = {"use_cache": cache is not None} | cache_names.as_kwargs(cache)
    hidden_BTH = model.get_submodule("model")(input_ids=ids_BT, **cache_kwargs).last_hidden_state[:, :-1]
    flat = zip(hidden_BTH.flatten(0, 1).split(rows), ids_BT[:, 1:].flatten().split(rows))
    per_piece = [nn.functional.cross_entropy(logits_of(model, h).float(), ids, reduction="none") for h, ids in flat]
    return torch.cat(per_piece).view(ids_BT.shape[0], -1)


@torch.inference_mode()
def tokens(
    model: nn.Module, prompt: torch.Tensor | Mapping, count: int, *, cache: object = None
) -> Iterator[torch.Tensor]:
    """Yield `count` greedy tokens [B], each as soon as it is computed. `prompt`: ids [B, T] or a mapping of inputs.

    With a windowed `cache`, `count` is unlimited. The caller may stop at any time.
    """
    inputs = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
    if cache is None:
        reset_rope_deltas(model)
    for _ in range(count):
        output = model(**inputs, **cache_names.as_kwargs(cache), use_cache=True, logits_to_keep=1)
        cache, token_B = cache_names.of(output), output.logits[:, -1].argmax(-1)
        yield token_B
        inputs = {"input_ids": token_B[:, None]}
