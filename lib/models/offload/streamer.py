"""Runs a model larger than its memory allowance: blocks are read from files just before they run, and read ahead.

`open_streamed` builds the architecture without weights (`lib.models.offload.layout`) and attaches a streamer of its
units (`lib.models.offload.unit_streamer`). Embeddings are read row by row, experts through
`lib.models.offload.expert_cache`; `lib.models.offload.residency` decides what stays in memory. Knows nothing of
measuring.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints import finite
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile, buffer
from lib.models.offload import expert_cache, mapped_pages, residency
from lib.models.offload.expert_cache import ExpertCache, MappedExperts
from lib.models.offload.layout import Layout, layout, unit_bytes, unit_modules
from lib.models.offload.mapped_pages import FilePages
from lib.models.offload.unit_streamer import MappedStreamer, Streamer
from lib.models.structure.anatomy import Anatomy

PAGE_CACHE = ("keep", "copy", "drop")


def open_streamed(
    folder: Path | str,
    *,
    allowance_bytes: int | None = None,
    memory_ratio: float = 0.35,
    page_cache: str = "keep",
    device: str = "cpu",
) -> nn.Module:
    """Return the model of a checkpoint folder with at most `allowance_bytes` of its weights in memory at a time.

    `allowance_bytes` defaults to the share `memory_ratio` of all weights. `page_cache`: "keep", weights are used
    directly in the page cache (on a CPU, if the system supports it: `lib.models.offload.mapped_pages`); "copy", they
    are copied from there; "drop", every read comes from the disk. Weights have the dtype in which most are stored.
    Weights are checked at their first read, and NaN or infinite values raise a UserError that names them.
    `streamer(model)` has counts and the plan. Raises NotApplicable for an allowance that is too small, naming the
    smallest possible one, and UserError for a damaged checkpoint.
    """
    if page_cache not in PAGE_CACHE:
        raise UserError(f'page_cache "{page_cache}"; expected one of {", ".join(PAGE_CACHE)}')
    parts = layout(Path(folder), page_cache == "drop", device)
    expert_cache.require_equal(parts.experts, folder)
    allowance = round(memory_ratio * parts.total) if allowance_bytes is None else allowance_bytes
    sizes, fixed = unit_bytes(parts.units), sum(parts.fixed.values())
    plan = residency.plan(sizes, fixed, parts.expert_size, parts.total, allowance)
    for name in parts.fixed:
        _load(parts.model, name, parts.file, device)
    mapped = page_cache == "keep" and torch.device(device).type == "cpu" and mapped_pages.available()
    pages = FilePages(parts.file) if mapped else None
    if pages is None:
        unit_streamer = Streamer(parts.file, parts.units, plan, device)
    else:
        unit_streamer = MappedStreamer(pages, parts.units, plan)
    if parts.experts:
        unit_streamer.experts = _attach_experts(parts, pages, plan.expert_slots, device)
    _attach_units(parts.model, parts.view, unit_streamer, parts.embeddings)
    return parts.model


def smallest(folder: Path | str) -> tuple[int, int]:
    """Return (smallest allowance, size of all weights) for the checkpoint in `folder`, in bytes."""
    parts = layout(Path(folder), False, "cpu")
    parts.file.close()
    expert_cache.require_equal(parts.experts, folder)
    return residency.smallest(unit_bytes(parts.units), sum(parts.fixed.values()), parts.expert_size), parts.total


def streamer(model: nn.Module) -> Streamer | None:
    """Return the streamer of the weights of `model`, or None if all weights are in memory."""
    return getattr(getattr(model, "lm_head", None), "streamer", None)


class StreamedHead(nn.Module):
    """A head whose rows are streamed in pieces, with one product per piece: hidden [..., H] to logits [..., V]."""

    def __init__(self, weight: torch.Tensor, streamer: Streamer, pieces: list[tuple[str, int, int]]):
        super().__init__()
        self.weight, self.bias = weight, None
        self.streamer, self.pieces = streamer, pieces
        self.out_features, self.in_features = weight.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone(memory_format=torch.contiguous_format)  # see `lib.models.structure.architecture.ready`
        logits = hidden.new_empty(*hidden.shape[:-1], self.out_features)
        for name, first, last in self.pieces:
            rows = self.streamer.weights(name)[0].to(hidden.dtype)
            logits[..., first:last] = nn.functional.linear(hidden, rows)
        return logits


class StreamedEmbedding(nn.Module):
    """Embeddings read row by row: ids [B, T] to vectors [B, T, H]. Each distinct row is read once per call.

    The rows pass through the architecture's own module, which may scale them (Gemma).
    """

    def __init__(self, stock: nn.Embedding, file: WeightFile, place: TensorPlace):
        super().__init__()
        self.weight, self.file, self.place = stock.weight, file, place
        self.num_embeddings, self.embedding_dim = stock.weight.shape
        stock.padding_idx = None  # affects only gradients, and its index may be beyond the rows in memory
        self._stock = [stock]  # in a list, so that it is no submodule: its weight is that of this module
        self._seen: set[int] = set()  # rows already checked for finite values

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        rows, where_BT = ids_BT.unique(return_inverse=True)
        row, indices = self.place.nbytes // self.place.shape[0], rows.tolist()
        if wrong := [index for index in indices if not 0 <= index < self.num_embeddings]:
            raise UserError(
                f"{self.file.folder}: token id {wrong[0]} is outside the {self.num_embeddings} rows of the embeddings; "
                "give ids of this model's own tokenizer"
            )
        memory = buffer(row * len(indices))
        places = [self.place.rows(at, at + 1) for at in indices]
        self.file.read(zip(places, memory.split(row)))
        table = memory.view(self.place.dtype).view(len(indices), -1)
        if not self._seen.issuperset(indices):
            finite.require_read(self.file, self.place, table)
            self._seen.update(indices)
        table = table.to(ids_BT.device, self.weight.dtype)
        (stock,) = self._stock
        stock.weight = nn.Parameter(table, requires_grad=False)
        try:
            return stock(where_BT)
        finally:
            stock.weight = self.weight


def _load(model: nn.Module, name: str, file: WeightFile, device: str) -> None:
    """Read the tensor `name`, which always stays in memory, into the model."""
    place = file.places[name]
    memory = buffer(place.nbytes)
    file.read([(place, memory)])
    owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    tensor = memory.view(place.dtype).view(place.shape).to(device)
    finite.require_read(file, place, tensor)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor.to(owner.get_parameter(leaf).dtype), requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.to(owner.get_buffer(leaf).dtype)


def _attach_experts(parts: Layout, pages: FilePages | None, slots: int, device: str) -> ExpertCache:
    """Make all blocks with routed experts take them from one cache; return the cache."""
    if pages is not None and expert_cache.in_one_piece(parts.experts):
        cache: ExpertCache = MappedExperts(pages, parts.experts, slots)
    else:
        cache = ExpertCache(parts.file, parts.experts, slots, device)
    for index in parts.experts:
        experts = parts.view.blocks[index].feed_forward.experts
        assert experts is not None
        expert_cache.attach(experts.module, cache, index)
    parts.view.config._experts_implementation = expert_cache.NAME
    return cache


def _attach_units(model: Any, view: Anatomy, unit_streamer: Streamer, embeddings: TensorPlace) -> None:
    """Register hooks on the modules of the streamed units; replace head and embeddings by streamed ones."""
    for name, module in unit_modules(view).items():
        if name not in unit_streamer.plan.resident:
            module.register_forward_pre_hook(functools.partial(unit_streamer.hook, name))
    pieces, first = [], 0
    for name, parts in unit_streamer.units.items():
        if name.startswith("head."):
            rows = parts[0].place.shape[0]
            pieces.append((name, first, first + rows))
            first += rows
    view.decoder.embed_tokens = StreamedEmbedding(view.embeddings, unit_streamer.file, embeddings)
    model.lm_head = StreamedHead(view.head.weight, unit_streamer, pieces)
    model.register_state_dict_pre_hook(unit_streamer.refuse)
    model.weights_in_memory_bytes = unit_streamer.in_memory_bytes
