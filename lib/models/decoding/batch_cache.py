"""Sequences that decode together and come and go one by one: what iteration-level batching needs of a cache.

Rows are padded on the left, so that every row's newest token stands in the last column; a mask hides the padding, and
each row keeps its own positions, so a row computes what it would compute alone (up to rounding). Works on transformers'
DynamicCache as it is: grouped-query keys and values, or GLM's latents, are both [B, heads, L, size]. Knows nothing of
queues, clocks or policies. Yu et al. 2022 (Orca, OSDI), section 3.1, calls this iteration-level scheduling.

Shapes: B rows, L columns of the cache, T prompt tokens, N new tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy, reset_rope_deltas

Prompt = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass
class Rows:
    """B sequences under way. `token_B` is each row's newest token, not yet in the cache; `position_B` its position."""

    cache: object
    mask_BL: torch.Tensor
    position_B: torch.Tensor
    token_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_B)

    @property
    def length(self) -> int:
        """Columns of the cache, padding included: the context of the longest row."""
        return self.mask_BL.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes that the cache really holds, padding included."""
        return sum(part.numel() * part.element_size() for layer in self.cache.layers for part in _parts(layer))


def joinable(model: nn.Module) -> str | None:
    """Return None where rows can join and leave this model's cache, else the reason why not."""
    config = anatomy(model).config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention"}:
        return f"its cache has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}, which keep no whole rows"
    return None


@torch.inference_mode()
def prefill(model: nn.Module, prompts: Sequence[Prompt]) -> Rows:
    """Read prompts of any lengths in one pass and return their rows with the first greedy token of each.

    A prompt is ids [T]; or, alone, a dictionary of model inputs [1, T] (with pictures). Raises UserError for no prompt,
    an empty one, or pictures beside other prompts.
    """
    if not prompts:
        raise UserError("rows: no prompt to read; give at least one")
    reset_rope_deltas(model)
    device = next(model.parameters()).device
    if isinstance(prompts[0], Mapping):
        return _prefill_pictures(model, prompts, device)
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("rows: a prompt is empty; every prompt needs at least one token")
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = prompt
        mask_BT[row, longest - len(prompt) :] = 1
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    output = model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        position_ids=position_BT.to(device),
        use_cache=True,
        logits_to_keep=1,
    )
    return Rows(
        output.past_key_values,
        mask_BT.to(device),
        position_BT[:, -1].to(device) + 1,
        output.logits[:, -1].argmax(-1),
    )


def _prefill_pictures(model: nn.Module, prompts: Sequence[Prompt], device: torch.device) -> Rows:
    """Read one prompt with pictures: the model places their patches itself, the next position follows from that."""
    if len(prompts) > 1:
        raise UserError("rows: a prompt with pictures is read alone; pass one prompt at a time and join the rows")
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in prompts[0].items()}
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    ids_BT = inputs["input_ids"]
    shift = getattr(model.model, "rope_deltas", None)
    position_B = torch.full((len(ids_BT),), ids_BT.shape[1], device=device)
    position_B = position_B if shift is None else position_B + shift.flatten().to(device)
    reset_rope_deltas(model)
    return Rows(output.past_key_values, torch.ones_like(ids_BT), position_B, output.logits[:, -1].argmax(-1))


@torch.inference_mode()
def step(model: nn.Module, rows: Rows) -> torch.Tensor:
    """Decode one token of every row greedily, in place; return the new tokens [B]."""
    rows.mask_BL = torch.cat([rows.mask_BL, rows.mask_BL.new_ones(len(rows), 1)], 1)
    output = model(
        input_ids=rows.token_B[:, None],
        attention_mask=rows.mask_BL,
        position_ids=rows.position_B[:, None],
        past_key_values=rows.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    rows.position_B = rows.position_B + 1
    rows.token_B = output.logits[:, -1].argmax(-1)
    return rows.token_B


@torch.inference_mode()
def join(rows: Rows, more: Rows) -> Rows:
    """Return the rows of both, in that order, in the cache of the first; neither may be used afterwards."""
    length = max(rows.length, more.length)
    for layer, other in zip(rows.cache.layers, more.cache.layers):
        layer.keys, layer.values = (
            torch.cat([_widened(mine, length), _widened(theirs, length)])
            for mine, theirs in zip(_parts(layer), _parts(other))
        )
    masks = [nn.functional.pad(one.mask_BL, (length - one.length, 0)) for one in (rows, more)]
    rows.mask_BL = torch.cat(masks)
    rows.position_B = torch.cat([rows.position_B, more.position_B])
    rows.token_B = torch.cat([rows.token_B, more.token_B])
    return rows


@torch.inference_mode()
def keep(rows: Rows, kept: Sequence[int]) -> Rows:
    """Drop every row but `kept` (indices), in place, and the columns that are then padding in all rows."""
    index = torch.as_tensor(list(kept), device=rows.mask_BL.device)
    mask_BL = rows.mask_BL[index]
    first = int(mask_BL.any(0).int().argmax()) if len(index) else rows.length
    for layer in rows.cache.layers:
        layer.keys, layer.values = (part[index, :, first:].contiguous() for part in _parts(layer))
    rows.mask_BL = mask_BL[:, first:]
    rows.position_B, rows.token_B = rows.position_B[index], rows.token_B[index]
    return rows


@torch.inference_mode()
def repeat(rows: Rows, count: int) -> Rows:
    """Return a new set of rows: each of `rows` `count` times. For timing large batches without reading long prompts."""
    cache = copy.copy(rows.cache)
    cache.layers = []
    for layer in rows.cache.layers:
        twin = copy.copy(layer)
        twin.keys, twin.values = (part.repeat(count, 1, 1, 1) for part in _parts(layer))
        cache.layers.append(twin)
    return Rows(cache, rows.mask_BL.repeat(count, 1), rows.position_B.repeat(count), rows.token_B.repeat(count))


@torch.inference_mode()
def first(rows: Rows, length: int) -> Rows:
    """Return a new set of rows as they stood after their first `length` columns; none may be padded. The newest token
    is theirs to be set.
    """
    cache = copy.copy(rows.cache)
    cache.layers = []
    for layer in rows.cache.layers:
        twin = copy.copy(layer)
        twin.keys, twin.values = (part[:, :, :length].contiguous() for part in _parts(layer))
        cache.layers.append(twin)
    position_B = rows.position_B - (rows.length - length)
    return Rows(cache, rows.mask_BL[:, :length], position_B, rows.token_B.clone())


def _parts(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


def _widened(part: torch.Tensor, length: int) -> torch.Tensor:
    """Pad a cache tensor [B, heads, L, size] on the left to `length` columns."""
    return nn.functional.pad(part, (0, 0, length - part.shape[2], 0))
