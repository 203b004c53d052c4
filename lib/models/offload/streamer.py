"""A model larger than its memory allowance: its blocks are filled from a file just before they run, and read ahead.

`open_streamed` takes the architecture without weights (`lib.models.offload.layout`): whoever uses a parameter that is
not in memory gets NaN, never an old value. Before a unit (a decoder block, a block of a vision tower, some rows of the
head) runs, a hook gives it views into one of two slots, and one background thread starts to read the next unit into the
other; or, without any copy, views into the mapped file, whose pages are given back afterwards. Embeddings are read row
by row, experts by `lib.models.offload.expert_cache`. What stays in memory is decided by `lib.models.offload.residency`.
Knows nothing of measuring.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.checkpoints.weight_file import Place, WeightFile, aligned, buffer
from lib.models.offload import expert_cache, mapped_pages, residency
from lib.models.offload.expert_cache import ExpertCache, MappedExperts
from lib.models.offload.layout import Part, layout, unit_bytes, unit_modules
from lib.models.offload.mapped_pages import FilePages
from lib.models.offload.residency import Plan
from lib.models.structure.anatomy import Anatomy

PAGE_CACHE = ("keep", "copy", "drop")


@dataclass(eq=False)
class Slot:
    """Memory for one unit at a time: the unit it holds or is being filled with, and the read that fills it."""

    memory: torch.Tensor
    unit: str | None = None
    filled: Future | None = None


class Streamer:
    """Gives units their weights, in the order they ask for them, and reads ahead by the order seen before.

    `plan` says what stays in memory; `file` counts the bytes; `experts` is the cache of experts, or None.
    """

    slot_count = residency.SLOTS

    def __init__(self, file: WeightFile, units: Mapping[str, list[Part]], plan: Plan, device: str = "cpu"):
        self.file, self.units, self.plan = file, units, plan
        self.device = torch.device(device)
        self.experts: ExpertCache | None = None
        self.slots = [Slot(self._memory(plan.slot_bytes)) for _ in range(self.slot_count if plan.streamed else 0)]
        self._staging = None if self.device.type == "cpu" else buffer(max(unit_bytes(units).values()), pinned=True)
        self._side = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._views: dict[tuple[str, int], list[nn.Parameter]] = {}
        self._kept: dict[str, list[nn.Parameter]] = {}
        self._next = dict(zip(plan.streamed, [*plan.streamed[1:], *plan.streamed[:1]]))
        self._last: str | None = None
        sizes = unit_bytes(units)
        for name in plan.resident:
            memory = self._memory(sizes[name])
            self._read(name, memory)
            self._kept[name] = self._view(name, memory)
            _bind(units[name], self._kept[name])

    def __deepcopy__(self, memo: dict) -> "Streamer":
        raise NotApplicable(expert_cache.COPYING)

    def _memory(self, nbytes: int) -> torch.Tensor:
        on_cpu = self.device.type == "cpu"
        return buffer(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @property
    def in_memory_bytes(self) -> int:
        """The weights that the plan allows in memory, in bytes."""
        return self.plan.in_memory_bytes

    def weights(self, name: str) -> list[nn.Parameter]:
        """Return the weights of unit `name`, bound to its modules, and start reading what will be needed next.

        They hold until the next unit is asked for. Raises UserError where they cannot be read.
        """
        if name in self._kept:
            return self._kept[name]
        slot = next((slot for slot in self.slots if slot.unit == name), None)
        if slot is None:
            slot = next((slot for slot in self.slots if slot.unit in (None, self._last)), self.slots[0])
            self._fill(slot, name)
        if self._last is not None:
            self._next[self._last] = name
        try:
            slot.filled.result()
        except BaseException:
            slot.unit = None
            raise
        self._last = name
        other = self.slots[1 - self.slots.index(slot)]
        if (ahead := self._next[name]) != name and other.unit != ahead:
            self._fill(other, ahead)
        views = self._views_of(name, self.slots.index(slot))
        _bind(self.units[name], views)
        return views

    def _fill(self, slot: Slot, name: str) -> None:
        """Start reading a unit into a slot, whose former unit loses its weights first."""
        if slot.filled is not None:
            wait([slot.filled])
        if slot.unit is not None:
            _unbind(self.units[slot.unit])
        ready = None if self._side is None else torch.cuda.current_stream(self.device).record_event()
        slot.unit, slot.filled = name, self._reader.submit(self._read, name, slot.memory, ready)

    def _read(self, name: str, memory: torch.Tensor, ready: object = None) -> None:
        """Read a unit into memory; on CUDA through pinned memory and a side stream, when the slot is no longer used."""
        target = memory if self._staging is None else self._staging
        self.file.read(zip([part.place for part in self.units[name]], _split(self.units[name], target)))
        if self._staging is not None:
            with torch.cuda.stream(self._side):
                if ready is not None:
                    self._side.wait_event(ready)
                memory.copy_(target[: memory.numel()], non_blocking=True)
            self._side.synchronize()

    def _view(self, name: str, memory: torch.Tensor) -> list[nn.Parameter]:
        parts = self.units[name]
        raw = zip(parts, _split(parts, memory))
        return [nn.Parameter(one.view(p.place.dtype).view(p.place.shape), requires_grad=False) for p, one in raw]

    def _views_of(self, name: str, slot: int) -> list[nn.Parameter]:
        if (name, slot) not in self._views:
            self._views[name, slot] = self._view(name, self.slots[slot].memory)
        return self._views[name, slot]

    def hook(self, name: str, module: nn.Module, args: tuple) -> None:
        """Give a module its weights before it runs."""
        self.weights(name)

    def refuse(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Refuse to list weights that are not there."""
        raise UserError(
            f"{self.file.folder}: the weights of this model stream from here and are not in memory; "
            "copy that folder, or load it whole"
        )

    def settle(self) -> None:
        """Wait until nothing is being read any more."""
        wait([slot.filled for slot in self.slots if slot.filled is not None])

    def forget(self) -> None:
        """Forget what the slots and the experts' cache hold, and which unit came after which."""
        for slot in self.slots:
            if slot.filled is not None:
                wait([slot.filled])
            if slot.unit is not None:
                _unbind(self.units[slot.unit])
            slot.unit = slot.filled = None
        self._last = None
        if self.experts is not None:
            self.experts.forget()

    def close(self) -> None:
        """End the reading threads and close the file; the model cannot run any more."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self.experts is not None:
            self.experts.close()
        self.file.close()


class MappedStreamer(Streamer):
    """The same where units are used in the pages of the file, on a processor: one is held at a time, and the system is
    told which comes next. No slot holds a copy.
    """

    slot_count = 0

    def __init__(self, pages: FilePages, units: Mapping[str, list[Part]], plan: Plan):
        super().__init__(pages.file, units, plan)
        self.pages = pages
        self._mapped = {name: [self._parameter(part.place) for part in units[name]] for name in plan.streamed}
        self._spans = {name: mapped_pages.spans([part.place for part in units[name]]) for name in plan.streamed}

    def _parameter(self, place: Place) -> nn.Parameter:
        return nn.Parameter(self.pages.view(place), requires_grad=False)

    def weights(self, name: str) -> list[nn.Parameter]:
        """Return the weights of unit `name`, bound to its modules; the unit before is given back.

        They hold until the next unit is asked for. Raises UserError where they cannot be read.
        """
        if name in self._kept:
            return self._kept[name]
        before, self._last = self._last, None
        if before is not None:
            self._next[before] = name
            self._give_back(before)
        self.pages.hold(self._spans[name])
        self._last = name
        self.pages.expect(self._spans[self._next[name]])
        _bind(self.units[name], self._mapped[name])
        return self._mapped[name]

    def _give_back(self, name: str) -> None:
        _unbind(self.units[name])
        self.pages.release(self._spans[name])

    def forget(self) -> None:
        """Give back the unit that is held, and forget which unit came after which."""
        if self._last is not None:
            self._give_back(self._last)
        super().forget()


class StreamedHead(nn.Module):
    """Head whose rows come piece by piece: logits [..., V] of hidden [..., H] from as many products."""

    def __init__(self, weight: nn.Parameter, streamer: Streamer, pieces: list[tuple[str, int, int]]):
        super().__init__()
        self.weight, self.bias = weight, None
        self.streamer, self.pieces = streamer, pieces
        self.out_features, self.in_features = weight.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone(memory_format=torch.contiguous_format)  # see `lib.models.structure.architecture.ready`
        logits = hidden.new_empty(*hidden.shape[:-1], self.out_features)
        for name, first, last in self.pieces:
            logits[..., first:last] = nn.functional.linear(hidden, self.streamer.weights(name)[0])
        return logits


class StreamedEmbedding(nn.Module):
    """Embeddings read row by row: ids [B, T] to vectors [B, T, H]; each distinct row once."""

    def __init__(self, weight: nn.Parameter, file: WeightFile, place: Place):
        super().__init__()
        self.weight, self.file, self.place = weight, file, place
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        rows, where_BT = ids_BT.unique(return_inverse=True)
        row = self.place.nbytes // self.place.shape[0]
        memory = buffer(row * len(rows))
        places = [self.place.rows(at, at + 1) for at in rows.tolist()]
        self.file.read(zip(places, memory.split(row)))
        table = memory.view(self.place.dtype).view(len(rows), -1).to(ids_BT.device)
        return nn.functional.embedding(where_BT, table)


def open_streamed(
    folder: Path | str,
    *,
    allowance_bytes: int | None = None,
    memory_ratio: float = 0.35,
    page_cache: str = "keep",
    device: str = "cpu",
) -> nn.Module:
    """Open a checkpoint folder so that at most `allowance_bytes` of its weights are in memory at a time.

    Without `allowance_bytes` it is `memory_ratio` of all weights. `page_cache`: "keep", weights are used where the page
    cache holds them (on a processor, where the system can: `lib.models.offload.mapped_pages`); "copy", they are copied
    from there; "drop", every read comes from the disk. The weights keep the dtype they are stored in. `streamer(model)`
    gives counts and the plan. Raises UserError for an allowance below the smallest possible (which it names) and for a
    damaged checkpoint.
    """
    if page_cache not in PAGE_CACHE:
        raise UserError(f'page_cache "{page_cache}"; expected one of {", ".join(PAGE_CACHE)}')
    found = layout(Path(folder), page_cache == "drop", device)
    model, file, view, sizes, fixed = found.model, found.file, found.view, unit_bytes(found.units), found.fixed
    allowance = round(memory_ratio * found.total) if allowance_bytes is None else allowance_bytes
    plan = residency.plan(sizes, sum(fixed.values()), found.expert_size, found.total, allowance)
    for name in fixed:
        _load(model, name, file, device)
    mapped = page_cache == "keep" and torch.device(device).type == "cpu" and mapped_pages.available()
    pages = FilePages(file) if mapped else None
    made = MappedStreamer(pages, found.units, plan) if mapped else Streamer(file, found.units, plan, device)
    if found.experts and mapped and expert_cache.in_one_piece(found.experts):
        made.experts = MappedExperts(pages, found.experts, plan.expert_slots)
    elif found.experts:
        made.experts = ExpertCache(file, found.experts, plan.expert_slots, device)
    if found.experts:
        for index in found.experts:
            expert_cache.attach(view.blocks[index].feed_forward.experts.module, made.experts, index)
        view.config._experts_implementation = expert_cache.NAME
    _attach(model, view, made, found.embeddings)
    return model


def smallest(folder: Path | str) -> tuple[int, int]:
    """Return the smallest allowance in which the checkpoint in `folder` can run, and all its weights, both in bytes."""
    found = layout(Path(folder), False, "cpu")
    found.file.close()
    return residency.smallest(unit_bytes(found.units), sum(found.fixed.values()), found.expert_size), found.total


def streamer(model: nn.Module) -> Streamer | None:
    """Return what streams the weights of `model`, or None where they are in memory."""
    return getattr(getattr(model, "lm_head", None), "streamer", None)


def _split(parts: list[Part], memory: torch.Tensor) -> list[torch.Tensor]:
    """Return the piece of `memory` that belongs to each part, aligned."""
    found, at = [], 0
    for part in parts:
        found.append(memory[at : at + part.place.nbytes])
        at += aligned(part.place.nbytes)
    return found


def _bind(parts: list[Part], weights: list[nn.Parameter]) -> None:
    for part, weight in zip(parts, weights):
        if part.owner is not None:
            part.owner._parameters[part.leaf] = weight


def _unbind(parts: list[Part]) -> None:
    for part in parts:
        if part.owner is not None:
            part.owner._parameters[part.leaf] = part.empty


def _load(model: nn.Module, name: str, file: WeightFile, device: str) -> None:
    """Read one tensor for good."""
    place = file.places[name]
    memory = buffer(place.nbytes)
    file.read([(place, memory)])
    owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    tensor = memory.view(place.dtype).view(place.shape).to(device)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.to(owner._buffers[leaf].dtype)


def _attach(model: nn.Module, view: Anatomy, made: Streamer, embeddings: Place) -> None:
    """Put the hooks on the units' modules, and a head and embeddings that read."""
    for name, module in unit_modules(view).items():
        if name not in made.plan.resident:
            module.register_forward_pre_hook(functools.partial(made.hook, name))
    pieces, first = [], 0
    for name, parts in made.units.items():
        if name.startswith("head."):
            rows = parts[0].place.shape[0]
            pieces.append((name, first, first + rows))
            first += rows
    view.decoder.embed_tokens = StreamedEmbedding(view.embeddings.weight, made.file, embeddings)
    model.lm_head = StreamedHead(view.head.weight, made, pieces)
    model.register_state_dict_pre_hook(made.refuse)
    model.weights_in_memory_bytes = made.in_memory_bytes
