"""What the experiment concludes from planted attempts and contrasts."""

import copy
import re
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.measure.metrics import measurement, settings
from lib.models.checkpoints import io
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search.search_quality import NOTHING_LOST
from lib.optimizations.modular_components import experiment, method, parts_setup, strength
from lib.optimizations.modular_components.attempts import Attempt
from lib.optimizations.modular_components.experiment import LiveExchange
from lib.optimizations.modular_components.pair_study import Contrasts, PairStudy
from lib.optimizations.modular_components.strength import Weakened
from lib.report.text import brief, reading


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


def _stack(*stems: str) -> Weakened:
    return Weakened(8, [RecipeStep(optimization=stem) for stem in stems], nn.Identity(), {}, NOTHING_LOST, 1.0)


@pytest.mark.parametrize(("clear", "total", "outcome"), [(0, 10, False), (1, 10, None), (9, 10, True), (0, 0, None)])
def test_interactions_are_compared_with_chance(clear, total, outcome):
    contrasts = _contrasts(*[(0.1, 0.2)] * clear, *[(-0.1, 0.1)] * (total - clear))
    refuted, evidence = contrasts.refuted()
    assert refuted is outcome and (f"{clear} of {total}" in evidence or not total)
    first, second = contrasts.reading().split(". ", 1)
    assert reading.two(f"{first}.", second)


def test_a_zero_width_interval_is_not_compared_with_chance():
    """Pairs that change no answer cannot differ in loss: they are no evidence that interactions are rare."""
    contrasts = _contrasts(*[(0.1, 0.2)] * 2, (-0.1, 0.1), *[(0.0, 0.0)] * 40)
    assert contrasts.clear() == {"prefill": (2, 3)} and "2 of 3" in contrasts.refuted()[1]


def test_one_interval_cannot_show_that_interactions_are_rare():
    """Chance explains one of one, so no outcome could have refuted the claim: it was called not refuted."""
    for ends in ((-0.1, 0.1), (0.1, 0.2)):
        refuted, evidence = _contrasts(ends).refuted()
        assert refuted is None and evidence.endswith("up to 1: too few intervals to tell more than chance")
    assert _contrasts(*[(-0.1, 0.1)] * 2).refuted()[0] is False


def test_the_largest_interaction_states_its_interval_or_that_there_is_none():
    expected = "+15.0 % of the baseline's time (95 % interval +10.0 % to +20.0 %)."
    assert _contrasts((0.1, 0.2)).reading().endswith(expected)
    assert "−15.0 % of" in _contrasts((-0.2, -0.1)).reading(), "a true minus sign"
    few = _contrasts((0.1, 0.2))
    few.pairs[["prefill_low", "prefill_high"]] = None
    assert few.reading().endswith("+15.0 % of the baseline's time (without an interval).")
    lost = _contrasts((0.1, 0.2))
    renamed = lost.pairs.rename(columns=lambda name: name.replace("prefill", "loss"))
    ends = "a → b, +0.1500 nats per token (95 % interval +0.1000 to +0.2000)."
    assert replace(lost, pairs=renamed).reading().endswith(ends)


def test_a_part_that_only_slows_the_model_down_is_named(monkeypatch):
    touches = {"slow": ("attention",), "small": ("storage",), "faster later": ("attention",), "unsure": ("attention",)}
    described = {stem: types.SimpleNamespace(COMPOSES={"touches": names}) for stem, names in touches.items()}
    monkeypatch.setattr(method, "parts", lambda: described)
    spans = {"slow": (-0.32, -0.28, 0.0), "small": (-0.32, -0.28, 0.0), "faster later": (-0.32, -0.28, 0.1)}
    rows = [
        {"part": stem, "prefill": (low + high) / 2, "prefill_low": low, "prefill_high": high, "decode_low": decoded}
        for stem, (low, high, decoded) in (spans | {"unsure": (-0.3, 0.1, 0.0)}).items()
    ]
    nothing = pd.DataFrame()
    contrasts = Contrasts({}, pd.DataFrame(rows), nothing, nothing, nothing, "planted")
    assert contrasts.only_slower() == {
        "slow": "alone it prefills at 0.74× (0.73 to 0.76) of the speed, and stores nothing less"
    }
    assert contrasts.losses_alone == {}


def test_a_working_pair_with_a_failing_part_has_no_gain():
    """Such a pair is not measured: its gain was not a number, or the column of gains was missing."""
    pairs = pd.DataFrame([{"state": "works", "prefill_both": 0.2}, {"state": "works", "prefill_both": None}])
    nothing = pd.DataFrame()
    contrasts = Contrasts({}, pd.DataFrame([{"prefill": 0.1}]), pairs, nothing, nothing, "planted")
    assert [row["value"] for row in experiment.impact(contrasts, None, 2)] == pytest.approx(np.exp([0.1, 0.2]))
    unmeasured = replace(contrasts, alone=nothing, pairs=pairs[["state"]])
    assert experiment.impact(unmeasured, None, 2) == []


def test_a_model_with_one_applicable_part_is_a_result_not_a_failure(tiny, monkeypatch):
    loaded = types.SimpleNamespace(model=tiny("qwen3-4b-instruct-2507"), scale="proxy")
    monkeypatch.setattr(method, "applicable", lambda model: (["only"], {}))
    with pytest.raises(NotApplicable, match="1 optimization applies to this model; composing needs two"):
        parts_setup.prepare(loaded, settings.read("quick"), 0)


def _overhead(verdict: str) -> list[measurement.Measurement]:
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 1.0, 1.0, "planted")
    return [rate.model_copy(update={"verdict": verdict})]


@pytest.mark.parametrize(
    ("verdict", "forced", "identical", "outcomes"),
    [
        ("equivalent", "crashed", True, [False, False, False, False, False, False]),
        ("worse", "works", False, [False, True, False, True, True, False]),
        ("inconclusive", "refused", True, [False, False, False, None, False, False]),
    ],
)
def test_every_claim_has_its_answer(verdict, forced, identical, outcomes):
    exchanged = LiveExchange([0.001], [{"swapped in": "a"}], identical)
    contrasts = _contrasts(*[(-0.1, 0.1)] * 10)
    findings = (_study(forced), contrasts, _overhead(verdict), exchanged, _stack("a", "b"))
    answers = experiment.refutations(*findings)
    assert [claim for claim, _, _ in answers] == list(experiment.CLAIMS)
    assert [refuted for _, refuted, _ in answers] == outcomes
    sentence = experiment.sentence(*findings)
    assert all(brief.count(part) <= brief.MOST_WORDS for part in re.split(r"\. (?=[A-Z0-9])", sentence)), sentence
    stack = "a → b, at 100 % of the strength of each part that can be weakened"
    assert sentence.startswith(f"The judged stack: {stack}. ")
    wide = findings[2][0].model_copy(update={"ratio": 0.98, "ci": (0.8, 1.2)})
    rates = experiment.refutations(*findings[:2], [wide], *findings[3:])[3][2]
    assert rates == f"prefill at 0.98 (0.80–1.20) of the rate, {verdict}", "no more digits than the interval deserves"
    assert "1 of 2 ordered pairs work" in sentence and "0 of 10 intervals exclude zero" in sentence


def test_parts_that_change_no_answer_do_not_show_that_margins_hold_together():
    """Streaming plus any one part made two: nothing could have refuted the claim."""
    of = lambda *stems: experiment.refutations(  # noqa: E731
        _study(), _contrasts(), [], LiveExchange([], [], True), _stack(*stems)
    )[-1]
    assert of("structured_pruning", "streaming_computation")[1:] == (
        None, "the stack is structured_pruning → streaming_computation; 1 of its parts can lose quality"
    )  # fmt: skip
    assert of("structured_pruning", "tensor_decomposition", "streaming_computation")[1] is False
    assert of("streaming_computation")[1] is True


def test_claims_without_outcomes_are_left_open():
    nothing = LiveExchange([], [], True)
    answers = experiment.refutations(_study(second="crashed"), _contrasts(), [], nothing, _stack("a"))
    assert [refuted for _, refuted, _ in answers] == [True, None, None, None, None, True]
    assert answers[-1][2] == "the stack is a", "one part composes nothing"
    assert _study().too_strict == [] and _study("works").too_strict == ["b → a"]


class Scribbler(nn.Module):
    """A part of an optimized model that writes into a baseline weight at every call."""

    def __init__(self, inner: nn.Module, weight: nn.Parameter):
        super().__init__()
        self.inner, self.shared = inner, [weight]

    def forward(self, *arguments, **options):
        with torch.no_grad():
            self.shared[0].mul_(1.01)
        return self.inner(*arguments, **options)


def exchanged_with(model, replacement) -> LiveExchange:
    setup = types.SimpleNamespace(loaded=types.SimpleNamespace(model=model), weights=io.weights_hash(model))
    study = types.SimpleNamespace(singles={"planted": Attempt([], "works", None, replacement)})
    return experiment.exchange_live(setup, study, torch.arange(9, 41)[None])


def test_a_trace_in_the_baseline_refutes_the_claim_and_is_removed(tiny):
    """The exchange asserted that there was none: the run failed, and the claim could not be refuted."""
    model = tiny("qwen3-4b-instruct-2507")
    before, sound = io.weights_hash(model), exchanged_with(model, copy.deepcopy(model))
    assert sound.identical and sound.done == 1 and sound.reverted == "weights and logits identical after 1 exchange"
    assert sound.caption.startswith("After reverting: weights and logits identical after 1 exchange; longest wait ")
    leaky = copy.deepcopy(model)
    leaky.model.norm = Scribbler(leaky.model.norm, model.model.norm.weight)
    traced = exchanged_with(model, leaky)
    findings = (_study(), _contrasts((-0.1, 0.1)), _overhead("equivalent"))
    assert experiment.refutations(*findings, traced, _stack("a"))[4][1] is True
    assert "different after 1 exchange" in traced.caption and io.weights_hash(model) == before


def test_a_trace_outside_the_weights_is_removed_or_measuring_stops(tiny):
    """Planted: a write to a buffer that no file holds, so that the hash of the weights is unchanged; then a hook."""
    model = tiny("qwen3-4b-instruct-2507")
    ids_BT, leaky = torch.arange(9, 41)[None], copy.deepcopy(model)
    logits_BTC, buffer = model(input_ids=ids_BT).logits, model.model.rotary_emb.inv_freq.clone()
    leaky.model.norm = Scribbler(leaky.model.norm, model.model.rotary_emb.inv_freq)
    assert "different after 1 exchange" in exchanged_with(model, leaky).caption
    assert torch.equal(model.model.rotary_emb.inv_freq, buffer)
    assert torch.equal(model(input_ids=ids_BT).logits, logits_BTC)
    hooked, norm = copy.deepcopy(model), model.model.norm

    def hook(*_: object) -> None:
        if not norm._forward_hooks:
            norm.register_forward_hook(lambda module, given, output: 2 * output)

    hooked.model.norm.register_forward_hook(hook)
    with pytest.raises(AssertionError, match="a trace that cannot be removed"):
        exchanged_with(model, hooked)


def test_a_model_that_cannot_be_exchanged_proves_nothing(tiny):
    refused = exchanged_with(tiny("qwen3-4b-instruct-2507"), tiny("qwen3-coder-30b"))
    assert refused.done == 0 and refused.waits == [] and refused.rows[0]["tokens changed"] is None
    assert refused.rows[0]["in mid-request"].startswith("not at all: ")
    findings = (_study(), _contrasts((-0.1, 0.1)), _overhead("equivalent"), refused, _stack("a"))
    assert experiment.refutations(*findings)[4][1:] == (None, "nothing could be exchanged")
    assert "nothing could be exchanged" in experiment.sentence(*findings) and "nan" not in refused.caption
    kept = experiment.details(_stack("a"), [], _study(), findings[1], refused)
    assert kept["reverted_bit_identical"][0] is None


def refusing(monkeypatch, model, batch) -> types.SimpleNamespace:
    """A setup of two parts, the second of which refuses everything; `third` does not apply to the model."""

    def refuse(model, calibration):
        raise UserError("second: no channel is left to cut")

    def sound(model, calibration):
        return copy.deepcopy(model)

    described = {"touches": (), "needs": (), "invalidates": (), "trial": {}}
    modules = {
        stem: types.SimpleNamespace(COMPOSES=described, SEARCH_SPACE={}, apply=apply, applies_to=lambda model: None)
        for stem, apply in (("first", sound), ("second", refuse), ("third", sound))
    }
    monkeypatch.setattr(method, "parts", lambda: modules)
    options = {"calibration": [batch], "seed": 0, "keeps_singles": True, "applied_before": {}}
    parts = {"fitting": ["first", "second"], "unfit": {"third": "it has no experts"}}
    return types.SimpleNamespace(loaded=types.SimpleNamespace(model=model), **options, **parts)


def test_a_refusing_part_is_skipped_where_shapes_are_shown(tiny, batch, monkeypatch):
    """It raised in the cell, and the run failed before a pair was tried."""
    setup = refusing(monkeypatch, tiny("qwen3-4b-instruct-2507"), batch)
    steps, left_out = experiment.arranged(setup, "auto")
    shown = experiment.shapes_of_middle_block(setup, [steps[1], steps[0]])
    assert left_out == {} and list(shown.columns) == ["tensor", "baseline", "second", "first"]
    assert shown.second[0] == "not applied: second: no channel is left to cut" and set(shown.second[1:]) == {
        "not applied"
    }
    assert list(shown["first"]) == list(shown.baseline)
    assert list(setup.applied_before) == [strength.named([steps[0]])], "what was made is kept by the steps that made it"


def test_steps_that_cannot_be_applied_are_a_result_not_a_fault(tiny, batch, monkeypatch):
    setup = refusing(monkeypatch, tiny("qwen3-4b-instruct-2507"), batch)
    assert [step.optimization for step in experiment.arranged(setup, "second + first")[0]] == ["second", "first"]
    with pytest.raises(NotApplicable, match=r"steps first\+third: third: it has no experts"):
        experiment.arranged(setup, "first+third")
    with pytest.raises(UserError, match='no optimization "fist"'):
        experiment.arranged(setup, "fist")
    monkeypatch.setattr(
        method, "conflict", lambda before, step, _: "channels" if step.optimization == "first" else None
    )
    with pytest.raises(NotApplicable, match="first needs channels, which second takes away; put first first"):
        experiment.arranged(setup, "second+first")


def test_parts_are_tried_on_as_much_text_as_the_width_needs(tiny, monkeypatch):
    """Also at effort preview, where windows are shorter."""
    monkeypatch.setattr(calibration_text, "TOKENS_PER_INPUT", 256)
    monkeypatch.setattr(calibration_text.tasks, "calibration", lambda loaded, *size: size)
    monkeypatch.setattr(parts_setup.tasks, "text_windows", lambda *_: None)
    loaded = types.SimpleNamespace(model=tiny("qwen3-4b-instruct-2507"), scale="full", random_weights=False)
    for name, sequences, length in (("standard", 64, 256), ("quick", 64, 256), ("preview", 128, 128)):
        setup = parts_setup.prepare(loaded, settings.read(name), 5)
        assert setup.calibration == (sequences, length, 5), name
