"""Strengths between zero and a part's own, and the strongest one within planted margins."""

import types

import pytest
import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search.search_quality import QualityLoss
from lib.optimizations.modular_components import method, strength

PRUNING, EXACT, FACTORS = "structured_pruning", "streaming_computation", "tensor_decomposition"


def _step(stem: str, **knobs) -> RecipeStep:
    return RecipeStep(optimization=stem, knobs=knobs)


def test_a_step_weakens_from_its_own_knob_to_almost_nothing():
    whole = _step(PRUNING, ratio=0.4, granularity="heads")
    assert strength.weakened(whole, strength.LEVELS) == whole
    half = strength.weakened(whole, strength.LEVELS // 2)
    assert half.knobs == {"ratio": 0.2, "granularity": "heads"} and strength.weakened(whole, 0) is None
    default = method.module_of(PRUNING).SEARCH_SPACE["ratio"]["default"]
    assert strength.weakened(_step(PRUNING), 4).knobs["ratio"] == pytest.approx(default / 2)
    attention = strength.weakened(_step("adaptive_sparse_attention", tau=0.6), 2)
    assert attention.knobs["tau"] == pytest.approx(0.9)
    exact = _step(EXACT, memory_ratio=1.0)
    assert strength.weakened(exact, 0) == exact


@pytest.mark.parametrize("truth", range(strength.LEVELS + 1))
def test_bisection_finds_the_highest_passing_level(truth):
    levels = []

    def within(level: int) -> bool:
        levels.append(level)
        return level <= truth

    assert strength.strongest(within) == truth and len(levels) <= 4 and 0 not in levels
    levels.clear()
    half = strength.LEVELS // 2
    assert strength.strongest(within, apart=half) == half * (truth // half) and len(levels) <= 2


@pytest.mark.parametrize("losing", range(1, 2**strength.LEVELS, 7))
def test_bisection_returns_only_levels_that_passed(losing):
    """If losses do not grow with strength, a level may be missed, but none that exceeds a margin is returned."""
    within = {level: not losing >> (level - 1) & 1 for level in range(1, strength.LEVELS + 1)}
    level = strength.strongest(within.__getitem__)
    assert level == 0 or within[level]
    assert level == strength.LEVELS or not within[level + 1]


def test_parts_that_refuse_or_do_not_shrink_the_model_are_left_out(tiny, batch, monkeypatch):
    described = {"touches": ("storage",), "needs": (), "invalidates": (), "trial": {}}

    def refuse(model, calibration):
        raise UserError("not today")

    def copy(model, calibration):
        return method.copy.deepcopy(model)

    modules = {
        stem: types.SimpleNamespace(COMPOSES=described, SEARCH_SPACE={}, apply=apply, applies_to=lambda model: None)
        for stem, apply in (("idle", copy), ("unwilling", refuse))
    }
    monkeypatch.setattr(method, "parts", lambda: modules)
    model = tiny("qwen3-4b-instruct-2507")
    kept, behind, why = strength.stack_at(model, [batch], [_step("idle"), _step("unwilling")], strength.LEVELS)
    assert kept == [] and "no smaller" in why["idle"] and "not today" in why["unwilling"]
    assert behind is not model and io.weights_hash(behind) == io.weights_hash(model)


class _Planted:
    """Loses in proportion to the removed channels."""

    def __init__(self, model):
        self.loaded = types.SimpleNamespace(model=model, random_weights=True)
        self.whole = cost_model.weights_bytes(model)

    def of(self, model) -> QualityLoss:
        removed = 1 - cost_model.weights_bytes(model) / self.whole
        return QualityLoss(0.0, removed, removed)


def test_the_strongest_stack_within_the_margins_is_found(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    before = io.weights_hash(model)
    steps = [_step(PRUNING, ratio=0.6), _step(EXACT, memory_ratio=1.0)]
    planted = _Planted(model)
    best, levels = strength.find(planted, [batch], steps, batch["input_ids"])
    assert best.within and [row.level for row in levels] == sorted({row.level for row in levels})
    assert [step.optimization for step in best.steps][-1] == EXACT and io.weights_hash(model) == before
    worse = strength.stack_at(model, [batch], steps, best.level + 1)[1]
    assert best.level == strength.LEVELS or not planted.of(worse).within()
    assert all("within the margins" in row.row() for row in levels)
    assert torch.isfinite(best.model(**batch).logits).all() and anatomy(best.model).blocks


def test_steps_made_earlier_are_reused_with_their_seconds(tiny, batch, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    steps = [_step(PRUNING, ratio=0.4), _step(EXACT, memory_ratio=1.0)]
    expected = strength.stack_at(model, [batch], steps, strength.LEVELS)[1]
    first = method.compose(model, [batch], steps[:1], arrange=False, seed=0).model
    applied_before = {strength.named(steps[:1]): strength.AppliedStep(first, 1000.0)}
    composed = []
    compose = method.compose
    monkeypatch.setattr(method, "compose", lambda *args, **kw: composed.append(args[2]) or compose(*args, **kw))
    kept, behind, _ = strength.stack_at(model, [batch], steps, strength.LEVELS, applied_before=applied_before)
    assert kept == steps and composed == [steps[1:]]
    assert torch.equal(behind(**batch).logits, expected(**batch).logits)
    monkeypatch.setattr(strength, "strongest", lambda within, *_, **__: strength.LEVELS * within(strength.LEVELS))
    planted = _Planted(model)
    planted.of = lambda model: QualityLoss(0.0, 0.0, 0.0)
    best, _ = strength.find(planted, [batch], steps, batch["input_ids"], applied_before=applied_before)
    assert best.level == strength.LEVELS and 1000 < best.seconds < 1100
    half, _, _ = strength.stack_at(model, [batch], steps, strength.LEVELS // 2, applied_before=applied_before)
    assert half[0].knobs["ratio"] == 0.2, "what was made at full strength is not taken for another"


@pytest.mark.parametrize(("losses", "left"), [({PRUNING: 0.5, FACTORS: 0.1}, FACTORS), ({PRUNING: 0.5}, PRUNING)])
def test_the_lossiest_part_is_left_out_if_all_together_exceed_the_margins(tiny, batch, losses, left):
    """Quality is planted: two weakened parts exceed the margins at any strength, either of them alone at none."""
    model = tiny("qwen3-4b-instruct-2507")
    steps = [_step(PRUNING, ratio=0.4), _step(FACTORS, method="plain"), _step(EXACT, memory_ratio=1.0)]
    planted, kept = _Planted(model), []
    stack_at = strength.stack_at

    def watched(*arguments):
        outcome = stack_at(*arguments)
        kept[:] = [step.optimization for step in outcome[0]]
        return outcome

    planted.of = lambda model: QualityLoss(0.0, *[0.5 * ({PRUNING, FACTORS} <= set(kept))] * 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strength, "stack_at", watched)
        best, tried = strength.find(planted, [batch], steps, batch["input_ids"], losses=losses)
        alone, _ = strength.find(planted, [batch], steps, batch["input_ids"])
    assert [step.optimization for step in best.steps] == [left, EXACT] and best.level == strength.LEVELS
    (out,) = {PRUNING, FACTORS} - {left}
    most = "loses most" if out in losses else "may lose most"
    assert best.left_out[out] == f"it {most}, and together with {left}, {EXACT} no strength is within the margins"
    assert [row.level for row in tried] == [1, 2, 4, 8, 8] and [row.within for row in tried] == [False] * 4 + [True]
    assert [step.optimization for step in alone.steps] == [EXACT], "without what each loses, none is preferred"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strength, "stack_at", watched)
        few, tried = strength.find(planted, [batch], steps, batch["input_ids"], losses=losses, apart=4)
    assert few.level == 4 and [row.level for row in tried] == [4, 8, 4], "where looks are few, half strength alone"


def test_a_part_in_no_stack_is_not_left_out_in_place_of_a_lossy_one(tiny, batch, monkeypatch):
    """The factors are refused at every strength and lose most alone: leaving them out would change no stack."""
    model = tiny("qwen3-4b-instruct-2507")
    steps = [_step(PRUNING, ratio=0.4), _step(FACTORS, method="plain"), _step(EXACT, memory_ratio=1.0)]
    planted, compose = _Planted(model), method.compose
    planted.of = lambda model: QualityLoss(0.0, *[float(cost_model.weights_bytes(model) < planted.whole)] * 2)

    def refusing(model, calibration, steps, **options):
        if [step.optimization for step in steps] == [FACTORS]:
            raise UserError("not today")
        return compose(model, calibration, steps, **options)

    monkeypatch.setattr(method, "compose", refusing)
    losses = {PRUNING: 0.1, FACTORS: 0.5}
    best, tried = strength.find(planted, [batch], steps, batch["input_ids"], losses=losses, keep_first=True)
    assert [step.optimization for step in best.steps] == [EXACT] and best.level == strength.LEVELS
    assert [(row.level, len(row.steps)) for row in tried] == [(1, 2), (2, 2), (4, 2), (8, 2), (8, 1)]
    assert best.left_out == {FACTORS: "not today", PRUNING: best.left_out[PRUNING]}
    assert "loses most" in best.left_out[PRUNING]


def test_the_first_step_is_made_once(tiny, batch, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    steps, earlier = [_step(PRUNING, ratio=0.4), _step(FACTORS, method="plain")], {}
    first = strength.stack_at(model, [batch], steps, 4, applied_before=earlier, keep_first=True)
    assert list(earlier) == [strength.named(first[0][:1])]
    composed, compose = [], method.compose
    monkeypatch.setattr(method, "compose", lambda *args, **kw: composed.append(args[2]) or compose(*args, **kw))
    again = strength.stack_at(model, [batch], steps, 4, applied_before=earlier, keep_first=True)
    assert [step.optimization for made in composed for step in made] == [FACTORS]
    assert torch.equal(again[1](**batch).logits, first[1](**batch).logits)


def test_parts_known_not_to_shrink_the_model_are_not_applied(tiny, batch, monkeypatch):
    model, composed, compose = tiny("qwen3-4b-instruct-2507"), [], method.compose
    monkeypatch.setattr(method, "compose", lambda *args, **kw: composed.append(args[2]) or compose(*args, **kw))
    sparse = _step("sparse_neural_networks", sparsity=0.4, method="magnitude")
    kept, _, why = strength.stack_at(model, [batch], [sparse], strength.LEVELS)
    assert kept == [] and why == {"sparse_neural_networks": strength.NO_SMALLER} and composed == [[]]
    kept, _, why = strength.stack_at(model, [batch], [_step(sparse.optimization, sparsity=0.9)], strength.LEVELS)
    assert [step.optimization for step in kept] == [sparse.optimization] and why == {}
