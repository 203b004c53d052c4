"""The notebook's protocol on a tiny model: what is removed, what its curves show, and an answer to every claim."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.measure.metrics import busy, measurement, settings
from lib.measure.quality import evaluate
from lib.models.calibration.activations import observe
from lib.models.calibration.distillation import Lessons
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.structured_pruning import experiment, method, outcome, rivals
from lib.report.text import reading

EFFORT = replace(settings.read("quick"), new_tokens=2)


@pytest.fixture
def setup(tiny, batch):
    class Loaded:
        model = tiny("qwen3-4b-instruct-2507")
        random_weights = False
        scale = "proxy"

    observation = observe(Loaded.model, [batch])
    return experiment.PruningSetup(Loaded(), [batch], [batch] * 4, observation, seconds=1.0, seed=0, effort=EFFORT)


def test_the_cut_removes_its_share_and_includes_the_observation_time(setup):
    cut = experiment.cut(setup, 0.2, "auto", finetune_steps=2)
    assert abs(cut.removed - 0.2) < 0.06
    assert cut.seconds > setup.seconds
    assert len(cut.lessons.losses) == 2 and "2 steps of training" in cut.summary
    shapes = experiment.shapes(setup.baseline, cut.optimized, setup.middle)
    changed = shapes[shapes.baseline != shapes.optimized].tensor
    assert sorted(changed) == ["mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"]


def test_experts_without_tokens_are_counted(setup, tiny, batch):
    assert setup.unseen == 0
    observation = observe(tiny("qwen3-coder-30b"), [batch])
    observation.blocks[2].expert_tokens_E[[1, 4]] = 0
    missing = sum(int((block.expert_tokens_E == 0).sum()) for block in observation.blocks)
    assert replace(setup, observation=observation).unseen == missing >= 2


def test_real_models_are_fitted_and_not_trained(setup):
    assert experiment.steps_of(setup.loaded, -1, EFFORT) == experiment.PROXY_STEPS
    setup.loaded.scale = "full"
    assert experiment.steps_of(setup.loaded, -1, EFFORT) == 0 and experiment.steps_of(setup.loaded, 7, EFFORT) == 7
    enough = [{"input_ids": torch.randint(8, 96, (48, 48), generator=torch.Generator().manual_seed(5))}]
    fitted = experiment.cut(replace(setup, calibration=enough), 0.2, "auto", finetune_steps=0)
    kept, as_it_was = (_reader(model) for model in (fitted.optimized, fitted.pruned))
    assert kept.shape == as_it_was.shape and not torch.equal(kept, as_it_was)
    # The notebook measures what the optimization does by itself at the same knobs, as in a stack.
    assert torch.equal(kept, _reader(method.apply(setup.baseline, enough, ratio=0.2, observation=setup.observation)))
    assert torch.equal(as_it_was, _reader(method.apply(setup.baseline, [], ratio=0.2, observation=setup.observation)))
    setup.loaded.random_weights = True
    random = experiment.cut(replace(setup, calibration=enough), 0.2, "auto", finetune_steps=0)
    assert random.fitted is random.pruned


@pytest.mark.parametrize("granularity", ["auto", "channels", "heads", "depth"])
@pytest.mark.parametrize("ratio", [0.03, 0.2, 0.3])
def test_removal_is_compared_with_the_plan_not_with_the_request(tiny, batch, name, ratio, granularity):
    """Two of eight experts are not 30 %, whatever the number of blocks; nor is one block of four 3 %."""
    model = tiny(name)
    observation = observe(model, [batch])
    setup = experiment.PruningSetup(
        SimpleNamespace(model=model, random_weights=True), [batch], [batch], observation, 1.0, 0, EFFORT
    )
    try:
        cut = experiment.cut(setup, ratio, granularity, finetune_steps=0)
    except NotApplicable:
        return
    assert experiment.is_as_planned(setup, cut, ratio, granularity)
    assert not experiment.is_as_planned(setup, replace(cut, removed=cut.removed + 0.4), ratio, granularity)
    low, high = method.planned(model, ratio, granularity)
    if granularity == "auto" and method.plan(model, ratio)["experts"]:
        assert low == high and high == pytest.approx(cut.removed, abs=1e-6)


def _reader(model):
    return anatomy(model).blocks[1].feed_forward.down.weight


def test_training_without_benefit_keeps_the_fitted_cut_and_is_not_charged(setup, monkeypatch):
    """No check found the trained steps closer: the fitted cut is the optimized model, and the sentence says why."""
    enough = [{"input_ids": torch.randint(8, 96, (48, 48), generator=torch.Generator().manual_seed(5))}]
    setup, clock = replace(setup, calibration=enough), [0.0]  # a clock on which only training takes time

    def in_vain(pruned, *_, **__):
        clock[0] += 2.0
        return copy.deepcopy(pruned), Lessons([0.1, 0.5], {0: 0.1, 1: 0.3, 2: 0.2})

    monkeypatch.setattr(method, "recover", in_vain)
    monkeypatch.setattr(experiment, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    cut = experiment.cut(setup, 0.2, "auto", finetune_steps=2)
    assert cut.optimized is cut.fitted is not cut.pruned and cut.seconds == setup.seconds
    assert cut.summary.endswith(
        " The matrices that read removed parts are refitted by least squares."
        " 2 steps of training did not lower the divergence "
        "(0.2 nats per token on text set aside at best, 0.1 before); none was kept."
    )
    rival_cuts = rivals.set_up(setup, _text(setup), 0.2, "auto")
    arms, left_out = rivals.controls(rival_cuts, cut)
    assert left_out["activation, recovered"].endswith("so the optimized model is activation, compensated")
    assert rivals.optimized_arm(arms, cut).name == "activation, compensated"
    assert outcome.details(setup, {}, cut, pd.DataFrame())["distillation_held_out"]["value"][1]["divergence"] == 0.3


def _text(setup):
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, anatomy(setup.baseline).vocabulary, (4, 16), generator=generator)
    return evaluate.read(setup.baseline, ids_NT)


@pytest.mark.parametrize("changed", [{"ratio": 0.89}, {"ratio": 2.0}, {"granularity": "rows"}], ids=str)
def test_impossible_cuts_are_refused_before_the_model_is_read(setup, monkeypatch, changed):
    def read(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(experiment.prompts, "calibration", read)
    options = {"ratio": 0.2, "granularity": "heads", "seed": 0}
    with pytest.raises(UserError, match=r"out of reach|out of range|expected one of"):
        experiment.set_up(setup.loaded, EFFORT, **options | changed)
    with pytest.raises(UserError, match=r"out of reach|out of range|expected one of"):
        experiment.optimize(setup.loaded, EFFORT, finetune_steps=0, **options | changed)


def test_a_cut_that_one_sequence_cannot_fit_is_not_called_fitted(setup):
    """Nothing can be held out from it, so the cut stays as it is."""
    one = [{"input_ids": torch.arange(8, 40)[None]}]
    cut = experiment.cut(replace(setup, calibration=one), 0.2, "auto", finetune_steps=0)
    assert cut.optimized is cut.fitted is cut.pruned and "least squares" not in cut.summary


def test_shapes_fall_back_to_the_last_remaining_block(setup):
    blocks = len(anatomy(setup.baseline).blocks)
    cut = experiment.cut(setup, 0.25, "depth", finetune_steps=0)
    assert len(anatomy(cut.optimized).blocks) < blocks
    assert len(experiment.shapes(setup.baseline, cut.optimized, blocks - 1))


def test_curves_are_sorted_and_described_in_two_sentences(setup):
    shares = method.plan(setup.baseline, 0.3, "channels")
    curves = experiment.saliency_curves(setup, shares)
    assert set(curves.arm) == {"channels"}
    assert curves.value.is_monotonic_decreasing and curves.value.iloc[0] == 1
    flat = pd.DataFrame({"strength": range(10), "value": [1.0] * 10, "arm": "channels"})
    assert "flat" in experiment.read_saliency(flat, {"channels": 0.3})[1]
    steep = flat.assign(value=[1.0] + [0.01] * 9)
    assert "steep" in experiment.read_saliency(steep, {"channels": 0.3})[1]
    assert experiment.saliency_curves(setup, method.plan(setup.baseline, 0.25, "depth")).empty


def test_expert_channels_are_ranked_and_a_zero_ratio_is_not_a_removed_block(setup, tiny, batch):
    model = tiny("qwen3-coder-30b")
    loaded = SimpleNamespace(model=model, random_weights=False)
    routed = replace(setup, loaded=loaded, observation=observe(model, [batch]))
    shares = method.plan(model, 0.3, "channels")
    curves = experiment.saliency_curves(routed, shares)
    assert "expert_channels" in set(curves.arm)
    said = reading.two(*experiment.read_saliency(curves, shares))
    assert said.startswith(f"The {100 * shares['channels']:.0f} % least salient of the expert channels carry")
    for ratio, granularity, words in (
        (0.0, "channels", "Nothing is to be removed."),
        (0.25, "depth", "Whole blocks are removed"),
    ):
        shares = method.plan(model, ratio, granularity)
        curves = experiment.saliency_curves(routed, shares)
        assert curves.empty and reading.two(*experiment.read_saliency(curves, shares)).startswith(words)


def test_rivals_lose_the_same_share_and_every_claim_is_answered(setup):
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, anatomy(setup.baseline).vocabulary, (4, 16), generator=generator)
    rival_cuts = rivals.set_up(setup, evaluate.read(setup.baseline, ids_NT), 0.2, "auto")
    arms, left_out = rivals.controls(rival_cuts, experiment.cut(setup, 0.2, "auto", finetune_steps=0))
    names = [arm.name for arm in arms]
    assert names[:2] == ["activation", "magnitude"] and "activation, recovered" not in names  # nothing was trained
    assert list(left_out) == ["experts alone"]
    assert {"activation, compensated", "activation, OWL", "depth alone, one span"} <= set(names)
    bars = pd.DataFrame({"arm": [arm.name for arm in arms], "value": 0.1})
    left = rivals.sized(bars, arms).set_index("arm")["weights, ×"]
    assert left["activation"] == left["magnitude"] < 1
    assert left["depth alone"] != left["activation"], "blocks come whole"
    assert rivals.sized(bars.head(0), arms).empty
    yardsticks, missing = rivals.yardsticks(setup, rival_cuts, ids_NT[:1], EFFORT)
    assert [arm.name for arm in yardsticks] == list(rivals.YARDSTICKS) and "out of reach" in str(missing)
    curves = rivals.impact(rival_cuts, arms)
    pd.testing.assert_frame_equal(curves, rivals.impact(rival_cuts))
    assert set(curves.arm) == set(method.SALIENCIES) and curves.strength.min() == pytest.approx(12.4, abs=0.1)
    assert tuple(claim for claim, _, _ in outcome.refutations(arms, [])) == outcome.CLAIMS


def test_a_gain_withheld_for_noise_in_another_rate_names_that_noise():
    """It is withheld because the noise floor of another rate is above a tenth."""
    both = []
    for workload, floor, reason in (("prefill", 0.01, None), ("decode", 0.12, "the noise floor of 12 % is above 10 %")):
        rate = measurement.informative(f"{workload}_tokens_per_second", workload, 100.0, 120.0, "planted", ratio=1.2)
        facts = {"verdict": "better", "noise_floor": floor, "ci": (1.15, 1.25), "reason": reason}
        both.append(rate.model_copy(update=facts | {"predicted": 1.3 if workload == "prefill" else 1.1}))
    assert outcome.refutations([], both[:1])[2][1] is False
    _, refuted, evidence = outcome.refutations([], busy.withhold_if_busy(both))[2]
    assert refuted is None and evidence.startswith("prefill: ") and evidence.endswith("12 % is above 10 %")


def test_without_text_nothing_is_decided(setup):
    cut = experiment.cut(setup, 0.2, "auto", finetune_steps=0)
    rival_cuts = rivals.set_up(setup, None, 0.2, "auto")
    assert rivals.controls(rival_cuts, cut) == ([], {}) and rivals.impact(rival_cuts).empty
    assert [refuted for _, refuted, _ in outcome.refutations([], [])] == [None, None, None]


def test_a_surely_closer_choice_is_named_with_its_weights():
    def arm(name: str, nats: float, weights: float) -> ThirdArm:
        read = measurement.informative("kl_divergence_nats", "prefill", 0.0, nats, "planted")
        size = measurement.counted("weights_bytes", "load", 100.0, 100 * weights, "planted")
        return ThirdArm(name, "planted", [read.model_copy(update={"ci": (0.9 * nats, 1.1 * nats)}), size])

    taught, bare = arm(rivals.RECOVERED, 0.01, 0.75), arm(rivals.BARE, 0.105, 0.7512)
    others = [arm("channels alone", 0.0335, 0.7936), arm("ean", 0.1, 0.75), arm("depth alone", 0.27, 0.71)]
    arms = [bare, *others, taught]
    assert rivals.heading(arms, {"heads alone": "out of reach"}) == (
        "KL in nats per token. Nearer than activation (0.105 at 0.751× of the weights): channels alone (0.0335 at "
        "0.794×). Left out: heads alone: out of reach."
    )
    assert rivals.heading([bare], {}) == "KL in nats per token. Left out: nothing."
    assert rivals.heading([], {}) == "KL in nats per token. Left out: nothing."


def test_the_curve_is_over_the_share_that_was_removed(setup):
    """Of four blocks a tenth, a fifth and three tenths are each one block: one model stood at 10, 20 and 30 %."""
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, anatomy(setup.baseline).vocabulary, (4, 16), generator=generator)
    rival_cuts = rivals.set_up(setup, evaluate.read(setup.baseline, ids_NT), 0.25, "depth")
    curves = rivals.impact(rival_cuts)
    assert set(curves.strength) == {25.0, 50.0} and not curves.duplicated(["arm", "strength"]).any()
