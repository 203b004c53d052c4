"""Digits follow the interval, and what is printed holds what was found."""

import math

import pytest

from lib.report.text.quantities import about, interval, outward, places, quantity, with_ends


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (1.31, 1.28, 1.34, ("1.310", "1.280–1.340")),
        (0.94, 0.84, 1.06, ("0.94", "0.84–1.06")),
        (1.002, 1.0004, 1.0036, ("1.0020", "1.0004–1.0036")),
        (2.17, 1.16, 8.13, ("2.2", "1.1–8.2")),
        (1.02, 1.0004, 1.04, ("1.0200", "1.0004–1.0400")),  # the end is not printed as 1
        (1.31, 1.31, 1.31, ("1.31", "1.31–1.31")),
    ],
)
def test_two_figures_of_the_half_width_rounded_outward(value, low, high, shown):
    assert with_ends(value, low, high) == shown


def test_changes_carry_their_signs():
    assert with_ends(-0.3, -3, 1, 0, signs=True) == ("−0.3", "−3.0 to +1.0")
    assert with_ends(2.3, 0.2, 5, 0, signs=True) == ("+2.3", "+0.2 to +5.0")
    assert interval(-5.61, -2.6, ".1f") == "−5.6 to −2.6" and interval(-1, 3, ".0f") == "−1 to +3"
    assert with_ends(1.0, None, 2.0) == (None, "")


@pytest.mark.parametrize("seed", range(50))
def test_what_is_printed_holds_the_interval_and_excludes_what_it_excludes(seed):
    import random

    chance = random.Random(seed)
    low = 1 + chance.gauss(0, 0.3)
    high = low + chance.choice([0.3, 0.01, 1e-4]) * chance.random()
    digits = places(low, high, 1.0)
    below, above = outward(low, high, digits)
    assert below <= low + 1e-6 * 10**-digits and above >= high - 1e-6 * 10**-digits
    if not low <= 1 <= high and digits < 6:
        assert 1.0 not in (below, above)
    assert math.isfinite(digits)


def test_a_fraction_of_a_token_is_an_estimate():
    assert quantity(615722.4, "tokens") == "620 000 tokens"
    # A rate is no estimate: 5 309 and 5 655 must not look 7.5 % apart.
    assert quantity(5309.4, "tokens/s") == "5 309 tokens/s" and quantity(5655.2, "tokens/s") == "5 655 tokens/s"
    assert quantity(615722, "tokens") == "615 722 tokens" and quantity(12.5, "tokens") == "12.5 tokens"


def test_an_estimate_of_a_time_is_round():
    assert [about(s) for s in (None, 5, 250, 9000)] == ["", "about 1 min", "about 4 min", "about 2.5 h"]
