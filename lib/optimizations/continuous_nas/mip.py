"""Choosing one option per slot so that a sum is least and other sums stay within budgets: a mixed-integer programme.

Puzzle's second step (Bercovich et al. 2024, section 4): scores and costs of a whole are sums over its parts. Solved
exactly by scipy's `milp` (HiGHS). Knows nothing of what a slot or an option is.
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
    """A cost that adds up: `rest`, and `values[slot][option]`, in one unit."""

    name: str
    values: Mapping[str, Mapping[str, float]]
    rest: float = 0.0
    unit: str = ""

    def of(self, choice: Choice) -> float:
        """Return the cost of a whole choice."""
        return self.rest + sum(self.values[slot][option] for slot, option in choice.items())


@dataclass(frozen=True)
class Budget:
    """A table and the most that its sum may be."""

    table: CostTable
    most: float

    def held_by(self, choice: Choice) -> bool:
        """Whether a choice costs no more, but for rounding."""
        return self.table.of(choice) <= self.most * (1 + SLACK)


def solve(
    scores: Mapping[str, Mapping[str, float]],
    budgets: Sequence[Budget] = (),
    *,
    count: int = 1,
    without: Sequence[Choice] = (),
) -> list[Choice]:
    """Return the `count` choices of least total score within every budget, best first; fewer where there are fewer.

    `without` are choices not to be returned. Raises NotApplicable where no choice meets the budgets, with the nearest
    that can be met; and where a slot has no option.
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
    """Return which budgets cannot be met, and the nearest that can: each alone, then the last under the others."""
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
    """Return the choice of least score within the budgets that is none of `without`, or None."""
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
    """Keep what is written to the process's standard output meanwhile from it: HiGHS has a line that no option of its
    own silences, and in a notebook it would stand in the report. Where there is no standard output, nothing is done.
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
        c_library.fflush(None)  # what C holds back from before is no line of the solver's
        os.dup2(nowhere, 1)
        yield
    finally:
        c_library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
