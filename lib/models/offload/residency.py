"""Plans, from byte counts, which weights stay in memory under an allowance and which are read for every token.

A unit is the set of weights needed at once: a decoder block, a block of a vision tower, some rows of the head. All
units are used once per token, so each resident byte saves reading one byte per token, whichever unit it belongs to. A
cached expert saves reading only when tokens are routed to it, so experts come last. Two slots of the size of the
largest streamed unit are the double buffer. Knows nothing of files, tensors or torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lib.errors import NotApplicable

LEAST_EXPERTS = 2  # one computes while one is read
SLOTS = 2


@dataclass(frozen=True)
class Plan:
    """What stays in memory under an allowance, in bytes. `resident` and `streamed`: names of units, in order of use."""

    allowance_bytes: int
    total_bytes: int
    fixed_bytes: int
    resident: tuple[str, ...]
    resident_bytes: int
    streamed: tuple[str, ...]
    streamed_bytes: int
    slot_bytes: int
    expert_slots: int
    expert_bytes: int

    @property
    def in_memory_bytes(self) -> int:
        """The maximum bytes of weights in memory: fixed parts, resident units, double buffer, cache of experts."""
        slots = SLOTS * self.slot_bytes if self.streamed else 0
        return self.fixed_bytes + self.resident_bytes + slots + self.expert_slots * self.expert_bytes


def plan(units: Mapping[str, int], fixed: int, experts: tuple[int, int], total: int, allowance: int) -> Plan:
    """Return the plan that streams the fewest bytes within `allowance` bytes.

    `units`: name → bytes in order of use; `fixed`: bytes that always stay; `experts`: number, and bytes of one;
    `total`: bytes of the whole model. Raises NotApplicable, naming the smallest allowance, if `allowance` is too small.
    """
    count, expert = experts
    reserve = fixed + min(LEAST_EXPERTS, count) * expert
    descending = sorted(units, key=units.__getitem__, reverse=True)
    if allowance < (least := smallest(units, fixed, experts)):
        raise NotApplicable(
            f"a memory allowance of {allowance} bytes is too small for this model: its largest layer has to fit twice, "
            f"one being used and one being read; the smallest possible is {least} bytes "
            f"(a memory_ratio of {math.ceil(1000 * least / total) / 1000} of its {total} bytes)"
        )
    chosen: set[str] = set()
    best = -1
    for largest, cost in enumerate(_costs(units, descending)):
        spare = allowance - reserve - cost
        if spare >= 0:
            candidate = {*descending[:largest], *_fitting(units, descending[largest + 1 :], spare)}
            size = sum(units[name] for name in candidate)
            if size > best:
                chosen, best = candidate, size
    streamed = tuple(name for name in units if name not in chosen)
    slot = max((units[name] for name in streamed), default=0)
    remaining = allowance - fixed - max(best, 0) - (SLOTS * slot if streamed else 0)
    slots = min(count, max(min(LEAST_EXPERTS, count), remaining // expert)) if count else 0
    return Plan(
        allowance, total, fixed, tuple(name for name in units if name in chosen), max(best, 0),
        streamed, sum(units[name] for name in streamed), slot, slots, expert,
    )  # fmt: skip


def smallest(units: Mapping[str, int], fixed: int, experts: tuple[int, int]) -> int:
    """Return the smallest allowance in bytes for which there is a plan."""
    count, expert = experts
    descending = sorted(units, key=units.__getitem__, reverse=True)
    return fixed + min(LEAST_EXPERTS, count) * expert + min(_costs(units, descending))


def _costs(units: Mapping[str, int], descending: list[str]) -> list[int]:
    """Return the bytes needed to keep the k largest units and stream the others, for k = 0, 1, … all."""
    costs, resident = [], 0
    for name in descending:
        costs.append(resident + SLOTS * units[name])
        resident += units[name]
    return [*costs, resident]


def _fitting(units: Mapping[str, int], names: list[str], spare: int) -> list[str]:
    """Return the units of `names` (largest first) that fit into `spare` bytes together, chosen greedily."""
    fitting = []
    for name in names:
        if units[name] <= spare:
            fitting.append(name)
            spare -= units[name]
    return fitting
