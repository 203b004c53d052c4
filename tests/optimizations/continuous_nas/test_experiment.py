"""The experiment's conclusions from planted numbers: answers, readings, rivals at equal speed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.measure.metrics import measurement, paired_samples, settings
from lib.measure.metrics.pairs import Pairs
from lib.measure.quality.answers import Text
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.continuous_nas import drift, experiment, outcome, rivals
from lib.optimizations.continuous_nas.additivity import Additivity
from lib.optimizations.continuous_nas.costs.request_costs import PROFILES
from lib.optimizations.continuous_nas.drift import Adaptation, Drifts
from lib.optimizations.continuous_nas.equal_effort import EqualEffort
from lib.optimizations.continuous_nas.method import REFERENCE, SearchLimits
from lib.optimizations.continuous_nas.rivals import RivalComparison
from lib.report.text import brief, reading


def _effort(search: float, *others: float) -> EqualEffort:
    """Return arms of one point each, at the same share of both references."""
    one = lambda share: [(share, share * REFERENCE[1])]  # noqa: E731
    points = {"search": one(search), "programme": one(0.65), "greedy": one(0.7), "uniform": one(0.6)}
    points |= {f"random {n}": one(value) for n, value in enumerate(others, start=1)}
    return EqualEffort(points, one(0.95), 9, None, None)


def _area(share: float) -> float:
    return (1 - share) ** 2 * REFERENCE[1]


def _sentences(text: str) -> None:
    first, second = text.split(". ", 1)
    assert reading.two(f"{first}.", second) == text
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(text)), text


@pytest.mark.parametrize(("search", "expected"), [(0.2, False), (0.9, True), (0.5, None)])
def test_random_choices_are_as_good_unless_the_search_beats_all_of_them(search, expected):
    equal = _effort(search, 0.4, 0.5, 0.7)
    refuted, evidence = equal.refuted()
    assert refuted is expected and f"{_area(search):.4f}" in evidence and "3 draws" in evidence
    assert equal.gain == pytest.approx((1 - search) ** 2 / np.mean([0.36, 0.25, 0.09]))
    _sentences(equal.reading())
    assert ("below greedy choice" in equal.reading()) is (search > 0.7), "a simpler choice that found more is named"
    assert [arm.name for arm in equal.controls()] == [
        "programme", "greedy", "uniform", "random 1", "random 2", "random 3",
    ]  # fmt: skip
    assert list(equal.credits.values()) == pytest.approx([_area(0.95), _area(0.65), _area(search), _area(0.7)])
    assert _effort(search, 1.2).gain is None, "chance that dominates nothing is no divisor"


def test_every_control_reports_its_number_of_evaluations():
    points = {"search": [(0.5, 0.05)] * 7, "programme": [(0.6, 0.05)] * 4, "greedy": [(0.6, 0.05)] * 3}
    points |= {"uniform": [(0.6, 0.05)] * 5, "random 1": [(0.7, 0.05)] * 7}
    equal = EqualEffort(points, points["programme"][:3], 7, None, None)
    for arm in equal.controls():
        assert arm.measurements[0].source == f"{len(points[arm.name])} evaluations, the search 7; baseline: {arm.name}"
    purposes = {arm.name: arm.purpose for arm in equal.controls()}
    assert purposes["random 1"] == "as many evaluations" and purposes["uniform"].startswith("fewer evaluations")
    drifted = Drifts([_adaptation([1.0], [1.0])], [{"solved again, s": 0.1}])
    added = Additivity([None] * 9, pd.DataFrame(), 0.9)
    kept = outcome.details(equal, added, [], drifted, pd.DataFrame())
    assert "search 7, programme 4, greedy 3, uniform 5, random 1 7;" in kept["hypervolumes"][2]


@pytest.mark.parametrize(
    ("rank", "count", "expected"), [(0.95, 40, False), (-0.2, 40, True), (0.6, 8, None), (0.9, 4, None)]
)
def test_a_rank_correlation_is_judged_by_its_interval(rank, count, expected):
    refuted, evidence = Additivity([None] * count, pd.DataFrame(), rank).refuted()
    assert refuted is expected and str(count) in evidence


def _speed(gain: float, spread: float = 0.0) -> measurement.Measurement:
    seconds = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]
    slower = [gain * time * (1 + spread * sign) for time, sign in zip(seconds, (1, -1, 1, -1, 1, -1))]
    pairs = Pairs(slower, seconds, ["AB", "BA"] * 3, [None] * 6, 1)
    return paired_samples.from_pairs("generate_tokens_per_second", "generate", pairs, 8, 0.0)


def _comparison(own: float, *rivals: tuple[float, float], spread: float = 0.0) -> RivalComparison:
    windows = 1 + 0.01 * np.random.default_rng(0).standard_normal((1 + len(rivals), 16))
    kl_RN = [level * window for level, window in zip((own, *(kl for _, kl in rivals)), windows)]
    return RivalComparison([_speed(gain, spread) for gain, _ in rivals], kl_RN, [])


def test_uniform_blocks_are_judged_at_equal_speed():
    worse, better = _comparison(0.1, (1.1, 0.3), (0.9, 0.5)), _comparison(0.1, (1.1, 0.02), (0.9, 0.05))
    assert worse.refuted()[0] is False and better.refuted()[0] is True
    assert worse.closer == pytest.approx(np.sqrt(0.3 * 0.5) / 0.1, rel=0.05)
    low, high = worse.interval()
    assert low < worse.closer < high
    assert _comparison(0.1, (1.0, 0.1)).refuted()[0] is None, "its interval holds 1"
    faster = _comparison(0.1, (0.8, 0.3))
    refuted, evidence = faster.refuted()
    assert not faster.has_rival_no_faster and refuted is None and evidence.endswith("; every rival is faster")
    assert RivalComparison([_speed(1.0)], [], []).refuted()[0] is None
    untimed = RivalComparison([], [np.ones(8), np.ones(8)], [])
    assert untimed.refuted() == (None, "no rival was timed") and untimed.closer is None
    assert not untimed.has_rival_no_faster and not untimed.has_rival_no_slower
    assert evidence.startswith("divergence of the rival nearest in speed, 1.25 times as fast, ÷ the search's: ")
    assert "1.002 times as fast" in _comparison(0.1, (0.998, 0.3)).refuted()[1], "not 1 times as fast"
    drifted = Drifts([_adaptation([1.0], [1.0])], [{"solved again, s": 0.1}])
    reached = outcome.targets(_effort(0.2, 0.4), faster, drifted).iloc[2]
    assert pd.isna(reached["value"]) and not reached["reached"], "nothing is closer at a speed that no rival has"
    slower = _comparison(0.1, (1.3, 0.05), (1.2, 0.06))
    refuted, evidence = slower.refuted()
    assert refuted is None and evidence.endswith("; every rival is slower"), "a slower choice may always diverge less"
    assert _comparison(0.1, (1.3, 0.3), (1.2, 0.4)).refuted()[0] is False, "slower, and further off"
    assert _comparison(0.1, (0.8, 0.05)).refuted()[0] is True, "faster, and nearer"
    rivals = ((1.03, 0.15), (0.97, 0.7))
    sure, unsure = _comparison(0.16, *rivals), _comparison(0.16, *rivals, spread=0.05)
    assert sure.refuted()[0] is False and unsure.refuted()[0] is None, "it may be the slower rival that is as fast"
    assert unsure.interval()[0] < 1 < sure.interval()[0]
    # Previously the ratio alone reached the target, next to a claim that could not be decided.
    told = [outcome.targets(_effort(0.2, 0.4), each, drifted).iloc[2] for each in (sure, unsure)]
    assert [bool(row["reached"]) for row in told] == [True, False] and told[1]["value"] > 1


def test_windows_of_one_document_are_resampled_together():
    """Windows agree within a document and differ between documents: treated as independent, they claimed too much."""
    speeds, documents = [_speed(1.1), _speed(0.9)], np.repeat(np.arange(4), 8)
    level_N = np.repeat([0.6, 0.8, 1.2, 1.4], 8)
    kl_RN = [np.full(32, 0.1), 0.2 * level_N, 0.3 * level_N]
    apart, together = RivalComparison(speeds, kl_RN, []), RivalComparison(speeds, kl_RN, [], documents)
    narrow, wide = apart.interval(), together.interval()
    assert wide[0] < narrow[0] < together.closer < narrow[1] < wide[1]
    one = RivalComparison(speeds, kl_RN, [], np.zeros(32))
    assert one.interval() == (None, None) and one.refuted()[0] is None and "of one document" in one.refuted()[1]


@pytest.mark.parametrize(("gains", "made"), [((1.1, 0.9), True), ((0.97, 0.95), False)])
def test_no_value_at_equal_speed_is_extrapolated_beyond_the_rivals(monkeypatch, gains, made):
    """Previously, with two faster rivals, the closer one's divergence was reported as the equal-speed one on their
    line.
    """
    text = Text(torch.zeros(4, 8, dtype=torch.long), np.ones(4), torch.zeros(4, 8, 1), None, np.array([0, 0, 1, 2]))
    monkeypatch.setattr(rivals.evaluate, "read", lambda *_: replace(text, source_N=None))
    monkeypatch.setattr(rivals.evaluate, "divergence", lambda *_: (np.full(4, 0.2), None))
    read = []
    monkeypatch.setattr(rivals.answer_comparison, "compare_text", lambda *texts: read.extend(texts) or [])
    left = iter(gains)
    found = rivals.compare(None, [None, None], lambda _rival, _blocks: _speed(next(left)), text, 6)
    assert ("uniform, at equal speed" in [control.name for control in found.controls]) is made
    assert all(each.source_N is text.source_N for each in read) and found.source_N is text.source_N


def _adaptation(warm: list[float], cold: list[float], name: str = "decode_heavy") -> Adaptation:
    return Adaptation(SimpleNamespace(profile=PROFILES[name]), None, warm, cold)


def test_drifts_are_judged_by_evaluations():
    quick, slow = _adaptation([0.6, 0.9, 0.97], [0.1, 0.5, 0.6, 1.0]), _adaptation([0.1, 0.2, 0.3], [0.9, 1.0])
    assert (quick.evaluations_until(0.95), quick.cold_until(0.95), slow.evaluations_until(0.95)) == (2, 4, None)
    assert Drifts([quick], []).refuted() == (
        False, "evaluations to 95 % of the final hypervolume: decode_heavy 2 resumed, 4 from nothing",
    )  # fmt: skip
    assert Drifts([slow], []).refuted()[0] is True and Drifts([quick, slow], []).refuted()[0] is None
    _sentences(Drifts([quick, slow], []).reading())
    curves = Drifts([quick], []).curves()
    assert list(curves[curves.arm == "decode_heavy, warm"].strength) == [0, 1, 2]
    assert list(curves[curves.arm == "decode_heavy, cold"].strength) == [1, 2, 3, 4]


def test_the_whole_model_as_choice_and_a_drift_without_a_front_decide_nothing():
    speeds = [_speed(1.1), _speed(0.9)]
    whole = RivalComparison(speeds, [np.zeros(16), np.full(16, 0.3), np.full(16, 0.5)], [])
    assert whole.closer is None and whole.interval() == (None, None)
    assert whole.refuted() == (
        None, "the search's choice does not diverge from the baseline: no ratio of divergences",
    )  # fmt: skip
    rival = RivalComparison(speeds, [np.full(16, 0.3), np.zeros(16), np.full(16, 0.5)], [])
    assert rival.closer is None and rival.refuted()[1].startswith("a rival does not")
    one_window = np.r_[0.0, np.full(15, 0.03)]
    partly = RivalComparison(speeds, [one_window, np.full(16, 0.3), np.full(16, 0.5)], [])
    assert partly.closer == pytest.approx(np.sqrt(0.3 * 0.5) / 0.03 * 16 / 15, rel=0.05)
    assert partly.refuted()[0] is False
    few = RivalComparison(speeds, [np.r_[np.zeros(15), 0.3], np.full(16, 0.3), np.full(16, 0.5)], [])
    low, high = few.interval()
    assert few.closer > 1 and low < few.closer < high < np.inf, "of many resamples no window diverges"
    flat, quick = _adaptation([0.0, 0.0], [0.0, 0.0]), _adaptation([0.6, 0.97], [0.1, 1.0])
    assert flat.evaluations_until(0.95) is None and flat.cold_until(0.95) is None
    drifted = Drifts([flat, quick], [{"solved again, s": 0.1}])
    _sentences(drifted.reading())
    assert "start at – and 0.600 (–: no cheaper choice is within 0.1 nats per token)" in drifted.reading()
    assert Drifts([flat], []).refuted()[0] is None and drifted.refuted()[0] is None
    reached = outcome.targets(_effort(0.2, 0.4), whole, drifted)
    assert not reached.reached.iloc[[2, 4]].any() and reached.value.iloc[[2, 4]].isna().all()


def test_every_claim_has_its_answer():
    drifted = Drifts([_adaptation([1.0], [1.0])], [{"solved again, s": 0.1}])
    comparison, added = _comparison(0.1, (1.1, 0.3), (0.9, 0.5)), Additivity([None] * 9, pd.DataFrame(), 0.9)
    answers = outcome.refutations(_effort(0.2, 0.4), comparison, added, drifted)
    assert [claim for claim, _, _ in answers] == list(outcome.CLAIMS)
    assert all(evidence for _, _, evidence in answers)
    reached = outcome.targets(_effort(0.2, 0.4), comparison, drifted)
    assert len(reached) == 5 and reached.reached.all() and drift.LEVEL == 0.95


def test_a_search_that_dominates_nothing_reaches_no_area_target():
    drifted = Drifts([_adaptation([1.0], [1.0])], [{"solved again, s": 0.1}])
    points = {arm: [(1.0, 1.0)] for arm in ("search", "programme", "greedy", "uniform", "random 1")}
    nothing = EqualEffort(points, [], 9, None, None)
    reached = outcome.targets(nothing, _comparison(0.1, (1.1, 0.3), (0.9, 0.5)), drifted)
    assert nothing.gain is None and not reached.reached[:2].any() and reached.value[:2].isna().all()
    alone = EqualEffort(points | {"search": [(0.5, 0.01)]}, [], 9, None, None)
    assert outcome.targets(alone, _comparison(0.1, (1.1, 0.3), (0.9, 0.5)), drifted).reached[:2].all()


def test_only_a_preview_is_searched_and_timed_on_less():
    preview, quick = settings.read("preview"), settings.read("quick")
    limits, profile = SearchLimits(0.8, 1.0, 16), PROFILES["memory_limited"]
    assert limits.within(quick) == limits and profile.within(quick) == profile
    assert limits.within(preview) == SearchLimits(0.8, 1.0, 6, 5)
    assert profile.within(preview).in_words == "64 tokens read, 8 written, batch of 2; scarce is memory"
    assert PROFILES["prefill_heavy"].within(preview).batch == 1


def test_saliency_uses_as_much_text_as_the_width_needs(tiny, monkeypatch):
    class Observed(Exception):
        pass

    def observe(model, text):
        raise Observed(text)

    monkeypatch.setattr(calibration_text, "TOKENS_PER_INPUT", 256)
    monkeypatch.setattr(calibration_text.tasks, "calibration", lambda loaded, sequences, *_, **__: sequences)
    monkeypatch.setattr(experiment, "observe", observe)
    effort = settings.read("quick")
    loaded = SimpleNamespace(model=tiny("qwen3-4b-instruct-2507"), scale="full", random_weights=False)
    with pytest.raises(Observed) as observed:
        experiment.prepare(loaded, effort, 0, short=True)
    (count,) = observed.value.args
    assert count == calibration_text.sequences(loaded.model, effort) > effort.calibration_sequences
