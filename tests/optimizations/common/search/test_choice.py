"""Near-ties: noise within the practical margin does not change the choice."""

import numpy as np
import pytest

from lib.optimizations.common.search import choice


def test_near_tie_noise_does_not_change_the_choice():
    """With three equally fast candidates and a slower one, 200 noisy timings choose the same one each time."""
    random = np.random.default_rng(0)
    true = {"one step": 0.8, "two steps": 0.8, "three steps": 0.8, "nothing": 1.0}
    chosen = set()
    for _ in range(200):
        timed = {name: value * float(np.exp(random.uniform(-0.009, 0.009))) for name, value in true.items()}
        chosen.add(choice.steady(list(timed), timed.__getitem__, list(true).index))
    assert chosen == {"one step"}


def test_a_gain_beyond_the_margin_is_taken():
    timed = {"first": 1.0, "second": 0.97}
    assert choice.steady(list(timed), timed.__getitem__, list(timed).index) == "second"
    assert choice.steady(list(timed), timed.__getitem__, list(timed).index, margin=0.05) == "first"
    with pytest.raises(ValueError, match="no candidate"):
        choice.steady([], float, str)


def test_zero_costs_are_valid_near_ties():
    cost = {"much changed": 0.0, "little changed": 0.0, "dear": 0.1}
    assert choice.steady(list(cost), cost.__getitem__, list(reversed(cost)).index) == "little changed"
