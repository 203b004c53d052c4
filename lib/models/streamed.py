"""A model larger than its memory allowance: its blocks are filled from a file just before they run, and read ahead.

`open_streamed` builds the architecture without weights. A parameter whose weights are elsewhere holds its shape, dtype
and a single NaN: whoever uses it by mistake gets NaN, never an old value. Before a unit (a decoder block, a block of a
vision tower, some rows of the head) runs, a hook gives it views into one of two slots, and one background thread starts
to read the next unit into the other. Embeddings are read row by row, experts by `lib.models.expertcache`. What stays in
memory is decided by `lib.models.residency`. Knows nothing of measuring.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

import functools
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from lib.errors import UserError
from lib.models import expertcache, factors, loading, residency
from lib.models.anatomy import Anatomy, anatomy, synchronise
from lib.models.checkpoint import MANIFEST
from lib.models.expertcache import ExpertCache
from lib.models.residency import Plan
from lib.models.weightfile import Place, WeightFile, aligned, buffer

HEAD_BYTES = 2**25  # rows of the head are read in pieces of about this size, or of the largest block's if smaller
COPYING = "a model whose weights stream from a file cannot be copied; open the file once more instead"


@dataclass(frozen=True)
class Part:
    """One tensor of a unit: where it lies, which module's parameter it becomes (None for rows of the head), and the
    placeholder that stands there while it is not in memory.
    """

    place: Place
    owner: nn.Module | None
    leaf: str
    empty: nn.Parameter | None


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

    def __init__(self, file: WeightFile, units: Mapping[str, list[Part]], plan: Plan, device: str = "cpu"):
        self.file, self.units, self.plan = file, units, plan
        self.device = torch.device(device)
        self.experts: ExpertCache | None = None
        self.slots = [Slot(self._memory(plan.slot_bytes)) for _ in range(residency.SLOTS if plan.streamed else 0)]
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
        raise UserError(COPYING)

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


class StreamedHead(nn.Module):
    """Head whose rows come piece by piece: logits [..., V] of hidden [..., H] from as many products."""

    def __init__(self, weight: nn.Parameter, streamer: Streamer, pieces: list[tuple[str, int, int]]):
        super().__init__()
        self.weight, self.bias = weight, None
        self.streamer, self.pieces = streamer, pieces
        self.out_features, self.in_features = weight.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
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

    Without `allowance_bytes` it is `memory_ratio` of all weights. `page_cache`: "keep", or "drop", so that every read
    comes from the disk. The weights keep the dtype they are stored in. `streamer(model)` gives counts and the plan.
    Raises UserError for an allowance below the smallest possible (which it names) and for a damaged checkpoint.
    """
    if page_cache not in ("keep", "drop"):
        raise UserError(f'page_cache "{page_cache}"; expected one of keep, drop')
    found = _layout(Path(folder), page_cache == "drop", device)
    model, file, view, sizes, fixed = found.model, found.file, found.view, unit_bytes(found.units), found.fixed
    allowance = round(memory_ratio * found.total) if allowance_bytes is None else allowance_bytes
    plan = residency.plan(sizes, sum(fixed.values()), found.expert_size, found.total, allowance)
    for name in fixed:
        _load(model, name, file, device)
    made = Streamer(file, found.units, plan, device)
    if found.experts:
        made.experts = ExpertCache(file, found.experts, plan.expert_slots, device)
        for index in found.experts:
            expertcache.attach(view.blocks[index].feed_forward.experts.module, made.experts, index)
        view.config._experts_implementation = expertcache.NAME
    _attach(model, view, made, found.embeddings)
    return model


def smallest(folder: Path | str) -> tuple[int, int]:
    """Return the smallest allowance in which the checkpoint in `folder` can run, and all its weights, both in bytes."""
    found = _layout(Path(folder), False, "cpu")
    found.file.close()
    return residency.smallest(unit_bytes(found.units), sum(found.fixed.values()), found.expert_size), found.total


@dataclass(frozen=True)
class Layout:
    """A model without weights and where they lie: its units, what stays in memory (name → bytes), its experts (block →
    what gives the places of one; `expert_size` is how many there are, and bytes of one), its embeddings.
    """

    model: nn.Module
    view: Anatomy
    file: WeightFile
    units: dict[str, list[Part]]
    fixed: dict[str, int]
    experts: dict[int, object]
    expert_size: tuple[int, int]
    embeddings: Place
    total: int


def _layout(folder: Path, drop: bool, device: str) -> Layout:
    file = WeightFile(folder, drop=drop)
    model = _skeleton(folder, file, device)
    view = anatomy(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = _place(file, names[id(view.embeddings.weight)])
    head = embeddings if view.tied else _place(file, names[id(view.head.weight)])
    experts = _experts(view, names, file)
    units = _units(view, names, file, experts, head)
    fixed = _fixed(model, view, units, experts, file)
    count = sum(view.blocks[index].feed_forward.experts.count for index in experts)
    size = count, expertcache.expert_bytes(experts) if experts else 0
    total = sum(unit_bytes(units).values()) + sum(fixed.values()) + size[0] * size[1]
    total += 0 if view.tied else embeddings.nbytes
    return Layout(model, view, file, units, fixed, experts, size, embeddings, total)


def streamer(model: nn.Module) -> Streamer | None:
    """Return what streams the weights of `model`, or None where they are in memory."""
    return getattr(getattr(model, "lm_head", None), "streamer", None)


def unit_bytes(units: Mapping[str, list[Part]]) -> dict[str, int]:
    """Return the memory that each unit takes, its tensors aligned."""
    return {name: sum(aligned(part.place.nbytes) for part in parts) for name, parts in units.items()}


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


def _skeleton(folder: Path, file: WeightFile, device: str) -> nn.Module:
    """Build the architecture with a placeholder for every parameter, in the stored shape and dtype."""
    configuration = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = loading._auto(configuration).from_config(configuration)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if manifest.get("sparse"):
        raise UserError(f"{folder}: holds sparsely stored matrices, which cannot be streamed; stream the dense model")
    factors.restore(model, manifest.get("factors", {}))
    model.tie_weights()
    shared = {}
    usual = max(file.places.values(), key=lambda place: place.nbytes).dtype
    for module_name, module in model.named_modules():
        for leaf, old in module._parameters.items():
            name = f"{module_name}.{leaf}" if module_name else leaf
            if old is not None and id(old) not in shared:
                place = file.places.get(name)
                shape, dtype = (old.shape, usual) if place is None else (place.shape, place.dtype)
                one = torch.full((1,), float("nan"), dtype=dtype, device=device)
                shared[id(old)] = nn.Parameter(one.expand(shape), requires_grad=False)
            if old is not None:
                module._parameters[leaf] = shared[id(old)]
        for leaf, old in module._buffers.items():
            module._buffers[leaf] = None if old is None else old.to(device)
    return (synchronise(model) if manifest else model).eval()


def _experts(view: Anatomy, names: Mapping[int, str], file: WeightFile) -> dict[int, object]:
    """Return, per block with routed experts, what gives the places of one: stacked in one tensor, or each by itself."""
    found = {}
    for block in view.blocks:
        experts = block.feed_forward.experts
        if experts is None or isinstance(experts.module, factors.FactoredExperts):
            continue
        stacked = names[id(experts.gate_up)], names[id(experts.down)]
        if all(name in file.places for name in stacked):
            found[block.index] = functools.partial(_stacked_expert, *(file.places[name] for name in stacked))
        else:
            found[block.index] = functools.partial(_single_expert, file, stacked[0].rpartition(".")[0])
    return found


def _stacked_expert(gate_up: Place, down: Place, expert: int) -> list[Place]:
    return [gate_up.element(expert), down.element(expert)]


def _single_expert(file: WeightFile, prefix: str, expert: int) -> list[Place]:
    names = [f"{prefix}.{expert}.{leaf}_proj.weight" for leaf in ("gate", "up", "down")]
    return [_place(file, name) for name in names]


def _place(file: WeightFile, name: str) -> Place:
    if name not in file.places:
        raise UserError(f"{file.folder}: the checkpoint lacks {name}")
    return file.places[name]


def _units(
    view: Anatomy, names: Mapping[int, str], file: WeightFile, experts: Mapping[int, object], head: Place
) -> dict[str, list[Part]]:
    """Return the parts of every unit in order of use: blocks of the vision tower, decoder blocks, rows of the head."""
    units = {}
    for name, module in unit_modules(view).items():
        routed: set[int] = set()
        if name.startswith("block.") and int(name.partition(".")[2]) in experts:
            routed = {id(parameter) for parameter in _routed(view, int(name.partition(".")[2])).parameters()}
        units[name] = [
            Part(_place(file, names[id(parameter)]), owner, leaf, parameter)
            for owner in module.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) not in routed
        ]
    largest = max(unit_bytes({n: parts for n, parts in units.items() if n.startswith("block.")}).values())
    rows = max(1, min(HEAD_BYTES, largest) * head.shape[0] // head.nbytes)
    for first in range(0, head.shape[0], rows):
        units[f"head.{first}"] = [Part(head.rows(first, min(first + rows, head.shape[0])), None, "weight", None)]
    return units


def _routed(view: Anatomy, block: int) -> nn.Module:
    return view.blocks[block].feed_forward.experts.module


def unit_modules(view: Anatomy) -> dict[str, nn.Module]:
    """Return the modules that are units, by name, in order of use: whatever has matrices in the vision tower (the parts
    of its lists one by one), then the decoder blocks.
    """
    found = {}
    for name, child in view.vision.named_children() if view.vision is not None else ():
        members = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for at, member in members:
            if any(isinstance(module, nn.Linear) for module in member.modules()):
                found[f"vision.{name}.{at}".rstrip(".")] = member
    return found | {f"block.{block.index}": block.module for block in view.blocks}


def _fixed(
    model: nn.Module,
    view: Anatomy,
    units: Mapping[str, list[Part]],
    experts: Mapping[int, object],
    file: WeightFile,
) -> dict[str, int]:
    """Return the bytes of everything that always stays in memory: norms, small parts of a vision tower, buffers."""
    elsewhere = {id(part.empty) for parts in units.values() for part in parts}
    elsewhere |= {id(parameter) for index in experts for parameter in _routed(view, index).parameters()}
    elsewhere |= {id(view.embeddings.weight), id(view.head.weight)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in elsewhere]
    stored = {name: _place(file, name) for name in names}
    stored |= {name: file.places[name] for name, _ in model.named_buffers() if name in file.places}
    return {name: aligned(place.nbytes) for name, place in stored.items()}


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
