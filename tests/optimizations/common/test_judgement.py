"""The gate and the questions: a degenerate model shows no number, whatever it answered."""

from types import SimpleNamespace

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.optimizations.common import judgement

SCORE = measurement.informative("f1_macro", "classify", 0.9, 0.8, "planted")


def test_a_degenerate_model_shows_no_number(monkeypatch):
    arms = []

    def evaluate(loaded, effort, *, seed, model=None, acted=None):
        arms.append(model)
        return model

    monkeypatch.setattr(judgement.evaluate, "evaluate", evaluate)
    monkeypatch.setattr(judgement.answer_comparison, "compare", lambda *answers, **options: [SCORE])
    loaded, effort = SimpleNamespace(random_weights=False), SimpleNamespace(resamples=10)
    for reason in (None, "it answers with one token"):
        monkeypatch.setattr(judgement.sanity, "check", lambda *_, **__: reason)  # noqa: B023
        judged = judgement.judge(loaded, "optimized", effort, 3, sample_BT="text")
        (score,) = judged.measurements
        assert judged.degenerate == reason and judged.answers is None
        assert (score.verdict, score.baseline) == (("invalid", None) if reason else ("informative", 0.9))
        assert score.reason == reason
    assert arms == [None, "optimized"] * 2, "the baseline is asked first"


def test_nan_answers_are_not_compared(monkeypatch):
    """The losses of a model with NaN logits are NaN too, which no measurement can hold."""
    compared = []
    monkeypatch.setattr(judgement.evaluate, "evaluate", lambda *_, model=None, **__: "base" if model is None else "NaN")
    monkeypatch.setattr(judgement.answer_comparison, "compare", lambda *arms, **_: compared.append(arms) or [SCORE])
    monkeypatch.setattr(judgement.sanity, "check", lambda *_, **__: "its logits are not finite (NaN or infinite)")
    loaded, effort = SimpleNamespace(random_weights=False), SimpleNamespace(resamples=10)
    judged = judgement.judge(loaded, "optimized", effort, 3, sample_BT="text")
    assert compared == [("base", "base")] and [m.verdict for m in judged.measurements] == ["invalid"]


def _rate(workload: str, verdict: str, floor: float, reason: str | None = None) -> Measurement:
    rate = measurement.informative(f"{workload}_tokens_per_second", workload, 100.0, 120.0, "planted", ratio=1.2)
    return rate.model_copy(update={"verdict": verdict, "noise_floor": floor, "ci": (1.1, 1.3), "reason": reason})


def test_the_table_judges_no_speed_that_the_record_does_not():
    """Previously the table said `better`, and the break-even paid, where the record said that no timing is judged."""
    prefill, noisy = _rate("prefill", "better", 0.01), _rate("decode", "inconclusive", 0.12, "the noise floor of 12 %")
    quiet = Compared([prefill, _rate("decode", "better", 0.02)], details={"kept": 1})
    assert judgement.timed(quiet) == quiet
    within = judgement.timed(Compared([prefill, noisy], details={"kept": 1}))
    beside = judgement.timed(quiet, [noisy])
    for compared in (within, beside):
        assert [m.verdict for m in compared.measurements] == ["inconclusive"] * 2
        assert compared.measurements[0].reason == f"decode: {noisy.reason}" and compared.details == {"kept": 1}
