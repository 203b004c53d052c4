"""Answers to what would refute a claim: separate, overlapping and missing intervals; gains and noise."""

import pytest

from lib.measure.metrics import measurement
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import Interval, ThirdArm


def _arm(name: str, value: float, low: float, high: float) -> ThirdArm:
    kl = measurement.informative("kl_divergence_nats", "prefill", 0.0, value, "test", ratio=None, ci=(low, high))
    return ThirdArm(name, "", [kl])


def test_an_interval_covers_all_named_arms():
    arms = [_arm("a", 1.0, 0.9, 1.1), _arm("b", 2.0, 1.5, 2.5), _arm("c", 9.0, 8.0, 10.0)]
    assert claims.interval(arms, ["a", "b"]) == Interval(1.5, 0.9, 2.5)
    assert claims.interval(arms, ["d"]) is None
    assert claims.interval(arms, ["a"], "perplexity") is None


@pytest.mark.parametrize(
    "rival, refuted",
    [(Interval(3, 2.5, 3.5), False), (Interval(0.5, 0.4, 0.6), True), (Interval(1.2, 0.9, 1.5), None), (None, None)],
)
def test_a_rival_refutes_only_below_the_chosen_interval(rival, refuted):
    claim, answer, evidence = claims.harms_less("claim", Interval(1, 0.8, 1.2), rival, ("chosen", "rival"))
    assert (claim, answer) == ("claim", refuted)
    assert "rival" in evidence


def _rate(verdict: str, ratio: float, predicted: float | None):
    fields = {"verdict": verdict, "provenance": "measured", "source": "test", "predicted": predicted}
    fields |= {"baseline": 100.0, "optimized": 100.0 * ratio, "ratio": ratio, "ci": (ratio - 0.01, ratio + 0.01)}
    return measurement.judged("prefill_tokens_per_second", "prefill", **fields, n=6, noise_floor=0.01, mde=0.05)


@pytest.mark.parametrize(
    "verdict, ratio, predicted, refuted",
    [
        ("better", 1.3, 1.4, False),
        ("equivalent", 1.0, 1.4, True),
        ("inconclusive", 1.02, 1.4, True),
        ("equivalent", 1.0, 1.04, None),  # below what the blocks can detect
        ("better", 1.3, None, None),
    ],
)
def test_a_gain_drowns_only_where_it_was_detectable(verdict, ratio, predicted, refuted):
    assert claims.gain_drowns("claim", [_rate(verdict, ratio, predicted)])[1] is refuted
    assert claims.gain_drowns("claim", [])[1] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_floor": 0.12, "mde": 0.2},
        {"disturbed": 2, "reason": "the machine was busy"},
        {"ci": (0.9, 2.4), "mde": 0.3},
        {"verdict": "informative"},
        {"verdict": "invalid"},
    ],
)
def test_a_machine_without_a_verdict_refutes_no_gain(changes):
    rate = _rate("inconclusive", 1.5, 1.5)
    assert claims.gain_drowns("claim", [rate])[1] is True
    busy = rate.model_copy(update=changes)
    _, refuted, evidence = claims.gain_drowns("claim", [busy])
    assert refuted is None and "1.50×" in evidence and evidence.endswith(busy.reason or busy.verdict)


def test_an_inconclusive_rate_leaves_the_answer_to_a_conclusive_one():
    """Prefill, with the largest predicted gain, was too noisy; decoding was not, and gained nothing."""
    noisy = _rate("inconclusive", 1.1, 1.6).model_copy(update={"noise_floor": 0.6, "mde": 0.7})
    steady = _rate("equivalent", 1.0, 1.3).model_copy(update={"workload": "decode"})
    _, refuted, evidence = claims.gain_drowns("claim", [noisy, steady])
    assert refuted is True and evidence.startswith("decode: bound predicts 1.30×")
    assert evidence.endswith("measured 1.000× (0.990–1.010)")
    busy = noisy.model_copy(update={"mde": 0.2, "noise_floor": 0.2})
    assert claims.gain_drowns("claim", [busy, steady])[1] is True, "nor one on a busy machine"
    _, refuted, evidence = claims.gain_drowns("claim", [noisy])
    assert refuted is None and evidence == "prefill: bound predicts 1.60×, detectable from 2.01×"
