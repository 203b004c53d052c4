"""Routed experts read on demand, with a cache that evicts the least recently used experts.

Registered in transformers' experts interface under the name `streamed`. The experts in memory compute first, while a
background thread reads the first missing expert; then each expert is read while the previous one computes. The result
is that of transformers' loop over experts, up to rounding. Knows nothing of other streamed weights.

Shapes: E experts, H hidden, I width of one expert, T tokens, K experts per token.
"""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lib.errors import NotApplicable
from lib.models.checkpoints import finite
from lib.models.checkpoints.weight_file import Piece, TensorPlace, WeightFile, aligned, buffer
from lib.models.offload.mapped_pages import FilePages, spans

NAME = "streamed"
NOT_CHANGEABLE = (
    "the weights of this model stream from a file: it can run, but it cannot be copied or changed in memory; "
    "build.py apply changes some checkpoints from file to file"
)
Key = tuple[int, int]  # block, expert
Places = Mapping[int, Callable[[int], list[TensorPlace]]]  # block → function from an expert's index to its places


def require_changeable(model: nn.Module) -> None:
    """Raise NotApplicable if the weights of a model stream from a file."""
    if getattr(model, "weights_in_memory_bytes", None) is not None:
        raise NotApplicable(NOT_CHANGEABLE)


@dataclass(eq=False)
class ExpertSlot:
    """Memory of one expert (uint8), its matrices gate_up [2I, H] and down [H, I] as views, and the pending read."""

    memory: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    filled: Future | None = None


class ExpertCache:
    """A cache in `memory` for at most `slots` experts of all blocks; `hits` and `misses` count requested experts.

    `parts` maps a block to a function from the index of an expert to its places in the file: gate and up (in one or two
    places), then down.
    """

    def __init__(self, file: WeightFile, parts: Places, slots: int, device="cpu"):
        self.file, self.parts = file, parts
        self.hits = self.misses = 0
        *gate_up, self._down = next(iter(parts.values()))(0)
        self._width = sum(place.shape[0] for place in gate_up)
        self._down_at = aligned(sum(place.nbytes for place in gate_up))
        self._cached: OrderedDict[Key, Any] = OrderedDict()  # slots here, pairs of views in `MappedExperts`
        self._finite: set[Key] = set()  # experts already checked for finite values
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")
        size = expert_bytes(parts)
        on_cpu = torch.device(device).type == "cpu"
        self._staging = None if on_cpu else buffer(size, pinned=True)
        self.memory = buffer(slots * size) if on_cpu else torch.empty(slots * size, dtype=torch.uint8, device=device)
        self._free = [self._slot(self.memory[at * size : (at + 1) * size]) for at in range(slots)]

    @property
    def private_bytes(self) -> int:
        """The bytes of weights in this process's private memory."""
        return self.memory.numel()

    def __deepcopy__(self, memo: dict) -> "ExpertCache":
        raise NotApplicable(NOT_CHANGEABLE)

    def _slot(self, memory: torch.Tensor) -> ExpertSlot:
        hidden, inner = self._down.shape
        element = self._down.dtype.itemsize
        gate_up = memory[: self._width * hidden * element].view(self._down.dtype).view(self._width, hidden)
        down = memory[self._down_at : self._down_at + self._down.nbytes].view(self._down.dtype).view(hidden, inner)
        return ExpertSlot(memory, gate_up, down)

    def experts(self, block: int, indices: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (expert, gate_up [2I, H], down [H, I]) for the experts `indices` of a block, those in memory first.

        The views are valid until the next expert is requested. Reading ahead never evicts an expert that is still to be
        yielded, which would then be read twice. Raises UserError if an expert cannot be read.
        """
        present, missing = self._count(block, indices)
        for expert in present:
            self._cached.move_to_end((block, expert))
        order = present + missing
        needed = {(block, expert) for expert in order}
        for at, expert in enumerate(order):
            key = block, expert
            slot = self._cached.get(key) or self._request(key, needed)
            self._cached.move_to_end(key)
            ahead = next((later for later in order[at + 1 :] if (block, later) not in self._cached), None)
            if ahead is not None and (self._free or any(cached not in needed for cached in self._cached)):
                self._request((block, ahead), needed)
            assert slot.filled is not None, "every slot in the cache has been requested"
            try:
                slot.filled.result()
            except BaseException:
                self._free.append(self._cached.pop(key))
                raise
            self._require_finite(key, slot.gate_up, slot.down)
            yield expert, slot.gate_up, slot.down
            needed.discard(key)

    def _require_finite(self, key: Key, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Raise UserError naming an expert with a NaN or infinite value; checks each expert once."""
        if key in self._finite:
            return
        places = self.parts[key[0]](key[1])
        pieces = (*gate_up.split([place.shape[0] for place in places[:-1]]), down)
        for place, tensor in zip(places, pieces):
            finite.require_read(self.file, place, tensor)
        self._finite.add(key)

    def _count(self, block: int, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """Count a request; return its experts in memory and its missing experts."""
        present = [expert for expert in indices if (block, expert) in self._cached]
        missing = [expert for expert in indices if (block, expert) not in self._cached]
        self.hits, self.misses = self.hits + len(present), self.misses + len(missing)
        return present, missing

    def _request(self, key: Key, needed: Collection[Key]) -> ExpertSlot:
        """Start reading an expert into a free slot, or into the slot of an evicted expert; return the slot."""
        slot = self._free.pop() if self._free else self._cached.pop(self._victim(key[0], needed))
        if slot.filled is not None:
            wait([slot.filled])
        slot.filled = self._reader.submit(self._read, key, slot)
        self._cached[key] = slot
        return slot

    def _victim(self, block: int, needed: Collection[Key]) -> Key:
        """Return the expert to evict: the least recently used one outside `needed`, of a block above its even share.

        Blocks run in turn, so a plain least-recently-used policy would always evict what is needed next.
        """
        share = len(self._cached) / len(self.parts)
        counts = Counter(cached_block for cached_block, _ in self._cached)
        evict_own = counts[block] >= share
        others = [key for key in self._cached if key not in needed]
        unfair = (key for key in others if (key[0] == block if evict_own else counts[key[0]] > share))
        return next(unfair, None) or others[0]

    def _read(self, key: Key, slot: ExpertSlot) -> None:
        block, expert = key
        *gate_up, down = self.parts[block](expert)
        memory = slot.memory if self._staging is None else self._staging
        pieces: list[Piece] = [(down, memory[self._down_at : self._down_at + down.nbytes])]
        at = 0
        for place in gate_up:
            pieces.append((place, memory[at : at + place.nbytes]))
            at += place.nbytes
        self.file.read(pieces)
        if self._staging is not None:
            slot.memory.copy_(self._staging)

    def forget(self) -> None:
        """Empty the cache and set the counts to zero."""
        while self._cached:
            self._free.append(self._cached.popitem()[1])
        self.hits = self.misses = 0

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)


class MappedExperts(ExpertCache):
    """An expert cache that uses experts directly in the pages of the mapped file, with at most `slots` experts present.

    Requires gate and up of an expert to be one tensor in the file.
    """

    def __init__(self, pages: FilePages, parts: Places, slots: int):
        self.pages, self.file, self.parts, self.slots = pages, pages.file, parts, slots
        self.hits = self.misses = 0
        self._cached, self._finite = OrderedDict(), set()
        self._spans = functools.cache(lambda key: spans(parts[key[0]](key[1])))

    @property
    def private_bytes(self) -> int:
        """0, since experts are used in the page cache."""
        return 0

    def experts(self, block: int, indices: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (expert, gate_up [2I, H], down [H, I]) for the experts `indices` of a block, those present first.

        At most `slots` missing experts are read ahead at a time; with scarce memory, more would evict each other from
        the page cache before they are used.
        """
        present, missing = self._count(block, indices)
        for expert in missing[: self.slots]:
            self.pages.expect(self._spans((block, expert)))
        for expert in present:
            self._cached.move_to_end((block, expert))
        for expert in present:
            yield expert, *self._weights((block, expert))
        for at, expert in enumerate(missing):
            yield expert, *self._weights((block, expert))
            for later in missing[at + self.slots : at + self.slots + 1]:
                self.pages.expect(self._spans((block, later)))

    def _weights(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        if key not in self._cached:
            if len(self._cached) >= self.slots:
                self._release(self._victim(key[0], {key}))
            self.pages.hold(self._spans(key))
            gate_up, down = (self.pages.view(place) for place in self.parts[key[0]](key[1]))
            self._cached[key] = gate_up, down
        self._require_finite(key, *self._cached[key])
        self._cached.move_to_end(key)
        return self._cached[key]

    def _release(self, key: Key) -> None:
        del self._cached[key]
        self.pages.release(self._spans(key))

    def forget(self) -> None:
        """Release all experts and set the counts to zero."""
        for key in list(self._cached):
            self._release(key)
        self.hits = self.misses = 0

    def close(self) -> None:
        """Release all experts."""
        self.forget()


def in_one_piece(parts: Places) -> bool:
    """Return whether gate and up of an expert are one tensor in the file."""
    return len(next(iter(parts.values()))(0)) == 2


def expert_bytes(parts: Places) -> int:
    """Return the bytes of one expert in the cache."""
    *gate_up, down = next(iter(parts.values()))(0)
    return aligned(sum(place.nbytes for place in gate_up)) + aligned(down.nbytes)


def require_equal(parts: Places, folder: Path | str) -> None:
    """Raise NotApplicable if experts of different blocks differ in shape, since all slots have the same size."""
    shapes = {block: [place.shape for place in of_expert(0)] for block, of_expert in parts.items()}
    first = next(iter(shapes), None)
    for block, shape in shapes.items():
        if first is not None and shape != shapes[first]:
            raise NotApplicable(
                f"{folder}: an expert of block {block} has the shapes {shape}, one of block {first} {shapes[first]}; "
                "experts are streamed in slots of one size, so give each block experts of the same width"
            )


def attach(module: Any, cache: ExpertCache, block: int) -> None:
    """Make the experts module of a block take its weights from `cache` while the experts backend is `streamed`."""
    module.expert_cache, module.expert_block = cache, block


def streamed_experts(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Return Σ_k weight · expert(hidden), [T, H]; called by transformers' experts interface."""
    output_TH = torch.zeros_like(hidden_TH)
    indices = index_TK.unique().tolist()
    for expert, gate_up_JH, down_HI in module.expert_cache.experts(module.expert_block, indices):
        token, position = torch.where(index_TK == expert)
        inner = module._apply_gate(nn.functional.linear(hidden_TH[token], gate_up_JH.to(hidden_TH.dtype)))
        gated = nn.functional.linear(inner, down_HI.to(hidden_TH.dtype)) * weight_TK[token, position, None]
        output_TH.index_add_(0, token, gated.to(output_TH.dtype))
    return output_TH


ALL_EXPERTS_FUNCTIONS.register(NAME, streamed_experts)
