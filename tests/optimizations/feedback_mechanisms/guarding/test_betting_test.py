"""The sequential test on planted means: no alarm in quiet streams, breaches are detected."""

import numpy as np
import pytest

from lib.errors import UserError
from lib.optimizations.feedback_mechanisms.guarding.betting_test import BreachTest


def first_breach(losses, bound, alpha):
    test = BreachTest(bound, alpha)
    for count, loss in enumerate(losses, start=1):
        if test.add(float(loss)):
            return count
    return None


@pytest.mark.parametrize("shape", ["flat", "bernoulli", "skewed"])
def test_false_alarms_stay_below_alpha_at_any_number_of_looks(shape):
    random, bound, alpha, false = np.random.default_rng(4), 0.1, 0.05, 0
    for _ in range(400):
        losses = {
            "flat": lambda: random.uniform(0, 2 * bound, 200),
            "bernoulli": lambda: random.random(200) < bound,
            "skewed": lambda: random.beta(0.2, 1.8, 200),
        }[shape]()
        false += first_breach(losses, bound, alpha) is not None
    assert false <= 400 * alpha + 2.33 * np.sqrt(400 * alpha * (1 - alpha))


def test_a_breach_is_found_and_a_large_one_early():
    random = np.random.default_rng(5)
    small = [first_breach(random.random(400) < 0.25, 0.1, 0.01) for _ in range(50)]
    large = [first_breach(random.random(400) < 0.9, 0.1, 0.01) for _ in range(50)]
    assert None not in large and max(large) <= 12
    assert sum(count is None for count in small) <= 1
    assert np.median([count for count in small if count]) > np.median(large)


@pytest.mark.parametrize("values", [{"bound": 0.0}, {"bound": 1.0}, {"bound": 0.1, "alpha": 0.0}])
def test_bounds_out_of_range_are_refused(values):
    with pytest.raises(UserError, match="between 0 and 1"):
        BreachTest(**values)


def test_a_loss_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"loss 1\.5"):
        BreachTest(0.1).add(1.5)
