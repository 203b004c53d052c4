"""Streams the weights of one unit at a time: read from a file just before the unit runs, and read ahead.

Before a unit (a decoder block, a block of a vision tower, some rows of the head) runs, a hook binds views of one of two
slots to its modules, and a background thread starts reading the next unit into the other slot. On a CPU, the views may
instead point into the mapped file without a copy; its pages are released afterwards. A parameter that is not in memory
is NaN, never an old value. A value that is not finite in the file is an error at its first read. Knows nothing of which
units stay in memory (`lib.models.offload.residency`).
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.checkpoints import finite
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile, aligned, buffer
from lib.models.offload import expert_cache, mapped_pages, residency
from lib.models.offload.expert_cache import ExpertCache
from lib.models.offload.layout import Part, unit_bytes
from lib.models.offload.mapped_pages import FilePages
from lib.models.offload.residency import Plan


@dataclass(eq=False)
class UnitSlot:
    """Memory for one unit: the unit that it holds or receives, and the pending read."""

    memory: torch.Tensor
    unit: str | None = None
    filled: Future | None = None


class Streamer:
    """Reads units on request, and reads ahead in the order of earlier requests.

    `plan`: which units stay in memory; `file`: counts the bytes read; `experts`: the cache of experts, or None.
    """

    slot_count = residency.SLOTS

    def __init__(self, file: WeightFile, units: Mapping[str, list[Part]], plan: Plan, device: str = "cpu"):
        self.file, self.units, self.plan = file, units, plan
        self.device = torch.device(device)
        self.experts: ExpertCache | None = None
        self.slots = [UnitSlot(self._memory(plan.slot_bytes)) for _ in range(self.slot_count if plan.streamed else 0)]
        self._staging = None if self.device.type == "cpu" else buffer(max(unit_bytes(units).values()), pinned=True)
        self._side = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._views: dict[tuple[str, int], list[nn.Parameter]] = {}
        self._resident: dict[str, list[nn.Parameter]] = {}
        self._next = dict(zip(plan.streamed, [*plan.streamed[1:], *plan.streamed[:1]]))
        self._last: str | None = None
        self._finite: set[str] = set()  # units already checked for finite values
        sizes = unit_bytes(units)
        for name in plan.resident:
            memory = self._memory(sizes[name])
            self._read(name, memory)
            self._resident[name] = self._view(name, memory)
            self._require_finite(name, self._resident[name])
            _bind(units[name], self._resident[name])

    def __deepcopy__(self, memo: dict) -> "Streamer":
        raise NotApplicable(expert_cache.NOT_CHANGEABLE)

    def _memory(self, nbytes: int) -> torch.Tensor:
        on_cpu = self.device.type == "cpu"
        return buffer(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @property
    def in_memory_bytes(self) -> int:
        """The bytes of weights that the plan allows in memory."""
        return self.plan.in_memory_bytes

    @property
    def private_bytes(self) -> int:
        """The bytes of weights in this process's private memory, without those used in the page cache."""
        slots = sum(slot.memory.numel() for slot in self.slots)
        experts = self.experts.private_bytes if self.experts is not None else 0
        return self.plan.fixed_bytes + self.plan.resident_bytes + slots + experts

    def weights(self, name: str) -> list[nn.Parameter]:
        """Return the weights of unit `name`, bound to its modules, and start reading the next unit.

        They are valid until the next request. Raises UserError if they cannot be read.
        """
        if name in self._resident:
            return self._resident[name]
        slot = next((slot for slot in self.slots if slot.unit == name), None)
        if slot is None:
            slot = next((slot for slot in self.slots if slot.unit in (None, self._last)), self.slots[0])
            self._fill(slot, name)
        if self._last is not None:
            self._next[self._last] = name
        assert slot.filled is not None
        try:
            slot.filled.result()
        except BaseException:
            slot.unit = None
            raise
        self._last = name
        free_slot = self.slots[1 - self.slots.index(slot)]
        if (ahead := self._next[name]) != name and free_slot.unit != ahead:
            self._fill(free_slot, ahead)
        views = self._views_of(name, self.slots.index(slot))
        self._require_finite(name, views)
        _bind(self.units[name], views)
        return views

    def _require_finite(self, name: str, weights: list[nn.Parameter]) -> None:
        """Raise UserError naming a weight of unit `name` with a NaN or infinite value; checks each unit once."""
        if name not in self._finite:
            for part, weight in zip(self.units[name], weights):
                finite.require_read(self.file, part.place, weight)
            self._finite.add(name)

    def _fill(self, slot: UnitSlot, name: str) -> None:
        """Start reading a unit into a slot, after unbinding the weights of the unit in it."""
        if slot.filled is not None:
            wait([slot.filled])
        if slot.unit is not None:
            _unbind(self.units[slot.unit])
        ready = None if self._side is None else torch.cuda.current_stream(self.device).record_event()
        slot.unit, slot.filled = name, self._reader.submit(self._read, name, slot.memory, ready)

    def _read(self, name: str, memory: torch.Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Read a unit into memory; on CUDA through pinned memory and a side stream, after the event `ready`."""
        target = memory if self._staging is None else self._staging
        self.file.read(zip([part.place for part in self.units[name]], _split(self.units[name], target)))
        if self._staging is not None and self._side is not None:
            with torch.cuda.stream(self._side):
                if ready is not None:
                    self._side.wait_event(ready)
                memory.copy_(target[: memory.numel()], non_blocking=True)
            self._side.synchronize()

    def _view(self, name: str, memory: torch.Tensor) -> list[nn.Parameter]:
        parts = self.units[name]
        raw = zip(parts, _split(parts, memory))
        return [
            nn.Parameter(piece.view(part.place.dtype).view(part.place.shape), requires_grad=False)
            for part, piece in raw
        ]

    def _views_of(self, name: str, slot: int) -> list[nn.Parameter]:
        if (name, slot) not in self._views:
            self._views[name, slot] = self._view(name, self.slots[slot].memory)
        return self._views[name, slot]

    def hook(self, name: str, module: nn.Module, args: tuple) -> None:
        """Bind the weights of a module before it runs."""
        self.weights(name)

    def refuse(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Raise UserError instead of returning a state dictionary, whose weights are not in memory."""
        raise UserError(
            f"{self.file.folder}: the weights of this model stream from here and are not in memory; "
            "copy that folder, or load it whole"
        )

    def settle(self) -> None:
        """Wait for pending reads."""
        wait([slot.filled for slot in self.slots if slot.filled is not None])

    def forget(self) -> None:
        """Empty the slots and the cache of experts, and forget the order of units."""
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
        """Stop the reading threads and close the file; the model can no longer run."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self.experts is not None:
            self.experts.close()
        self.file.close()


class MappedStreamer(Streamer):
    """A streamer that uses units directly in the pages of the mapped file, on a CPU, without a copy.

    Holds one unit at a time, while the system reads the next one ahead.
    """

    slot_count = 0

    def __init__(self, pages: FilePages, units: Mapping[str, list[Part]], plan: Plan):
        super().__init__(pages.file, units, plan)
        self.pages = pages
        self._mapped = {name: [self._parameter(part.place) for part in units[name]] for name in plan.streamed}
        self._spans = {name: mapped_pages.spans([part.place for part in units[name]]) for name in plan.streamed}

    def _parameter(self, place: TensorPlace) -> nn.Parameter:
        return nn.Parameter(self.pages.view(place), requires_grad=False)

    def weights(self, name: str) -> list[nn.Parameter]:
        """Return the weights of unit `name`, bound to its modules, after releasing the previous unit.

        They are valid until the next request. Raises UserError if they cannot be read.
        """
        if name in self._resident:
            return self._resident[name]
        before, self._last = self._last, None
        if before is not None:
            self._next[before] = name
            self._release(before)
        self.pages.hold(self._spans[name])
        self._last = name
        self.pages.expect(self._spans[self._next[name]])
        self._require_finite(name, self._mapped[name])
        _bind(self.units[name], self._mapped[name])
        return self._mapped[name]

    def _release(self, name: str) -> None:
        _unbind(self.units[name])
        self.pages.release(self._spans[name])

    def forget(self) -> None:
        """Release the current unit, and forget the order of units."""
        if self._last is not None:
            self._release(self._last)
        super().forget()


def _split(parts: list[Part], memory: torch.Tensor) -> list[torch.Tensor]:
    """Return the aligned piece of `memory` for each part."""
    pieces, at = [], 0
    for part in parts:
        pieces.append(memory[at : at + part.place.nbytes])
        at += aligned(part.place.nbytes)
    return pieces


def _bind(parts: list[Part], weights: list[nn.Parameter]) -> None:
    """Bind weights to the modules of a unit, converted to the model's dtype if they are stored in another one."""
    for part, weight in zip(parts, weights):
        if part.owner is not None and part.empty is not None:
            same = weight.dtype == part.empty.dtype
            converted = weight if same else nn.Parameter(weight.to(part.empty.dtype), requires_grad=False)
            part.owner._parameters[part.leaf] = converted


def _unbind(parts: list[Part]) -> None:
    for part in parts:
        if part.owner is not None:
            part.owner._parameters[part.leaf] = part.empty
