"""Two programs beside each other: fresh processes of both, several times, which take turns at each of several limits of
memory. Knows nothing of what they compute, and judges nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.measure.metrics.pairs import Pairs
from lib.measure.timing.interleaved import BASELINE_FIRST, OPTIMIZED_FIRST
from lib.optimizations.streaming_computation.limited import children, control_group
from lib.optimizations.streaming_computation.limited.children import Child
from lib.optimizations.streaming_computation.limited.serving import RESET

TURNS, CALLS = 4, 2  # fresh processes of each arm, an even number; timed calls in each of them under each limit
ARMS = "baseline", "optimized"


@dataclass(frozen=True)
class Program:
    """An arm: the command that starts it, the file or folder that it opens, and its options."""

    command: Sequence[str]
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Condition:
    """A limit of memory, and what was measured under it.

    `allowed`: bytes of weights for each arm, empty without a limit. `seconds` are per call, by arm; `answers` the last
    one of each process, by arm. `reason` says why nothing was measured.
    """

    name: str
    allowed: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    order: list[str] = field(default_factory=list)
    disturbed: list[str | None] = field(default_factory=list)
    process: list[int] = field(default_factory=list)

    def pairs(self) -> Pairs:
        """Return the timed calls of both arms, by each program's own clock."""
        both = self.seconds["baseline"], self.seconds["optimized"]
        return Pairs(*both, self.order, self.disturbed, 1, clock="each program's own clock", process=self.process)

    def held(self, arm: str, kind: str) -> list[int] | None:
        """Return what each process of an arm held, in bytes: its "peak" under this limit, pages of a "file", or
        "anonymous" memory. None where the system does not say.
        """
        values = [answer["memory"].get(kind) for answer in self.answers[arm]]
        return None if None in values else values


def measure(
    programs: Mapping[str, Program],
    request: Mapping[str, Any],
    conditions: Sequence[Condition],
    *,
    turns: int = TURNS,
    calls: int = CALLS,
) -> None:
    """Fill the conditions that have no `reason` yet, one after the other in the same processes.

    `request` is what both programs are asked first. A condition in which a process ends gets that reason, and so do
    limits where no control group can be made. Raises UserError where a program does not start.
    """
    with children.folder_on_disk() as place:
        copies = {arm: children.copy(each.path, place / arm / each.path.name) for arm, each in programs.items()}
        for turn in range(turns):
            with _started(programs, copies, request, reverse=turn % 2 == 1) as (both, no_group):
                for condition in conditions:
                    condition.reason = condition.reason or (no_group if condition.allowed else None)
                    if condition.reason is None and (failed := _turn(condition, both, turn, calls)):
                        condition.reason = failed
                        break  # what has ended cannot go on
    for before, condition in pairwise(conditions):
        if condition.reason is None and not condition.process:
            condition.reason = before.reason


@contextmanager
def _started(
    programs: Mapping[str, Program], copies: Mapping[str, Path], request: Mapping[str, Any], reverse: bool
) -> Iterator[tuple[dict[str, Child], str | None]]:
    """Yield fresh processes of both programs, which have answered the request, and why they are in no group, or None.

    The files are dropped from the page cache first, so that each group pays for the pages of its own copy.
    """
    groups, no_group, both = {}, None, {}
    with ExitStack() as stack:
        try:
            groups = {arm: stack.enter_context(control_group.group()) for arm in programs}
        except UserError as error:
            no_group = str(error)
        for arm in sorted(programs, reverse=reverse):
            children.drop(copies[arm])
            own_request = {**request, "path": str(copies[arm]), "options": dict(programs[arm].options)}
            both[arm] = stack.enter_context(children.started(programs[arm].command, own_request, groups.get(arm)))
        yield both, no_group


def _turn(condition: Condition, both: Mapping[str, Child], turn: int, calls: int) -> str | None:
    """Add the calls of one turn, of which each arm is first in every other one, after one of each that is not counted;
    return None, or why a process could not go on.
    """
    try:
        for arm, nbytes in condition.allowed.items():
            both[arm].limit(nbytes)
        for child in both.values():
            child.ask(RESET)
            child()
        for call in range(calls):
            order = BASELINE_FIRST if (turn + call) % 2 == 0 else OPTIMIZED_FIRST
            close = children.watch([*both.values()])
            for arm in ARMS if order == BASELINE_FIRST else ARMS[::-1]:
                both[arm]()
            condition.disturbed.append(close())
            condition.order.append(order)
            condition.process.append(turn)
            for arm, child in both.items():
                condition.seconds[arm].append(child.answers[-1]["seconds"])
    except UserError as error:
        return str(error)
    for arm, child in both.items():
        condition.answers[arm].append(child.answers[-1])
    return None
