"""Routed experts read on demand: only what a token is routed to, with a cache that gives up the least recently used.

Registered in transformers' experts interface under the name `streamed`: the experts that are in memory compute first,
while a background thread reads the first of those that are not; then each is read while the one before it computes.
The sum is that of transformers' own loop over experts, up to rounding.

Shapes: E experts, H hidden, I width of one expert, T tokens, K experts per token.
"""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lib.errors import NotApplicable
from lib.models.checkpoints.weight_file import Piece, Place, WeightFile, aligned, buffer
from lib.models.offload.mapped_pages import FilePages, spans

NAME = "streamed"
COPYING = "the weights of this model stream from a file: it can run, but it cannot be copied or changed"
Key = tuple[int, int]  # block, expert


def require_changeable(model: nn.Module) -> None:
    """Raise NotApplicable where a model's weights stream from a file."""
    if getattr(model, "weights_in_memory_bytes", None) is not None:
        raise NotApplicable(COPYING)


@dataclass(eq=False)
class Slot:
    """Memory of one expert (uint8), its matrices gate_up [2I, H] and down [H, I] as views, and the read filling it."""

    memory: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    filled: Future | None = None


class ExpertCache:
    """At most `slots` experts of all blocks in `memory`; `hits` and `misses` count the experts asked for.

    `parts` maps a block to a function from an expert's index to its places in the file: gate and up (as one or as
    two), then down.
    """

    def __init__(self, file: WeightFile, parts: Mapping[int, Callable[[int], list[Place]]], slots: int, device="cpu"):
        self.file, self.parts = file, parts
        self.hits = self.misses = 0
        *gate_up, self._down = next(iter(parts.values()))(0)
        self._width = sum(place.shape[0] for place in gate_up)
        self._down_at = aligned(sum(place.nbytes for place in gate_up))
        self._held: OrderedDict[Key, Slot] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")
        size = expert_bytes(parts)
        on_cpu = torch.device(device).type == "cpu"
        self._staging = None if on_cpu else buffer(size, pinned=True)
        self.memory = buffer(slots * size) if on_cpu else torch.empty(slots * size, dtype=torch.uint8, device=device)
        self._free = [self._slot(self.memory[at * size : (at + 1) * size]) for at in range(slots)]

    def __deepcopy__(self, memo: dict) -> "ExpertCache":
        raise NotApplicable(COPYING)

    def _slot(self, memory: torch.Tensor) -> Slot:
        hidden, inner = self._down.shape
        element = self._down.dtype.itemsize
        gate_up = memory[: self._width * hidden * element].view(self._down.dtype).view(self._width, hidden)
        down = memory[self._down_at : self._down_at + self._down.nbytes].view(self._down.dtype).view(hidden, inner)
        return Slot(memory, gate_up, down)

    def experts(self, block: int, wanted: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (expert, gate_up [2I, H], down [H, I]) for every wanted expert of a block, those in memory first.

        The views hold until the next one is asked for. Raises UserError where an expert cannot be read.
        """
        here = [expert for expert in wanted if (block, expert) in self._held]
        missing = [expert for expert in wanted if (block, expert) not in self._held]
        self.hits, self.misses = self.hits + len(here), self.misses + len(missing)
        for expert in here:
            self._held.move_to_end((block, expert))
        order = here + missing
        for at, expert in enumerate(order):
            key = block, expert
            slot = self._held.get(key) or self._request(key, busy=key)
            self._held.move_to_end(key)
            ahead = [other for other in order[at + 1 :] if (block, other) not in self._held]
            if ahead and len(self._held) + len(self._free) > 1:
                self._request((block, ahead[0]), busy=key)
            try:
                slot.filled.result()
            except BaseException:
                self._free.append(self._held.pop(key))
                raise
            yield expert, slot.gate_up, slot.down

    def _request(self, key: Key, busy: Key) -> Slot:
        """Start reading an expert into a free slot, or into one that is given up."""
        slot = self._free.pop() if self._free else self._held.pop(self._victim(key[0], busy))
        if slot.filled is not None:
            wait([slot.filled])
        slot.filled = self._reader.submit(self._read, key, slot)
        self._held[key] = slot
        return slot

    def _victim(self, block: int, busy: Key) -> Key:
        """Return the least recently used expert, but not `busy`, of a block that holds more than its even share.

        Blocks come round in turn, so that plain least-recently-used would always give up what is needed next.
        """
        share = len(self._held) / len(self.parts)
        counts = Counter(held for held, _ in self._held)
        own = counts[block] >= share
        unfair = (key for key in self._held if key != busy and (key[0] == block if own else counts[key[0]] > share))
        return next(unfair, None) or next(key for key in self._held if key != busy)

    def _read(self, key: Key, slot: Slot) -> None:
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
        while self._held:
            self._free.append(self._held.popitem()[1])
        self.hits = self.misses = 0

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)


class MappedExperts(ExpertCache):
    """The same where experts are used in the pages of the file: at most `slots` of them are held at a time.

    For experts whose gate and up lie in one piece.
    """

    def __init__(self, pages: FilePages, parts: Mapping[int, Callable[[int], list[Place]]], slots: int):
        self.pages, self.parts, self.slots = pages, parts, slots
        self.hits = self.misses = 0
        self._held: OrderedDict[Key, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._spans = functools.cache(lambda key: spans(parts[key[0]](key[1])))

    def experts(self, block: int, wanted: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (expert, gate_up [2I, H], down [H, I]) for every wanted expert of a block, those held already first."""
        here = [expert for expert in wanted if (block, expert) in self._held]
        missing = [expert for expert in wanted if (block, expert) not in self._held]
        self.hits, self.misses = self.hits + len(here), self.misses + len(missing)
        for expert in missing:
            self.pages.expect(self._spans((block, expert)))
        for expert in here:
            self._held.move_to_end((block, expert))
        for expert in here + missing:
            yield expert, *self._weights((block, expert))

    def _weights(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        if key not in self._held:
            if len(self._held) >= self.slots:
                self._give_back(self._victim(key[0], key))
            self.pages.hold(self._spans(key))
            self._held[key] = tuple(self.pages.view(place) for place in self.parts[key[0]](key[1]))
        self._held.move_to_end(key)
        return self._held[key]

    def _give_back(self, key: Key) -> None:
        del self._held[key]
        self.pages.release(self._spans(key))

    def forget(self) -> None:
        """Give back every expert and set the counts to zero."""
        for key in list(self._held):
            self._give_back(key)
        self.hits = self.misses = 0

    def close(self) -> None:
        """Give back every expert."""
        self.forget()


def in_one_piece(parts: Mapping[int, Callable[[int], list[Place]]]) -> bool:
    """Return whether gate and up of an expert are one tensor in the file."""
    return len(next(iter(parts.values()))(0)) == 2


def expert_bytes(parts: Mapping[int, Callable[[int], list[Place]]]) -> int:
    """Return the bytes that one expert takes in the cache."""
    *gate_up, down = next(iter(parts.values()))(0)
    return aligned(sum(place.nbytes for place in gate_up)) + aligned(down.nbytes)


def attach(module: nn.Module, cache: ExpertCache, block: int) -> None:
    """Make the experts `module` of a block take its weights from `cache` while the backend is `streamed`."""
    module.expert_cache, module.expert_block = cache, block


def streamed_experts(
    module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Return Σ_k weight · expert(hidden) [T, H]; the experts interface calls this."""
    output_TH = torch.zeros_like(hidden_TH)
    wanted = index_TK.unique().tolist()
    for expert, gate_up_JH, down_HI in module.expert_cache.experts(module.expert_block, wanted):
        token, position = torch.where(index_TK == expert)
        inner = module._apply_gate(nn.functional.linear(hidden_TH[token], gate_up_JH))
        gated = nn.functional.linear(inner, down_HI) * weight_TK[token, position, None]
        output_TH.index_add_(0, token, gated.to(output_TH.dtype))
    return output_TH


ALL_EXPERTS_FUNCTIONS.register(NAME, streamed_experts)
