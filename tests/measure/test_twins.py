"""Twin builds: contradictions are named, and verdicts that differ only in being undecided are counted."""

from tests.measure import twins
from tests.report import samples

KEY = ("streaming--x", "decode_tokens_per_second", "decode")
OTHER = ("streaming--x", "f1_macro", "classify")


def test_better_versus_worse_contradicts_but_undecided_does_not():
    assert twins.contradict("better", "worse") and twins.contradict("not_maintained", "better")
    assert twins.contradict("maintained", "not_maintained")
    for word in ("inconclusive", "equivalent", "better"):
        assert not twins.contradict("better", word)


def test_only_judged_measurements_count():
    verdicts = {KEY: "better", OTHER: "informative"}
    assert twins.hold(verdicts, verdicts) == ({}, 1)
    differing, judged = twins.hold(verdicts, {KEY: "inconclusive", OTHER: "informative"})
    assert judged == 1 and differing == {KEY: ("better", "inconclusive")}
    assert twins.table(differing, [KEY], 1) == ["  decode_tokens_per_second: 1 of 1 differ (1 better / inconclusive)"]
    assert twins.table(differing, [KEY], 0)[0].startswith("  streaming: 1 of 1")


def test_expected_agreement_follows_from_the_intervals():
    """Far from every threshold all builds agree; an effect on a threshold is called in half of them."""
    clear = samples.whole("structured_pruning", "qwen3-vl-2b", gain=1.3)
    assert twins.expected({"a": clear})[:2] == (1.0, 1.0)
    measured = next(m for m in clear.measurements if m.metric == "prefill_tokens_per_second")
    edge = 1 + max(measured.margin, measured.noise_floor)
    near = measured.model_copy(update={"ratio": edge, "ci": (edge / 1.005, edge * 1.005)})
    everything, timed, count = twins.expected({"a": clear.model_copy(update={"measurements": [near]})}, draws=400)
    assert count == 1 and everything == timed and 0.4 < timed < 0.6


def test_a_regression_between_builds_of_one_commit_fails():
    """Both call the gain better, so no verdict differs, but it is a sixth smaller in one of them."""
    one, other, alike = (
        {"a": samples.whole("structured_pruning", "qwen3-vl-2b", gain=gain, seed=seed)}
        for seed, gain in enumerate((1.4, 1.2, 1.4))
    )
    lines, holds = twins.compare(one, other)
    assert not holds and any(line.startswith("  REGRESSION structured_pruning--qwen3-vl-2b prefill") for line in lines)
    assert twins.regressions(one, other) == twins.regressions(other, one) != [], "whichever of them is the old one"
    lines, holds = twins.compare(one, alike)
    assert holds and lines[-1] == "regressions called in either order: 0"


def test_folders_without_records_fail(tmp_path, capsys):
    assert twins.main([str(tmp_path), str(tmp_path)]) == 2
    assert "nothing can be compared" in capsys.readouterr().out
