"""Twin builds: what contradicts is named, and what merely could not be decided is counted."""

from tests.measure import twins

KEY = ("streaming--x", "decode_tokens_per_second", "decode")
OTHER = ("streaming--x", "f1_macro", "classify")


def test_better_against_worse_is_a_contradiction_and_undecided_is_not():
    assert twins.contradict("better", "worse") and twins.contradict("not_maintained", "better")
    assert twins.contradict("maintained", "not_maintained")
    for word in ("inconclusive", "equivalent", "better"):
        assert not twins.contradict("better", word)


def test_only_what_is_judged_counts():
    verdicts = {KEY: "better", OTHER: "informative"}
    assert twins.hold(verdicts, verdicts) == ({}, 1)
    differing, judged = twins.hold(verdicts, {KEY: "inconclusive", OTHER: "informative"})
    assert judged == 1 and differing == {KEY: ("better", "inconclusive")}
    assert twins.table(differing, [KEY], 1) == ["  decode_tokens_per_second: 1 of 1 differ (1 better / inconclusive)"]
    assert twins.table(differing, [KEY], 0)[0].startswith("  streaming: 1 of 1")
