"""Readable numbers: an estimate looks like one, a rate does not."""

from lib.report.text.quantities import about, quantity, share, times


def test_a_fraction_of_a_token_is_an_estimate():
    assert quantity(615722.4, "tokens") == "620 000 tokens"
    # A rate is not an estimate: rounding must not make 5 309 and 5 655 look 7.5 % apart.
    assert quantity(5309.4, "tokens/s") == "5 309 tokens/s" and quantity(5655.2, "tokens/s") == "5 655 tokens/s"
    assert quantity(615722, "tokens") == "615 722 tokens" and quantity(12.5, "tokens") == "12.5 tokens"


def test_an_estimated_time_is_rounded():
    assert [about(s) for s in (None, 5, 250, 9000)] == ["", "about 1 min", "about 4 min", "about 2.5 h"]


def test_what_is_left_is_not_rounded_away():
    shares = [share(value) for value in (1.0, 0.9967, 0.9998, 0.994, 0.5)]
    assert shares == ["100 %", "99.7 %", "99.98 %", "99 %", "50 %"]
    assert times(0.0033) == "0.0033×" and times(0.0) == "0.00×" and times(0.25) == "0.25×"
