"""The bandit learns which profile pays: the full one in the calm, the fast one while requests wait."""

from lib.measure.serving.slo import Objectives
from lib.optimizations.feedback_mechanisms.control.profile_bandit import PRESSED, SPAN, ProfileBandit

OBJECTIVES = Objectives(0.1, 0.01)
LOOKS = 40  # per span


def run(bandit: ProfileBandit, spans: int, pressed_under: set[int], start: int = 0) -> list[int]:
    """Let so many spans pass, pressed wherever the profile in charge is one of these; return the profile of each."""
    seconds, chosen = SPAN * OBJECTIVES.first_token_seconds, []
    for span in range(start, start + spans):
        chosen.append(bandit.profile)
        for look in range(LOOKS):
            wait = 2 * PRESSED * OBJECTIVES.first_token_seconds if bandit.profile in pressed_under else 0.0
            bandit.look((span + look / LOOKS) * seconds, wait, 0.0)
    return chosen


def test_in_the_calm_the_full_profile_answers_but_for_looks_at_the_fast_one():
    chosen = run(ProfileBandit(OBJECTIVES), 60, set())
    assert chosen[0] == 0 and 1 in chosen, "each is tried"
    assert sum(chosen[10:]) <= 0.15 * len(chosen[10:])


def test_in_a_rush_that_only_the_fast_profile_serves_it_stays_with_that():
    bandit = ProfileBandit(OBJECTIVES)
    run(bandit, 20, set())
    chosen = run(bandit, 40, {0}, start=20)
    assert 1 in chosen[:6] and sum(chosen[10:]) >= 0.8 * len(chosen[10:])
    seconds = [second for second, _ in bandit.course]
    assert seconds == sorted(seconds) and all(a != b for (_, a), (_, b) in zip(bandit.course, bandit.course[1:]))


def test_where_both_profiles_are_pressed_the_dearer_one_gains_nothing():
    bandit = ProfileBandit(OBJECTIVES)
    chosen = run(bandit, 60, {0, 1})
    assert sum(chosen[10:]) <= 0.15 * len(chosen[10:])
    slow = ProfileBandit(OBJECTIVES)
    slow.look(0.0, 0.0, 2 * OBJECTIVES.token_seconds)
    assert slow.looks == 1 and slow.eased == 0, "tokens beyond their objective are pressure too"
