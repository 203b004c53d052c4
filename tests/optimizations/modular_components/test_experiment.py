"""What the experiment concludes from attempts and contrasts that are planted."""

import pandas as pd
import pytest

from lib.measure.metrics import measurement
from lib.optimizations.modular_components import experiment
from lib.optimizations.modular_components.attempts import Attempt
from lib.optimizations.modular_components.experiment import LiveExchange
from lib.optimizations.modular_components.pair_study import Contrasts, PairStudy
from lib.report.text import reading


def _study(forced: str = "crashed", second: str = "refused") -> PairStudy:
    pairs = {("a", "b"): Attempt([], "works", None), ("b", "a"): Attempt([], second, "b takes away a trait")}
    return PairStudy({}, pairs, {("b", "a"): Attempt([], forced, None)} if second == "refused" else {})


def _contrasts(*intervals: tuple[float, float]) -> Contrasts:
    rows = [
        {"first": "a", "second": "b", "state": "works", "prefill": (low + high) / 2}
        | {"prefill_low": low, "prefill_high": high}
        for low, high in intervals
    ]
    nothing = pd.DataFrame()
    return Contrasts({}, nothing, pd.DataFrame(rows, columns=None), nothing, nothing, "planted")


@pytest.mark.parametrize(("clear", "total", "outcome"), [(0, 10, False), (1, 10, None), (9, 10, True), (0, 0, None)])
def test_interactions_are_held_against_chance(clear, total, outcome):
    contrasts = _contrasts(*[(0.1, 0.2)] * clear, *[(-0.1, 0.1)] * (total - clear))
    refuted, evidence = contrasts.refuted()
    assert refuted is outcome and (f"{clear} of {total}" in evidence or not total)
    first, second = contrasts.reading().split(". ", 1)
    assert reading.two(f"{first}.", second)


def _overhead(verdict: str) -> list[measurement.Measurement]:
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 1.0, 1.0, "planted")
    return [rate.model_copy(update={"verdict": verdict})]


@pytest.mark.parametrize(
    ("verdict", "forced", "identical", "outcomes"),
    [
        ("equivalent", "crashed", True, [False, False, False, False, False]),
        ("worse", "works", False, [False, True, False, True, True]),
        ("inconclusive", "refused", True, [False, False, False, None, False]),
    ],
)
def test_every_claim_has_its_answer(verdict, forced, identical, outcomes):
    exchanged = LiveExchange([0.001], [{"swapped in": "a"}], identical)
    answers = experiment.refutations(_study(forced), _contrasts((-0.1, 0.1)), _overhead(verdict), exchanged)
    assert [claim for claim, _, _ in answers] == list(experiment.CLAIMS)
    assert [refuted for _, refuted, _ in answers] == outcomes
    sentence = experiment.sentence(_study(forced), _contrasts((-0.1, 0.1)), _overhead(verdict), exchanged)
    assert "0.50 of 2 ordered pairs work" in sentence and "0 of 1 intervals exclude zero" in sentence


def test_what_did_not_happen_tells_nothing():
    answers = experiment.refutations(_study(second="crashed"), _contrasts(), [], LiveExchange([], [], True))
    assert [refuted for _, refuted, _ in answers] == [True, None, None, None, None]
    assert _study().too_strict == [] and _study("works").too_strict == ["b → a"]
