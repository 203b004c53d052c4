"""When a limit moves at all: beyond the dead band, on to the setpoint, and after a rest."""

import math

import pytest

from lib.optimizations.feedback_mechanisms.control.laws import Aimd, Restraint


def test_within_the_dead_band_nothing_moves_and_what_has_begun_goes_on_to_the_setpoint():
    restraint = Restraint(below=0.2, above=0.1)
    assert not restraint.allows(0.15, 0.1) and not restraint.allows(-0.05, -0.1)
    assert restraint.allows(-0.12, -0.1) and restraint.allows(-0.02, -0.1)
    assert not restraint.allows(0.01, 0.1) and not restraint.allows(-0.05, -0.1)  # the setpoint was crossed
    assert restraint.allows(0.3, 0.1) and restraint.allows(0.01, 0.1)
    assert not restraint.allows(0.01, -0.1), "a law that moves against the error is not followed"
    assert not restraint.allows(-0.01, -0.1)


def test_a_band_of_nothing_follows_every_error():
    restraint = Restraint(0.0, 0.0)
    assert restraint.allows(1e-9, 0.1) and restraint.allows(-1e-9, -0.1)


def test_a_move_is_followed_by_a_rest():
    restraint = Restraint(after_rise=8, after_fall=16)
    restraint.moved(0.1)
    restraint.passed(4)
    assert not restraint.allows(0.5, 0.1)
    restraint.passed(4)
    assert restraint.allows(0.5, 0.1)
    restraint.moved(-0.1)
    restraint.passed(12)
    assert not restraint.allows(-0.5, -0.1)
    restraint.passed(4)
    assert restraint.allows(-0.5, -0.1)


def test_a_limit_that_is_held_may_rise_and_may_not_fall():
    restraint = Restraint()
    restraint.hold(8)
    assert restraint.allows(0.5, 0.1) and not restraint.allows(-0.5, -0.1)
    restraint.hold(4)  # no shorter for that
    restraint.passed(4)
    assert not restraint.allows(-0.5, -0.1)
    restraint.passed(4)
    assert restraint.allows(-0.5, -0.1)


@pytest.mark.parametrize("excess", [0.1, 0.4])
def test_the_back_off_is_in_proportion_to_the_excess_and_the_rise_is_a_row(excess):
    law = Aimd()
    assert law.move(-excess, 8.0) == pytest.approx(-excess)
    assert 8.0 * math.exp(law.move(excess, 8.0)) == pytest.approx(9.0)
