"""Why a number is undecided, and what a score is judged by."""

import pytest

from lib.measure.metrics import measurement
from lib.report.text import sentence
from tests.report import samples


@pytest.mark.parametrize(
    ("ratio", "half", "floor", "reason"),
    [
        (1.05, 0.08, 0.01, "the interval includes zero difference"),
        (1.015, 0.01, 0.001, "within the practical margin of 2"),
        (1.06, 0.03, 0.08, "within the noise floor of 8 %"),
    ],
)
def test_every_open_question_has_its_gate(ratio, half, floor, reason):
    timed = samples.timed("prefill_tokens_per_second", ratio, half, "inconclusive")
    timed = timed.model_copy(update={"margin": 0.02, "noise_floor": floor})
    assert reason in sentence.why(timed)


def test_everything_not_judged_has_a_reason():
    estimated = samples.energy(0.8, 0.7, 0.9, "informative").model_copy(update={"provenance": "estimated"})
    assert sentence.why(estimated) == "it is only estimated"
    assert sentence.why(measurement.informative("load_seconds", "load", 1.0, 2.0, "clock")) == "it is informative only"
    once = measurement.informative("peak_memory_bytes", "load", 1.0, 2.0, "VmHWM", n=1)
    assert sentence.why(once) == "it was read once"
    assert sentence.why(measurement.unavailable("f1_macro", "classify", "random weights.")) == "random weights"
    assert sentence.why(samples.timed("prefill_tokens_per_second", 1.3)) == ""


def test_a_bound_is_rounded_away_from_the_change():
    score = samples.scored("f1_macro", 0.91, 0.869, "not_maintained")
    assert sentence.score(score) == ("−4.1 points", ["lower bound −5.8", "margin 2"])
    text = samples.scored("perplexity", 41.0, 43.0, "not_maintained", 0.01)
    assert sentence.score(text)[1] == ["upper bound +5.72 %", "margin 3 %"]
