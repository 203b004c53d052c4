"""The bandit learns which profile pays: the full one in quiet periods, the fast one while requests wait."""

from lib.measure.serving.slo import Objectives
from lib.optimizations.feedback_mechanisms.control.profile_bandit import PRESSED, SPAN, ProfileBandit

OBJECTIVES = Objectives(0.1, 0.01)
LOOKS = 40  # per span


def run(bandit: ProfileBandit, spans: int, pressed_under: set[int], start: int = 0) -> list[int]:
    """Run the given number of spans, under pressure wherever the active profile is one of these; return each span's
    profile.
    """
    seconds, chosen = SPAN * OBJECTIVES.first_token_seconds, []
    for span in range(start, start + spans):
        chosen.append(bandit.profile)
        for look in range(LOOKS):
            wait = 2 * PRESSED * OBJECTIVES.first_token_seconds if bandit.profile in pressed_under else 0.0
            bandit.look((span + look / LOOKS) * seconds, wait, 0.0)
    return chosen


def test_quiet_periods_use_the_full_profile_except_for_looks_at_the_fast_one():
    chosen = run(ProfileBandit(OBJECTIVES), 60, set())
    assert chosen[0] == 0 and 1 in chosen, "each is tried"
    assert sum(chosen[10:]) <= 0.15 * len(chosen[10:])


def test_a_rush_that_only_the_fast_profile_serves_keeps_that_profile():
    bandit = ProfileBandit(OBJECTIVES)
    run(bandit, 20, set())
    chosen = run(bandit, 40, {0}, start=20)
    assert 1 in chosen[:6] and sum(chosen[10:]) >= 0.8 * len(chosen[10:])
    seconds = [second for second, _ in bandit.course]
    assert seconds == sorted(seconds) and all(a != b for (_, a), (_, b) in zip(bandit.course, bandit.course[1:]))


def test_the_costlier_profile_gains_nothing_where_both_are_under_pressure():
    bandit = ProfileBandit(OBJECTIVES)
    chosen = run(bandit, 60, {0, 1})
    assert sum(chosen[10:]) <= 0.15 * len(chosen[10:])
    slow = ProfileBandit(OBJECTIVES)
    slow.look(0.0, 0.0, 2 * OBJECTIVES.token_seconds)
    assert slow.looks == 1 and slow.eased == 0, "tokens beyond their objective are pressure too"
