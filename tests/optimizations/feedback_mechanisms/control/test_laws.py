"""When a limit moves: beyond the dead band, on to the setpoint, and after a rest."""

import math

import pytest

from lib.optimizations.feedback_mechanisms.control.laws import Aimd, Restraint


def test_moves_start_beyond_the_dead_band_and_continue_to_the_setpoint():
    restraint = Restraint(below=0.2, above=0.1)
    assert not restraint.allows(0.15, 0.1) and not restraint.allows(-0.05, -0.1)
    assert restraint.allows(-0.12, -0.1) and restraint.allows(-0.02, -0.1)
    assert not restraint.allows(0.01, 0.1) and not restraint.allows(-0.05, -0.1)  # the setpoint was crossed
    assert restraint.allows(0.3, 0.1) and restraint.allows(0.01, 0.1)
    assert not restraint.allows(0.01, -0.1), "a law that moves against the error is not followed"
    assert not restraint.allows(-0.01, -0.1)


def test_a_zero_band_follows_every_error():
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


def test_a_held_limit_may_rise_but_not_fall():
    restraint = Restraint()
    restraint.hold(8)
    assert restraint.allows(0.5, 0.1) and not restraint.allows(-0.5, -0.1)
    restraint.hold(4)  # does not shorten the hold
    restraint.passed(4)
    assert not restraint.allows(-0.5, -0.1)
    restraint.passed(4)
    assert restraint.allows(-0.5, -0.1)


@pytest.mark.parametrize("excess", [0.1, 0.4])
def test_back_off_is_proportional_to_the_excess_and_a_rise_is_one_row(excess):
    law = Aimd()
    assert law.move(-excess, 8.0) == pytest.approx(-excess)
    assert 8.0 * math.exp(law.move(excess, 8.0)) == pytest.approx(9.0)
