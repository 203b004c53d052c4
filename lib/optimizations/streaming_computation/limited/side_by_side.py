"""Times two programs side by side: fresh processes of both, several times, take turns under each of several memory
limits. Independent of what they compute; makes no verdicts.
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

TURNS, CALLS = 4, 2  # fresh processes per arm (an even number); timed calls per process and limit
ARMS = "baseline", "optimized"


@dataclass(frozen=True)
class Program:
    """An arm: the command that starts it, the file or folder that it opens, and its options."""

    command: Sequence[str]
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Condition:
    """A memory limit and the measurements under it.

    `allowed`: bytes of weights for each arm, empty without a limit. `seconds`: per call, by arm. `answers`: the last
    answer of each process, by arm. `reason`: why nothing was measured.
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
        """Return the timed calls of both arms, measured by each program's own clock."""
        both = self.seconds["baseline"], self.seconds["optimized"]
        return Pairs(*both, self.order, self.disturbed, 1, clock="each program's own clock", process=self.process)

    def held(self, arm: str, kind: str) -> list[int] | None:
        """Return the memory of each process of an arm, in bytes; None if the system does not say.

        `kind`: "peak" under this limit, "file" pages, or "anonymous" memory.
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
    """Measure every condition that has no `reason` yet, one after the other in the same processes.

    `request` is the first request to both programs. A condition in which a process ends gets that as its `reason`, as
    do limits if no control group can be created. Raises UserError if a program does not start.
    """
    with children.folder_on_disk() as place:
        copies = {
            arm: children.copy(program.path, place / arm / program.path.name) for arm, program in programs.items()
        }
        for turn in range(turns):
            with _started(programs, copies, request, reverse=turn % 2 == 1) as (both, no_group):
                for condition in conditions:
                    condition.reason = condition.reason or (no_group if condition.allowed else None)
                    if condition.reason is None and (failed := _turn(condition, both, turn, calls)):
                        condition.reason = failed
                        break  # the processes have ended
    for before, condition in pairwise(conditions):
        if condition.reason is None and not condition.process:
            condition.reason = before.reason


@contextmanager
def _started(
    programs: Mapping[str, Program], copies: Mapping[str, Path], request: Mapping[str, Any], reverse: bool
) -> Iterator[tuple[dict[str, Child], str | None]]:
    """Yield fresh processes of both programs, which have answered the request, and the reason if they have no group.

    The files are first dropped from the page cache, so that the pages of each copy are charged to its own group.
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
    """Add the calls of one turn to `condition`; return None, or the reason if a process failed.

    Each arm makes one uncounted call first; then the arms alternate in going first.
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
