"""The mixed-integer program against exhaustive search."""

import ctypes
import itertools
import os

import numpy as np
import pytest

from lib.errors import UserError
from lib.optimizations.continuous_nas import mip
from lib.optimizations.continuous_nas.mip import Budget, CostTable


@pytest.fixture
def problem():
    draw = np.random.default_rng(0)
    slots = [f"slot{i}" for i in range(5)]
    names = ["whole", "half", "none"]
    scores = {slot: {name: float(draw.random()) * at for at, name in enumerate(names)} for slot in slots}
    seconds = {slot: dict(zip(names, sorted(draw.random(3), reverse=True))) for slot in slots}
    bytes_ = {slot: dict(zip(names, sorted(1e7 * draw.random(3), reverse=True))) for slot in slots}
    return scores, CostTable("time", seconds, 0.5, "s"), CostTable("memory", bytes_, 1e6, "bytes")


def _everything(scores, budgets):
    slots = list(scores)
    every = [dict(zip(slots, options)) for options in itertools.product(*(scores[slot] for slot in slots))]
    allowed = [choice for choice in every if all(budget.table.of(choice) <= budget.most for budget in budgets)]
    return sorted(allowed, key=lambda choice: CostTable("", scores).of(choice))


def test_the_best_ten_match_exhaustive_search(problem):
    scores, time, memory = problem
    budgets = [Budget(time, 2.2), Budget(memory, 2.2e7)]
    expected = _everything(scores, budgets)[:10]
    choices = mip.solve(scores, budgets, count=10)
    total = CostTable("", scores).of
    assert len(expected) > 3 and choices[0] == expected[0]
    assert [total(choice) for choice in choices] == pytest.approx([total(choice) for choice in expected])
    assert mip.solve(scores, budgets, without=choices[:1])[0] == choices[1]


def test_fewer_solutions_are_returned_where_fewer_exist():
    scores = {"a": {"x": 0.0, "y": 1.0}}
    assert mip.solve(scores, count=5) == [{"a": "x"}, {"a": "y"}]
    assert mip.solve(scores, without=[{"a": "x"}, {"a": "y"}]) == []


def test_unreachable_budgets_name_the_nearest(problem):
    scores, time, _ = problem
    least = min(time.of(choice) for choice in _everything(scores, []))
    with pytest.raises(UserError, match=f"the nearest within reach is {least:.4g} s"):
        mip.solve(scores, [Budget(time, least * 0.9)])
    table = {"a": {"fast": 0.0, "small": 0.0}}
    fast = CostTable("time", {"a": {"fast": 1.0, "small": 3.0}}, unit="s")
    small = CostTable("memory", {"a": {"fast": 5.0, "small": 2.0}}, unit="bytes")
    with pytest.raises(UserError, match=r"together; .* nearest memory within reach is 5 bytes"):
        mip.solve(table, [Budget(fast, 2.0), Budget(small, 3.0)])


def test_empty_slots_are_named():
    with pytest.raises(UserError, match='"b" has no option'):
        mip.solve({"a": {"x": 0.0}, "b": {}})
    with pytest.raises(UserError, match="no slot"):
        mip.solve({})


def test_solver_output_does_not_reach_a_report(problem, monkeypatch, capfd):
    """HiGHS writes a line in C, bypassing Python's output, and C may buffer it until long after the solver's end."""
    c_library, solver = ctypes.CDLL(None), mip.milp

    def talkative(*arguments, **options):
        c_library.printf(b"a stray line\n")
        os.write(1, b"and another\n")
        return solver(*arguments, **options)

    monkeypatch.setattr(mip, "milp", talkative)
    c_library.printf(b"before; ")
    choice = mip.solve(problem[0])
    c_library.printf(b"after")
    c_library.fflush(None)
    assert len(choice[0]) == 5 and capfd.readouterr().out == "before; after"
