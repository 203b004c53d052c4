"""A cache for sequences that decode together and join and leave individually, for iteration-level scheduling.

Rows are padded on the left, so that the newest token of every row is in the last column. A mask hides the padding, and
each row has its own positions, so a row gives the same result as alone (up to rounding). Works on transformers'
DynamicCache, where grouped-query keys and values and GLM's latents are all [B, heads, L, size]. Knows nothing of
queues, clocks or policies. Iteration-level scheduling: Yu et al. 2022 (Orca, OSDI), section 3.1.

Shapes: B rows, L columns of the cache, T prompt tokens, N new tokens.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from lib.errors import UserError
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, reset_rope_deltas

Prompt = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass
class Rows:
    """B sequences being decoded. `token_B`: newest token of each row, not cached yet; `position_B`: its position."""

    cache: DynamicCache
    mask_BL: torch.Tensor
    position_B: torch.Tensor
    token_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_B)

    @property
    def length(self) -> int:
        """Columns of the cache including padding: the context of the longest row."""
        return self.mask_BL.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the cache including padding."""
        return sum(part.numel() * part.element_size() for layer in _filled(self.cache) for part in _parts(layer))


def joinable(model: nn.Module) -> str | None:
    """Return None if rows can join and leave the cache of `model`, else the reason why not."""
    view = anatomy(model)
    kinds = set(getattr(view.config, "layer_types", None) or ())
    if any(block.attention.window is not None for block in view.blocks):  # Mistral has no `layer_types`
        kinds.add("sliding_attention")
    if others := sorted(kinds - {"full_attention"}):
        return f"its cache has layers of kind {', '.join(others)}, which do not store whole rows"
    return None


@torch.inference_mode()
def prefill(model: nn.Module, prompts: Sequence[Prompt], behind: Rows | None = None) -> Rows:
    """Process prompts of any lengths in one pass; return their rows with the first greedy token of each.

    A prompt is ids [T]; a single prompt may be a mapping of model inputs [1, T] (with images). `behind`: one row
    without padding that holds the prefix of every prompt; it is copied. Raises UserError without prompts, for an empty
    prompt, and for images together with other prompts or a prefix.
    """
    if not prompts:
        raise UserError("rows: no prompt; give at least one")
    reset_rope_deltas(model)
    device = next(model.parameters()).device
    with_images = [prompt for prompt in prompts if isinstance(prompt, Mapping)]
    if with_images:
        if len(prompts) > 1 or behind is not None:
            raise UserError(
                "rows: a prompt with images is processed alone; pass one prompt at a time and join the rows"
            )
        return _prefill_images(model, with_images[0], device)
    ids = [prompt for prompt in prompts if not isinstance(prompt, Mapping)]
    longest = max(len(prompt_T) for prompt_T in ids)
    if min(len(prompt_T) for prompt_T in ids) == 0:
        raise UserError("rows: a prompt is empty; every prompt needs at least one token")
    ids_BT = torch.zeros(len(ids), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt_T in enumerate(ids):
        ids_BT[row, longest - len(prompt_T) :] = prompt_T
        mask_BT[row, longest - len(prompt_T) :] = 1
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    cache = None
    if behind is not None:
        cache = repeat(behind, len(ids)).cache
        position_BT = position_BT + behind.length
        mask_BT = torch.cat([torch.ones(len(ids), behind.length, dtype=torch.long), mask_BT], 1)
    output = model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        position_ids=position_BT.to(device),
        **cache_names.as_kwargs(cache),
        use_cache=True,
        logits_to_keep=1,
    )
    position_B, token_B = position_BT[:, -1].to(device) + 1, output.logits[:, -1].argmax(-1)
    rows = Rows(cache_names.of(output), mask_BT.to(device), position_B, token_B)
    if behind is not None:
        _pad_left(rows, behind.length)
    return rows


def _pad_left(rows: Rows, length: int) -> None:
    """Move the padding of each row from after its first `length` columns to before them, in place."""
    for row, padding in enumerate((rows.mask_BL == 0).sum(1).tolist()):
        end = length + padding
        if padding:
            for part in (part for layer in _filled(rows.cache) for part in _parts(layer)):
                part[row, :, :end] = part[row, :, :end].roll(padding, 1)
            rows.mask_BL[row, :end] = rows.mask_BL[row, :end].roll(padding)


def _prefill_images(model: nn.Module, prompt: Mapping[str, torch.Tensor], device: torch.device) -> Rows:
    """Process one prompt with images; return its row. The next position follows from the model's `rope_deltas`."""
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in prompt.items()}
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    ids_BT = inputs["input_ids"]
    shift = getattr(model.model, "rope_deltas", None)
    position_B = torch.full((len(ids_BT),), ids_BT.shape[1], device=device)
    position_B = position_B if shift is None else position_B + shift.flatten().to(device)
    reset_rope_deltas(model)
    return Rows(cache_names.of(output), torch.ones_like(ids_BT), position_B, output.logits[:, -1].argmax(-1))


@torch.inference_mode()
def read_on(model: nn.Module, row: Rows | None, part_T: torch.Tensor) -> Rows:
    """Process the next part of one prompt into its `row`, in place (None: the first part); return the row.

    Its newest token is the greedy token after the part.
    """
    if row is None:
        return prefill(model, [part_T])
    device, length = row.mask_BL.device, row.length + len(part_T)
    mask_1L = torch.ones(1, length, dtype=row.mask_BL.dtype, device=device)
    output = model(
        input_ids=part_T[None].to(device),
        attention_mask=mask_1L,
        position_ids=torch.arange(row.length, length, device=device)[None],
        **cache_names.as_kwargs(row.cache),
        use_cache=True,
        logits_to_keep=1,
    )
    row.mask_BL, row.position_B = mask_1L, torch.full_like(row.position_B, length)
    row.token_B = output.logits[:, -1].argmax(-1)
    return row


@torch.inference_mode()
def step(model: nn.Module, rows: Rows) -> torch.Tensor:
    """Decode one token of every row greedily, in place; return the new tokens [B]."""
    rows.mask_BL = torch.cat([rows.mask_BL, rows.mask_BL.new_ones(len(rows), 1)], 1)
    output = model(
        input_ids=rows.token_B[:, None],
        attention_mask=rows.mask_BL,
        position_ids=rows.position_B[:, None],
        **cache_names.as_kwargs(rows.cache),
        use_cache=True,
        logits_to_keep=1,
    )
    rows.position_B = rows.position_B + 1
    rows.token_B = output.logits[:, -1].argmax(-1)
    return rows.token_B


@torch.inference_mode()
def join(rows: Rows, joining: Rows) -> Rows:
    """Return `rows` followed by `joining`, in the cache of `rows`; neither argument may be used afterwards."""
    length = max(rows.length, joining.length)
    for layer, joining_layer in zip(_filled(rows.cache), _filled(joining.cache), strict=True):
        joined = (
            torch.cat([_widened(part, length), _widened(joining_part, length)])
            for part, joining_part in zip(_parts(layer), _parts(joining_layer))
        )
        _replace(layer, joined)
    masks = [nn.functional.pad(batch.mask_BL, (length - batch.length, 0)) for batch in (rows, joining)]
    rows.mask_BL = torch.cat(masks)
    rows.position_B = torch.cat([rows.position_B, joining.position_B])
    rows.token_B = torch.cat([rows.token_B, joining.token_B])
    return rows


@torch.inference_mode()
def keep(rows: Rows, indices: Sequence[int]) -> Rows:
    """Keep only the rows `indices`, in place, without columns that are padding in all of them; return the rows."""
    index = torch.as_tensor(list(indices), device=rows.mask_BL.device)
    mask_BL = rows.mask_BL[index]
    first = int(mask_BL.any(0).int().argmax()) if len(index) else rows.length
    for layer in _filled(rows.cache):
        _replace(layer, (part[index, :, first:].contiguous() for part in _parts(layer)))
    rows.mask_BL = mask_BL[:, first:]
    rows.position_B, rows.token_B = rows.position_B[index], rows.token_B[index]
    return rows


@torch.inference_mode()
def repeat(rows: Rows, count: int) -> Rows:
    """Return new rows with `rows` repeated `count` times, for timing large batches without prefilling long prompts."""
    cache = _mapped(rows.cache, lambda part: part.repeat(count, 1, 1, 1))
    return Rows(cache, rows.mask_BL.repeat(count, 1), rows.position_B.repeat(count), rows.token_B.repeat(count))


@torch.inference_mode()
def first(rows: Rows, length: int) -> Rows:
    """Return new rows with the first `length` columns of rows without padding. The caller sets the newest token.

    Always copies, even where the first columns are contiguous (a single row with one head), since a cache that appends
    in place would write into the memory of `rows`.
    """
    cache = _mapped(rows.cache, lambda part: part[:, :, :length].clone(memory_format=torch.contiguous_format))
    position_B = rows.position_B - (rows.length - length)
    return Rows(cache, rows.mask_BL[:, :length], position_B, rows.token_B.clone())


def _mapped(cache: DynamicCache, change: Callable[[torch.Tensor], torch.Tensor]) -> DynamicCache:
    """Return a copy of the cache with `change` applied to every tensor of keys and values."""
    changed = copy.copy(cache)
    changed.layers = []
    for layer in cache.layers:
        changed_layer = copy.copy(layer)
        if _is_filled(layer):
            _replace(changed_layer, (change(part) for part in _parts(layer)))
        changed.layers.append(changed_layer)
    return changed


def _filled(cache: DynamicCache) -> list[object]:
    """Return the layers that are not empty. A cache has a layer for every block, but blocks without attention fill
    none, so the last layers may stay empty.
    """
    return [layer for layer in cache.layers if _is_filled(layer)]


def _is_filled(layer: object) -> bool:
    return getattr(layer, "keys", None) is not None


def _parts(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of a layer that is not empty."""
    assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _replace(layer: object, parts: Iterable[torch.Tensor]) -> None:
    """Replace the keys and values of a layer by `parts`."""
    assert isinstance(layer, CacheLayerMixin)
    layer.keys, layer.values = parts


def _widened(part: torch.Tensor, length: int) -> torch.Tensor:
    """Pad a cache tensor [B, heads, L, size] on the left to `length` columns."""
    return nn.functional.pad(part, (0, 0, length - part.shape[2], 0))
