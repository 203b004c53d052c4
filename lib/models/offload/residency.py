"""What of a model stays in memory under an allowance, and what is read again each time: a plan in bytes, no tensors.

A unit is what is needed at once: a decoder block, a block of a vision tower, some rows of the head. All units are used
once per token, so each resident byte saves one byte of reading per token, whichever unit it belongs to; a cached expert
saves only as often as it is routed to, so experts come last. Two slots of the largest streamed unit's size make the
double buffer. Knows nothing of files or of torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lib.errors import UserError

LEAST_EXPERTS = 2  # one that computes, one that is read meanwhile
SLOTS = 2


@dataclass(frozen=True)
class Plan:
    """Bytes under an allowance. `resident` and `streamed` name units, in the order of their use."""

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
        """Weights in memory at most: fixed parts, resident units, the double buffer, the experts' cache."""
        slots = SLOTS * self.slot_bytes if self.streamed else 0
        return self.fixed_bytes + self.resident_bytes + slots + self.expert_slots * self.expert_bytes


def plan(units: Mapping[str, int], fixed: int, experts: tuple[int, int], total: int, allowance: int) -> Plan:
    """Return the plan that streams the fewest bytes within `allowance` bytes.

    `units`: name → bytes in order of use; `fixed`: bytes that always stay; `experts`: how many, and bytes of one;
    `total`: bytes of the whole model. Raises UserError, naming the smallest allowance, where this one is too small.
    """
    count, expert = experts
    reserve = fixed + min(LEAST_EXPERTS, count) * expert
    descending = sorted(units, key=units.__getitem__, reverse=True)
    if allowance < (least := smallest(units, fixed, experts)):
        raise UserError(
            f"a memory allowance of {allowance} bytes is too small for this model: its largest layer has to fit twice, "
            f"one being used and one being read; the smallest possible is {least} bytes "
            f"(a memory_ratio of {math.ceil(1000 * least / total) / 1000} of its {total} bytes)"
        )
    chosen: set[str] = set()
    best = -1
    for kept, cost in enumerate(_costs(units, descending)):
        spare = allowance - reserve - cost
        if spare >= 0:
            found = {*descending[:kept], *_fitting(units, descending[kept + 1 :], spare)}
            size = sum(units[name] for name in found)
            if size > best:
                chosen, best = found, size
    streamed = tuple(name for name in units if name not in chosen)
    slot = max((units[name] for name in streamed), default=0)
    left = allowance - fixed - max(best, 0) - (SLOTS * slot if streamed else 0)
    slots = min(count, max(min(LEAST_EXPERTS, count), left // expert)) if count else 0
    return Plan(
        allowance, total, fixed, tuple(name for name in units if name in chosen), max(best, 0),
        streamed, sum(units[name] for name in streamed), slot, slots, expert,
    )  # fmt: skip


def smallest(units: Mapping[str, int], fixed: int, experts: tuple[int, int]) -> int:
    """Return the smallest allowance, in bytes, for which there is a plan."""
    count, expert = experts
    descending = sorted(units, key=units.__getitem__, reverse=True)
    return fixed + min(LEAST_EXPERTS, count) * expert + min(_costs(units, descending))


def _costs(units: Mapping[str, int], descending: list[str]) -> list[int]:
    """Return what it takes to keep the k largest units and stream the others, for k = 0 … all."""
    costs, kept = [], 0
    for name in descending:
        costs.append(kept + SLOTS * units[name])
        kept += units[name]
    return [*costs, kept]


def _fitting(units: Mapping[str, int], names: list[str], spare: int) -> list[str]:
    """Return which of `names`, the largest first, fit into `spare` bytes beside each other."""
    found = []
    for name in names:
        if units[name] <= spare:
            found.append(name)
            spare -= units[name]
    return found
