"""Digits follow the interval, and the printed interval contains the exact one."""

import math
import random

import pytest

from lib.measure.metrics.digits import interval, outward, percent, places, with_ends


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (1.31, 1.28, 1.34, ("1.310", "1.280–1.340")),
        (0.94, 0.84, 1.06, ("0.94", "0.84–1.06")),
        (1.002, 1.0004, 1.0036, ("1.0020", "1.0004–1.0036")),
        (2.17, 1.16, 8.13, ("2.2", "1.1–8.2")),
        (1.02, 1.0004, 1.04, ("1.0200", "1.0004–1.0400")),  # the lower end is not printed as 1
        (1.31, 1.31, 1.31, ("1.31", "1.31–1.31")),
    ],
)
def test_intervals_have_two_digits_of_the_half_width_rounded_outward(value, low, high, shown):
    assert with_ends(value, low, high) == shown


def test_changes_are_printed_with_signs():
    assert with_ends(-0.3, -3, 1, 0, signs=True) == ("−0.3", "−3.0 to +1.0")
    assert with_ends(2.3, 0.2, 5, 0, signs=True) == ("+2.3", "+0.2 to +5.0")
    assert interval(-5.61, -2.6, ".1f") == "−5.6 to −2.6" and interval(-1, 3, ".0f") == "−1 to +3"
    assert with_ends(1.0, None, 2.0) == (None, "")


@pytest.mark.parametrize("seed", range(50))
def test_printed_intervals_contain_the_exact_ones_and_exclude_the_same_values(seed):
    chance = random.Random(seed)
    low = 1 + chance.gauss(0, 0.3)
    high = low + chance.choice([0.3, 0.01, 1e-4]) * chance.random()
    digits = places(low, high, 1.0)
    below, above = outward(low, high, digits)
    assert below <= low + 1e-6 * 10**-digits and above >= high - 1e-6 * 10**-digits
    if not low <= 1 <= high and digits < 6:
        assert 1.0 not in (below, above)
    assert math.isfinite(digits)


def test_percentages_have_one_format_with_a_space_and_a_true_minus_sign():
    assert [percent(0.125, 1), percent(0.954), percent(-0.004, 1)] == ["12.5 %", "95 %", "−0.4 %"]
