"""Choose one option per slot to minimize a sum while other sums stay within budgets: a mixed-integer programme.

Puzzle's second step (Bercovich et al. 2024, section 4): scores and costs of a whole choice are sums over its parts.
Solved exactly by scipy's `milp` (HiGHS).
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lib.errors import NotApplicable, UserError
from lib.optimizations.continuous_nas.replacement_library import Choice

SLACK = 1e-9  # of a budget, for rounding


@dataclass(frozen=True)
class CostTable:
    """An additive cost: `rest` plus `values[slot][option]` over the slots, in one unit."""

    name: str
    values: Mapping[str, Mapping[str, float]]
    rest: float = 0.0
    unit: str = ""

    def of(self, choice: Choice) -> float:
        """Return the cost of a whole choice."""
        return self.rest + sum(self.values[slot][option] for slot, option in choice.items())


@dataclass(frozen=True)
class Budget:
    """A table and the upper limit of its sum."""

    table: CostTable
    most: float

    def held_by(self, choice: Choice) -> bool:
        """Return whether a choice is within the budget, up to rounding."""
        return self.table.of(choice) <= self.most * (1 + SLACK)


def solve(
    scores: Mapping[str, Mapping[str, float]],
    budgets: Sequence[Budget] = (),
    *,
    count: int = 1,
    without: Sequence[Choice] = (),
) -> list[Choice]:
    """Return the `count` choices of lowest total score within every budget, best first; fewer if there are fewer.

    `without` are choices to exclude. Raises NotApplicable if no choice meets the budgets, naming the nearest that can
    be met, and UserError if a slot has no option or there is no slot.
    """
    empty = next((slot for slot, options in scores.items() if not options), None)
    if empty is not None or not scores:
        raise UserError(f'"{empty}" has no option to choose from' if scores else "there is no slot to choose for")
    choices: list[Choice] = []
    while len(choices) < count:
        choice = _least(scores, budgets, [*without, *choices])
        if choice is None:
            break
        choices.append(choice)
    if not choices and budgets and _least(scores, budgets, ()) is None:
        raise NotApplicable(unreachable(scores, budgets))
    return choices


def unreachable(scores: Mapping[str, Mapping[str, float]], budgets: Sequence[Budget]) -> str:
    """Return a message on which budget cannot be met and the nearest that can: each alone, then the last under the
    others.
    """
    for budget in budgets:
        cheapest = _least(budget.table.values, (), ())
        if cheapest is not None and budget.table.of(cheapest) > budget.most:
            nearest = f"the nearest within reach is {budget.table.of(cheapest):.4g} {budget.table.unit}"
            return f"no choice has {_in_words(budget)}; {nearest}".strip()
    *others, last = budgets
    choice = _least(last.table.values, others, ())
    within = " and ".join(_in_words(budget) for budget in others)
    if choice is None:
        return f"no choice has {within} and {_in_words(last)}; loosen one of them"
    return (
        f"no choice has {within} and {_in_words(last)} together; with {within} the nearest {last.table.name} within "
        f"reach is {last.table.of(choice):.4g} {last.table.unit}".strip()
    )


def _in_words(budget: Budget) -> str:
    return f"{budget.table.name} of at most {budget.most:.4g} {budget.table.unit}".strip()


def _least(scores: Mapping[str, Mapping[str, float]], budgets, without) -> Choice | None:
    """Return the choice of lowest score within the budgets and not in `without`, or None."""
    pairs = [(slot, option) for slot, options in scores.items() for option in options]
    index = {pair: at for at, pair in enumerate(pairs)}
    rows, low, high = [], [], []
    for slot in scores:  # one option per slot
        rows.append([float(pair[0] == slot) for pair in pairs])
        low.append(1.0)
        high.append(1.0)
    for budget in budgets:
        room = budget.most - budget.table.rest
        values = [budget.table.values[slot][option] for slot, option in pairs]
        scale = max(abs(room), max(map(abs, values)), 1e-300)  # seconds and bytes: a solver's tolerance is absolute
        rows.append([value / scale for value in values])
        low.append(-np.inf)
        high.append(room / scale + SLACK)
    for choice in without:
        row = np.zeros(len(pairs))
        row[[index[pair] for pair in choice.items()]] = 1
        rows.append(row.tolist())
        low.append(-np.inf)
        high.append(len(scores) - 1)
    objective = np.array([scores[slot][option] for slot, option in pairs])
    objective = objective / max(np.abs(objective).max(), 1e-300)
    with _unprinted():
        solved = milp(
            objective,
            constraints=LinearConstraint(np.array(rows), low, high),
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if solved.x is None:
        return None
    return {slot: option for (slot, option), chosen in zip(pairs, solved.x) if chosen > 0.5}


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Discard writes to the process's standard output: HiGHS prints a line that none of its options silences, and in a
    notebook it would appear in the report. Does nothing without a standard output.
    """
    if os.name != "posix":
        yield
        return
    c_library = ctypes.CDLL(None)
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        c_library.fflush(None)  # keep what C has buffered so far
        os.dup2(nowhere, 1)
        yield
    finally:
        c_library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
