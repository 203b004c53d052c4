"""Long prompts in chunks, logits in chunks, tokens as they come: bounded memory for activations, nothing else changed.

A chunk attends to everything before it through the cache, so the result is that of the whole prompt, up to rounding.
Acts on the decoder: pictures, positions and masks are cut with the chunk. Knows nothing of where weights come from.

Shapes: B batch, T tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

import functools
import types
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import DynamicCache

from lib.errors import UserError
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, reset_rope_deltas


def chunk_prefill(model: nn.Module, tokens: int) -> nn.Module:
    """Let `model` read prompts in chunks of at most `tokens`, in place; return the model.

    From then on a context longer than the model's positions is a UserError. Raises UserError for less than one token.
    """
    if tokens < 1:
        raise UserError(f"prefill_chunk {tokens}: expected at least 1 token")
    decoder = anatomy(model).decoder
    decoder.forward = types.MethodType(functools.partial(_forward, tokens), decoder)
    return model


def whole_prefill(model: nn.Module) -> nn.Module:
    """Take `chunk_prefill` back, in place; return the model."""
    anatomy(model).decoder.__dict__.pop("forward", None)
    return model


def _forward(tokens: int, decoder: nn.Module, input_ids: torch.Tensor | None = None, **given) -> object:
    """Stand in for the decoder's own forward."""
    stock = functools.partial(type(decoder).forward, decoder)
    cache = cache_names.taken(given)
    names = {"input_ids": input_ids, "inputs_embeds": given.pop("inputs_embeds", None)}
    name, prompt = next((name, value) for name, value in names.items() if value is not None)
    length = prompt.shape[1]
    _check_context(decoder.config, length + (0 if cache is None else cache.get_seq_length()))
    mask = given.pop("attention_mask", None)
    if length <= tokens or (mask is not None and mask.ndim != 2):
        return stock(**{name: prompt}, attention_mask=mask, **cache_names.given(cache), **given)
    wanted = given.pop("use_cache", None)
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    behind = 0 if mask is None else mask.shape[1] - length
    hidden = []
    for first in range(0, length, tokens):
        last = min(first + tokens, length)
        part = None if mask is None else mask[:, : behind + last]
        cut = _cut(given, first, last)
        cut |= cache_names.given(cache)
        output = stock(**{name: prompt[:, first:last]}, attention_mask=part, use_cache=True, **cut)
        hidden.append(output.last_hidden_state)
    kept = cache_names.given(None if wanted is False else cache)
    return type(output)(last_hidden_state=torch.cat(hidden, dim=1), **kept)


def _cut(given: Mapping[str, object], first: int, last: int) -> dict[str, object]:
    """Return the decoder's other arguments for tokens `first` to `last`: positions, and the features of pictures."""
    cut = dict(given)
    if cut.get("position_ids") is not None:
        cut["position_ids"] = cut["position_ids"][..., first:last]
    pictures_BT = cut.get("visual_pos_masks")
    if pictures_BT is not None:
        at = pictures_BT.nonzero()[:, 1]
        inside = (at >= first) & (at < last)
        some = bool(inside.any())
        cut["visual_pos_masks"] = pictures_BT[:, first:last] if some else None
        features = cut["deepstack_visual_embeds"]
        cut["deepstack_visual_embeds"] = [one[inside] for one in features] if some and features else None
    return cut


def _check_context(config: object, context: int) -> None:
    if context > config.max_position_embeddings:
        raise UserError(
            f"a context of {context} tokens is longer than this model's {config.max_position_embeddings} positions; "
            "shorten it, or give a cache with a window (lib.optimizations.streaming_computation.sink_window)"
        )


@torch.inference_mode()
def losses(model: nn.Module, ids_BT: torch.Tensor, *, rows: int, cache: object = None) -> torch.Tensor:
    """Return the loss of each next token [B, T - 1] in nats, float32, with logits of `rows` tokens at a time."""
    if rows < 1:
        raise UserError(f"logit_rows {rows}: expected at least 1")
    reset_rope_deltas(model)
    given = {"use_cache": cache is not None} | cache_names.given(cache)
    hidden_BTH = model.model(input_ids=ids_BT, **given).last_hidden_state[:, :-1]
    flat = zip(hidden_BTH.flatten(0, 1).split(rows), ids_BT[:, 1:].flatten().split(rows))
    found = [nn.functional.cross_entropy(model.lm_head(h).float(), target, reduction="none") for h, target in flat]
    return torch.cat(found).view(ids_BT.shape[0], -1)


@torch.inference_mode()
def tokens(model: nn.Module, prompt: torch.Tensor | Mapping, count: int, *, cache: object = None) -> Iterator:
    """Yield `count` greedy tokens [B] one by one, each as soon as it is there. `prompt` is ids [B, T] or inputs.

    With a windowed `cache` the count has no limit. A reader may stop at any time.
    """
    inputs = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
    if cache is None:
        reset_rope_deltas(model)
    for _ in range(count):
        output = model(**inputs, **cache_names.given(cache), use_cache=True, logits_to_keep=1)
        cache, token_B = cache_names.of(output), output.logits[:, -1].argmax(-1)
        yield token_B
        inputs = {"input_ids": token_B[:, None]}
