"""What the experiment concludes from planted verdicts and shares."""

import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.errors import UserError
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, settings
from lib.measure.metrics.pairs import Pairs
from lib.measure.quality import sanity
from lib.models.checkpoints import io, placement
from lib.optimizations.common import judgement
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.evidence import interactions
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.pre_vs_post_optimization import attribution, experiment, method, outcome, returns
from lib.optimizations.pre_vs_post_optimization.experiment import Attribution, GainSweep
from lib.report.records.setting import stack as recorded_stack
from lib.report.text import brief, reading


def _verdict(verdict: str, margin: float | None = 0.02) -> measurement.Measurement:
    score = measurement.informative("f1_macro", "classify", 0.9, 0.9, "planted")
    return score.model_copy(update={"verdict": verdict, "margin": margin})


@pytest.mark.parametrize(
    ("control", "quality", "changes", "worse", "outcomes"),
    [
        (["equivalent"], ["maintained"], 3, [], [False, False, False]),
        (["equivalent", "inconclusive"], ["maintained"], 3, [], [None, False, False]),
        (["inconclusive", "worse"], ["maintained"], 3, [], [True, False, False]),
        (["equivalent", "better"], ["maintained", "not_maintained"], 3, ["f1_macro"], [True, True, True]),
        (["informative"], ["maintained", "inconclusive"], 0, [], [None, None, None]),
        ([], [], 0, [], [None, None, None]),
    ],
)
def test_every_claim_has_its_answer(control, quality, changes, worse, outcomes):
    answers = outcome.refutations(
        [_verdict(verdict) for verdict in control], [_verdict(verdict) for verdict in quality], changes, worse
    )
    assert [claim for claim, _, _ in answers] == list(outcome.CLAIMS)
    assert [refuted for _, refuted, _ in answers] == outcomes and all(evidence for _, _, evidence in answers)
    # A worse guard is no regression: "0 judged metrics got worse" stood beside a table of them.
    named = f" ({', '.join(worse)})" if worse else ""
    counted = f"{changes} primary metrics decided against an earlier build, {len(worse)} of them worse"
    assert answers[2][2] == counted + named


def test_the_reading_of_shares_starts_with_the_largest():
    names = (("a", 0.1), ("b", 0.3), (attribution.WHOLE, 0.4))
    rows = [
        {"what": what, "part": part, "value": value, "low": value - 0.1, "high": value + 0.1}
        for what in ("prefill", "decode", "loss")
        for part, value in names
    ]
    shared = Attribution(pd.DataFrame(rows), "planted")
    first, second = shared.reading().split(". ", 1)
    assert reading.two(f"{first}.", second) and "comes from b, +0.300" in second
    even = {"a": 0.1, "b": 0.12, "c": 0.1, attribution.WHOLE: 0.32}
    slower = {"a": -0.3, "b": 0.1, attribution.WHOLE: -0.2}
    for shares, begun in ((even, "gains +0.320"), (slower, "changes by −0.200")):
        rows_of = [{"what": "prefill", "part": part, "value": value} for part, value in shares.items()]
        frame = pd.DataFrame([row | {"low": row["value"] - 0.1, "high": row["value"] + 0.1} for row in rows_of])
        text = Attribution(frame, "planted").reading()
        assert begun in text and "The largest share comes from b, +0.1" in text and "Most of it" not in text
    only = Attribution(pd.DataFrame(rows)[lambda frame: frame.part != "a"], "planted")
    assert only.reading().endswith("(+0.300 to +0.500). All of it comes from b, its only part.")
    assert list(shared.speeds().arm)[:2] == ["a, prefill", "b, prefill"] and len(shared.losses()) == 3


def _setup(*steps: str, considered=()) -> experiment.StackSetup:
    stack = method.ChosenStack([RecipeStep(optimization=step) for step in steps], "the default rule", [*considered])
    return experiment.StackSetup(None, None, None, 0, [], stack, "")


def test_a_stored_stack_is_calibrated_as_it_was_judged(tiny, monkeypatch):
    """At effort quick, a stack chosen at standard was applied with a quarter of the text on which it won."""
    asked, model = [], tiny("qwen3-4b-instruct-2507")
    loaded = types.SimpleNamespace(model=model, scale="proxy", random_weights=False)
    monkeypatch.setattr(calibration_text.tasks, "calibration", lambda loaded, *size: asked.append(size[0]) or size)
    for chosen_at in ("", "standard"):
        stack = method.ChosenStack([], "a search", effort=chosen_at)
        monkeypatch.setattr(method, "chosen", lambda loaded, text, stack=stack, **options: stack)
        setup = experiment.prepare(loaded, settings.read("quick"), 0, 0.03)
        assert setup.calibration[0] == asked[-1]
    assert asked == [settings.read(name).calibration_sequences for name in ("quick", "quick", "standard")]


def test_an_empty_stack_is_reported_as_an_answer():
    """The empty stack is stated first, its rejected candidates are in the table, its comparison is the identity's."""
    nothing = _setup(considered=[{"step": "a", "kept": False, "why": "perplexity grows"}])
    assert not nothing.pays and "nothing pays here" in nothing.in_words and list(nothing.table()["why"])
    text = outcome.sentence(nothing, "Prefill speed equivalent.")
    assert text.startswith("Nothing pays here: of 1 candidate none") and text.endswith("Prefill speed equivalent.")
    assert outcome.sentence(_setup("a"), "Faster.") == "Faster."
    undecided = {"state": "works", "kept": False, "why": "not surely faster"}
    refused = [{"state": state, "kept": False, "why": "no"} for state in ("refused", "crashed")]
    text = outcome.sentence(_setup(considered=[undecided, *refused]), "")
    assert "of 1 candidate none is surely within the margins" in text and ". 2 more could not be applied. " in text
    assert all(brief.count(part) <= brief.MOST_WORDS for part in text.split(". ")), text
    assert outcome.sentence(_setup(considered=refused), "") == "Nothing pays here: no candidate could be applied. "
    assert outcome.sentence(_setup(), "") == "Nothing pays here. ", "a search chose so"
    assert outcome.APPLIED == recorded_stack.APPLIED, "the page counts the same candidates"
    degenerate = {"state": "invalid", "kept": False, "why": "it repeats one token"}
    text = outcome.sentence(_setup(considered=[undecided, degenerate]), "")
    assert "of 2 candidates" in text and "could not be applied" not in text, "it was applied, and broke the model"
    speed = measurement.informative("prefill_tokens_per_second", "prefill", 1.0, 1.0, "planted")
    judged = judgement.Judgement(None, [_verdict("maintained")], None)
    own = experiment.identity_control(nothing, None, judged, Compared([speed]))
    assert [m.metric for m in own] == ["f1_macro", "prefill_tokens_per_second"]
    shares = experiment.attributed(_setup(), experiment.Subsets({}, {}, 0.0), None, Compared([]))
    assert len(shares.speeds()) == len(shares.losses()) == 0
    first, second = shares.reading().split(". ", 1)
    assert reading.two(f"{first}.", second)
    assert second == "There is no gain to attribute."


@pytest.mark.parametrize("broken, where", [("a → b", "whole"), ("b", "subset")])
def test_nothing_is_attributed_to_a_broken_stack(tiny, monkeypatch, broken, where):
    """Subsets of a degenerate stack were still timed, and NaN losses made the run fail."""
    names = [interactions.named(*subset) for subset in ((), ("a",), ("b",), ("a", "b"))]
    models = {name: tiny("qwen3-4b-instruct-2507") for name in names}
    weight = models[broken].model.layers[0].mlp.down_proj.weight
    weight.data.fill_(float("nan"))
    monkeypatch.setattr(experiment.tasks, "text_windows", lambda *_: torch.randint(8, 96, (4, 16)))
    monkeypatch.setattr(experiment.tasks, "window_sources", lambda *_: np.arange(4))
    monkeypatch.setattr(interactions, "time_arms", lambda *_, **__: pytest.fail("timed"))
    prompt_BT = torch.randint(8, 96, (1, 16))
    invalid = sanity.check(models["a → b"], prompt_BT, random_weights=True)
    assert (invalid is not None) is (where == "whole")
    loaded, few = types.SimpleNamespace(random_weights=False), types.SimpleNamespace(windows=2, window_tokens=16)
    setup = replace(_setup("a", "b"), loaded=loaded, effort=few, quick=few)
    every = experiment.Subsets({"a": [], "b": []}, models, 0.0)
    for said in dict.fromkeys((invalid, None)):
        shared = experiment.attributed(setup, every, prompt_BT, Compared([]), said)
        assert len(shared.speeds()) == len(shared.losses()) == 0 and "not finite" in shared.source
        first, second = shared.reading().split(". ", 1)
        assert reading.two(f"{first}.", second) and "Nothing pays" not in first
        assert second == "So the gain is not attributed to parts.", "the stack may gain where a subset of it is broken"
        assert outcome.details(setup, shared, GainSweep([], pd.DataFrame()))["attribution"][0] == []


def test_the_gain_is_the_whole_stacks_if_a_part_requires_another(monkeypatch):
    """The run failed: a subset's missing requirement is no fault of the stack, which works."""

    def compose(model, calibration, steps, **options):
        if model == "baseline" and steps[0].optimization == "b":
            raise UserError("b cannot be applied here: a prepares it")
        return types.SimpleNamespace(model="a alone")

    monkeypatch.setattr(attribution.composing, "compose", compose)
    monkeypatch.setattr(experiment.io, "weights_hash", lambda _: "")
    monkeypatch.setattr(experiment.placement, "require_room", lambda *_: None)
    monkeypatch.setattr(experiment.tasks, "text_windows", lambda *_: np.zeros((8, 4)))
    monkeypatch.setattr(experiment.tasks, "window_sources", lambda *_: np.arange(8))
    loaded, quick = types.SimpleNamespace(model="baseline", random_weights=True), settings.read("quick")
    setup = replace(_setup("a", "b"), loaded=loaded, effort=quick, quick=quick)
    stack = method.AppliedStack("whole", setup.stack.steps, 1.0, 0.0, "estimated", "planted")
    every = experiment.subsets(setup, stack, 60.0)
    assert every.models == {"baseline": "baseline", "a + b": "whole"} and list(every.parts) == ["a + b"]
    pairs = Pairs([1.0] * 6, [0.9] * 6, ["AB", "BA"] * 3, [None] * 6, 1)
    compared = Compared([], {"prefill": types.SimpleNamespace(pairs=pairs)})
    shared = experiment.attributed(setup, every, None, compared)
    assert shared.source.endswith("because a subset cannot be built: b cannot be applied here: a prepares it")
    assert shared.reading().endswith("All of it comes from a + b, its only part.")


def test_a_sweep_without_points_is_empty():
    nothing = GainSweep([], pd.DataFrame([], columns=experiment.CURVES))
    assert len(nothing.of("prefill")) == 0 and reading.curves(nothing.of("prefill"), "tokens")


def test_break_even_is_described_in_words():
    text = returns.in_words([measurement.unavailable("break_even_tokens", "prefill, by time", "no gain was shown")])
    assert text == "is not shown to pay: no gain was shown"
    paid = measurement.informative("break_even_tokens", "prefill, by time", None, 44911.3, "planted")
    assert returns.in_words([paid]) == "pays from about 45,000 tokens", "the saving is known to a tenth"
    assert returns.in_words([]).startswith("the break-even is unknown")


def test_a_stack_has_no_payback_where_no_timing_is_judged():
    rates = []
    for workload, floor in (("prefill", 0.01), ("decode", 0.12)):
        rate = measurement.informative(f"{workload}_tokens_per_second", workload, 100.0, 120.0, "planted", ratio=1.2)
        facts = {"verdict": "better", "noise_floor": floor, "reason": "too noisy" if floor > 0.1 else None}
        rates.append(rate.model_copy(update=facts))
    stack = method.AppliedStack(None, [], 1.0, 2.0, "estimated", "planted")
    assert "pays from" in returns.in_words(returns.returns(stack, rates[:1]))
    withheld = judgement.timed(Compared(rates)).measurements
    assert returns.in_words(returns.returns(stack, withheld)) == "is not shown to pay: no gain was shown (inconclusive)"


def test_a_single_parts_gain_has_the_interval_of_the_processes_that_timed_it(monkeypatch):
    """Six processes differ by more than their rounds do: the interval is the judged one, and so is the source."""
    random = np.random.default_rng(0)
    process = [number for number in range(6) for _ in range(10)]
    d_N = -0.1 + 0.03 * random.standard_normal(6)[process] + 0.001 * random.standard_normal(60)
    pairs = Pairs([1.0] * 60, np.exp(d_N).tolist(), ["AB", "BA"] * 30, [None] * 60, 1, process=process)
    timed = {"prefill": types.SimpleNamespace(pairs=pairs)}
    models = {interactions.BASELINE: None, "a": None}
    lost = {name: np.linspace(2.0, 2.1, 8) * factor for name, factor in ((interactions.BASELINE, 1.0), ("a", 1.02))}
    monkeypatch.setattr(interactions, "losses", lambda *_: lost)
    monkeypatch.setattr(experiment.tasks, "text_windows", lambda *_: np.zeros((8, 4)))
    monkeypatch.setattr(experiment.tasks, "window_sources", lambda *_: np.repeat([0, 1], 4))
    loaded = types.SimpleNamespace(random_weights=False)
    quick = settings.read("quick")
    setup = types.SimpleNamespace(loaded=loaded, effort=quick, quick=quick, seed=0)
    shared = experiment.attributed(setup, experiment.Subsets({"a": []}, models, 0.0), None, Compared([], timed))
    own = shared.shares.set_index(["what", "part"]).loc[("prefill", "a")]
    judged = pairs.effect()
    assert (own["value"], own["low"], own["high"]) == pytest.approx((-judged.median, -judged.high, -judged.low))
    assert shared.source == f"prefill: {pairs.describe()}; 8 windows" and "6 fresh processes" in shared.source
    loss = shared.shares.set_index(["what", "part"]).loc[("loss", "a")]
    assert loss["high"] - loss["low"] > 2 * (0.02 * np.ptp(lost["a"])), "windows of two documents are two draws"


def test_a_stack_has_no_more_parts_than_memory_holds_subsets(tiny, monkeypatch):
    model, built = tiny("qwen3-4b-instruct-2507"), []

    def every_subset(model, text, parts, **_):
        built.append(len(parts))
        return {(): model}

    monkeypatch.setattr(attribution, "every_subset", every_subset)
    size = sum(parameter.nbytes for parameter in model.parameters())
    setup = replace(_setup("a", "b", "c"), loaded=types.SimpleNamespace(model=model), weights=io.weights_hash(model))
    stack = types.SimpleNamespace(model=model, seconds=0.0)
    for copies in (100, 3, 1):  # eight subsets need six further models, four need two, two need none
        monkeypatch.setattr(placement, "free_bytes", lambda _, copies=copies: copies * size / placement.WEIGHTS_SHARE)
        experiment.subsets(setup, stack, 60.0)
    assert built == [3, 2, 1]
