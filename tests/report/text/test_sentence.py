"""A clause names the quantity, and its interval is of that quantity."""

import pytest

from lib.measure.metrics import measurement
from lib.report.text import sentence
from tests.report import samples


def _amount(ratio: float, low: float, high: float, verdict: str, metric: str = "energy_joules_per_token"):
    return measurement.judged(
        metric, "decode", baseline=1.0, optimized=ratio, ratio=ratio, ci=(low, high), n=12, noise_floor=0.01,
        margin=0.03, verdict=verdict, provenance="measured", source="NVML counter",
    )  # fmt: skip


def test_the_interval_of_a_reduction_is_that_of_the_reduction():
    assert sentence.clause(_amount(0.8, 0.77, 0.82, "better")) == "energy per token is 20.0 % lower (18.0–23.0 %)"
    assert sentence.clause(_amount(1.25, 1.2, 1.31, "worse")) == "energy per token is 25.0 % higher (20.0–31.0 %)"


def test_an_undecided_change_keeps_its_signs_and_says_which_gate_held():
    text = sentence.clause(_amount(0.997, 0.97, 1.01, "inconclusive"))
    assert "inconclusive at −0.3 % (−3.0 to +1.0 %)" in text and ": the interval includes no difference" in text
    assert "unchanged (−0.3 %, −1.0 to +0.5 %)" in sentence.clause(_amount(0.997, 0.99, 1.005, "equivalent")).replace(
        "0.30 %", "0.3 %").replace("1.00", "1.0").replace("0.50", "0.5")  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "half", "floor", "reason"),
    [
        (1.05, 0.08, 0.01, "the interval includes no difference"),
        (1.015, 0.01, 0.001, "within the practical margin of 2"),
        (1.06, 0.03, 0.08, "within the noise floor of 8 %"),
    ],
)
def test_every_open_question_has_its_gate(ratio, half, floor, reason):
    timed = samples.timed("prefill_tokens_per_second", ratio, half, "inconclusive")
    timed = timed.model_copy(update={"margin": 0.02, "noise_floor": floor})
    assert reason in sentence.why(timed) and reason in sentence.clause(timed)


def test_a_reason_for_everything_that_is_not_judged():
    estimated = _amount(0.8, 0.7, 0.9, "informative").model_copy(update={"provenance": "estimated"})
    assert sentence.why(estimated) == "an estimate is never judged"
    assert sentence.why(measurement.informative("load_seconds", "load", 1.0, 2.0, "clock")) == "it describes only"
    once = measurement.informative("peak_memory_bytes", "load", 1.0, 2.0, "VmHWM", n=1)
    assert sentence.why(once) == "it was read once"
    assert sentence.why(measurement.unavailable("f1_macro", "classify", "random weights.")) == "random weights"
    assert sentence.why(samples.timed("prefill_tokens_per_second", 1.3)) == ""


def test_same_answers_are_said_as_such():
    same = samples.scored("f1_macro", 0.9, 0.9, "maintained").model_copy(
        update={"source": "same answers, 400 items; topic", "ci": None}
    )
    assert sentence.clause(same) == "F1 is maintained (same answers, 400 items)"


def test_a_bound_is_rounded_away_from_the_change():
    score = samples.scored("f1_macro", 0.91, 0.869, "not_maintained")
    assert sentence.clause(score).startswith("F1 is not maintained (−4.1 points, lower bound −5.8, margin 2)")
    text = samples.scored("perplexity", 41.0, 43.0, "not_maintained", 0.01)
    assert "upper bound +5.72 %, margin 3 %" in sentence.clause(text)


def test_the_first_interval_is_named():
    assert sentence.name_first_interval("a (1.2–1.3), b (2–3)") == "a (95 % interval 1.2–1.3), b (2–3)"
    assert sentence.name_first_interval("a (−3 to +1 %)") == "a (95 % interval −3 to +1 %)"
    assert sentence.name_first_interval("a (same answers, 4 items)") == "a (same answers, 4 items)"
