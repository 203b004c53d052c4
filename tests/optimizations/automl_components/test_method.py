"""Components are discovered, spaces are checked, infeasible configurations are cut and reported; a stop changes no
answer.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.measure.metrics import paired_stats, process_variance
from lib.measure.quality import evaluate
from lib.optimizations.automl_components import controls, finalists
from lib.optimizations.automl_components import method as automl
from lib.optimizations.automl_components import successive_filtering as bench_module
from lib.optimizations.automl_components.finalists import Finalist
from lib.optimizations.automl_components.method import Component
from lib.optimizations.automl_components.successive_filtering import Bench, JudgedStack
from lib.optimizations.common import recipe
from lib.optimizations.common.evidence import shapley
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import search_quality, study


def _fake(stem: str, apply, applies=lambda model: None, **knobs) -> Component:
    module = SimpleNamespace(apply=apply, applies_to=applies, SEARCH_SPACE=knobs)
    return Component(stem, module, knobs)


def _scale(model, calibration, *, share=0.5, kind="a"):
    """Shrink the first block's output projection: a larger share moves it further from the original."""
    import copy

    changed = copy.deepcopy(model)
    changed.model.layers[0].self_attn.o_proj.weight.mul_(1 - share)
    return changed


SHARE = {"type": "float", "range": (0.0, 1.0), "default": 0.5}
KIND = {"type": "categorical", "choices": ("a", "b"), "default": "a"}


def _bench(model, parts, **options) -> Bench:
    ids_NT = torch.randint(8, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    texts = [evaluate.read(model, ids_NT[:2]), evaluate.read(model, ids_NT)]
    return Bench(model, [{"input_ids": ids_NT}], texts, ids_NT[:1], automl.modules(parts), new_tokens=2, **options)


def _untimed(bench, monkeypatch):
    """Judge times by the stack alone, so that no clock affects the answer."""

    def rounds(arms, count, **_):
        return SimpleNamespace(pairs=lambda baseline, optimized: SimpleNamespace(differences=np.zeros(1)))

    monkeypatch.setattr(bench_module.interleaved, "rounds", rounds)
    return bench


def test_components_are_discovered():
    stems = {part.stem for part in automl.components()}
    assert {"structured_pruning", "tensor_decomposition", "sparse_neural_networks"} <= stems
    assert "automl_components" not in stems and "continuous_nas" not in stems, "they offer no apply"
    some = automl.components({"structured_pruning": {"ratio"}})
    assert [part.stem for part in some] == ["structured_pruning"] and list(some[0].knobs) == ["ratio"]


def test_a_new_module_is_found_without_being_named(monkeypatch):
    twelfth = SimpleNamespace(apply=_scale, SEARCH_SPACE={"share": SHARE})
    monkeypatch.setattr(automl.discovery, "stems", lambda: ["automl_components", "twelfth"])
    monkeypatch.setattr(automl.discovery, "method", lambda stem: twelfth)
    assert [part.stem for part in automl.components()] == ["twelfth"]


def test_every_real_configuration_round_trips_through_a_stack():
    parts = automl.components()
    every = automl.space(parts)
    draw = np.random.default_rng(0)
    for _ in range(20):
        params = {name: controls.drawn(distribution, draw) for name, distribution in every.items()}
        stack = automl.stack_of(params, parts)
        assert automl.stack_of(automl.params_of(stack, parts), parts) == stack
        json.dumps([step.model_dump() for step in stack])


def test_a_space_is_described_in_words():
    """Previously a report said `FloatDistribution(high=0.675, log=False, low=0.045000000000000005, step=None)`."""
    ratio = {"type": "float", "range": (0.0, 0.9), "default": 0.3}
    kind = {"type": "categorical", "choices": ("row", "matrix", "block"), "default": "row"}
    steps = {"type": "int", "range": (0, 1000), "default": 2}
    part = Component("one", SimpleNamespace(), {"ratio": ratio, "kind": kind, "steps": steps}, most_steps=4)
    words = {name: automl.in_words(distribution) for name, distribution in automl.space([part]).items()}
    assert words["one"] == "False or True" and words["one.order"] == "0 to 1"
    assert words["one.ratio"] == "0.045 to 0.675" and words["one.kind"] == "row, matrix or block"
    assert words["one.steps"] == "0 to 4, whole"


def test_levels_are_tried_and_values_between_them_go_to_the_nearest():
    size = {"type": "int", "range": (16, 512), "default": 128, "levels": (32, 128)}
    steps = {"type": "int", "range": (0, 1000), "default": 30}
    part = _fake("one", _scale, size=size, steps=steps)
    every = automl.space([part])
    assert every["one.size"].choices == (32, 128) and every["one.steps"].high == part.most_steps
    assert part.defaults == {"size": 128, "steps": part.most_steps}
    stack = [RecipeStep(optimization="one", knobs={"size": 300, "steps": 2})]
    assert automl.params_of(stack, [part])["one.size"] == 128


def test_every_real_component_accepts_its_defaults():
    for part in automl.components():
        assert automl.stack_of(
            automl.params_of([RecipeStep(optimization=part.stem, knobs=part.defaults)], [part]), [part]
        )
        block_size, stride = part.defaults.get("block_size"), part.defaults.get("stride", 1)
        assert block_size is None or block_size % stride == 0


@pytest.mark.parametrize("most_steps", [1, 16])
def test_default_knob_values_are_tried_unchanged(most_steps):
    """Previously a knob with a default near an end of its range was lowered: no trial was that component's default."""
    for part in automl.components(most_steps=most_steps):
        step = RecipeStep(optimization=part.stem, knobs=part.defaults)
        assert automl.stack_of(automl.params_of([step], [part]), [part]) == [step]


@pytest.mark.parametrize(
    ("knob", "says"),
    [
        (
            {"type": "float", "range": (0.9, 0.1), "default": 0.5},
            r'one: knob "share" has an empty range \(0\.9, 0\.1\)',
        ),
        ({"type": "int", "range": (3, 2), "default": 3}, "has an empty range"),
        ({"type": "categorical", "choices": (), "default": "a"}, 'knob "share" has no choices'),
    ],
)
def test_empty_ranges_are_named(knob, says):
    with pytest.raises(UserError, match=says):
        automl.space([_fake("one", _scale, share=knob)])
    with pytest.raises(UserError, match="nothing to search"):
        automl.space([])


def test_infeasible_configurations_are_cut_before_timing(tiny, monkeypatch):
    def refuse(model, calibration):
        raise UserError("refused: no such thing")

    def crash(model, calibration):
        raise RuntimeError("broken\nlong story")

    def lose(model, calibration):
        return {}[140310]

    def noise(model, calibration):
        broken = _scale(model, calibration)
        broken.lm_head.weight.copy_(torch.randn_like(broken.lm_head.weight) * 9)
        return broken

    makers = {"refusing": refuse, "crashing": crash, "losing": lose, "noisy": noise}
    parts = [_fake(name, apply, level=KIND) for name, apply in makers.items()]
    parts += [_fake("foreign", _scale, lambda model: "another kind", share=SHARE), _fake("good", _scale, share=SHARE)]
    bench = _bench(tiny("qwen3-4b-instruct-2507"), parts)
    monkeypatch.setattr(bench_module.interleaved, "rounds", lambda *_, **__: pytest.fail("timed"))
    says = {"refusing": "refused: no such", "crashing": "crashed: RuntimeError: broken", "noisy": "divergence of"}
    says["losing"] = "crashed: KeyError: 140310"
    for stem, text in (says | {"foreign": "does not apply: another kind"}).items():
        judged = bench.judge([RecipeStep(optimization=stem)])
        assert text in judged.reason and "\n" not in judged.reason and judged.point == bench_module.INFEASIBLE_POINT
    bench.memory_budget = 0.5
    assert "memory of 1.000 is over the budget of 0.500" in bench.judge([RecipeStep(optimization="good")]).reason


def test_a_configuration_without_effect_is_not_timed_and_dominates_nothing(tiny, monkeypatch):
    """Previously a configuration that switches every component off was timed against its own copy: where the copy
    happened to be slower, the empty stack dominated an area, in the arms of the search and of chance.
    """
    bench = _bench(tiny("qwen3-4b-instruct-2507"), [_fake("one", _scale, share=SHARE)])
    monkeypatch.setattr(bench_module.interleaved, "rounds", lambda *_, **__: pytest.fail("timed"))
    judged = bench.judge([])
    assert (judged.point, judged.reason, judged.memory_share) == ((1.0, 0.0), None, 1.0)
    assert bench_module.utility(judged) == 0.0 and judged == automl.nothing(bench)
    bench.memory_budget = 0.5
    assert "over the budget" in bench.judge([]).reason and bench.judge([]).point == bench_module.INFEASIBLE_POINT


def test_each_sequence_of_a_batch_has_its_own_new_tokens(tiny):
    bench = _bench(tiny("qwen3-4b-instruct-2507"), [])
    one = bench._cache(bench.model)
    bench.prompt_BT = bench.prompt_BT.repeat(4, 1)
    assert bench._cache(bench.model) == 4 * one > 0


def test_a_resumed_search_ends_like_an_uninterrupted_one(tiny, monkeypatch, tmp_path):
    parts = [_fake("one", _scale, share=SHARE, kind=KIND), _fake("two", _scale, share=SHARE)]
    bench = _untimed(_bench(tiny("qwen3-4b-instruct-2507"), parts), monkeypatch)
    with study.opened(None, "s", {}, 2) as memory:
        whole = automl.run(bench, parts, memory, 12, seed=3)
    for stop in (4, 9, None):
        with study.opened(tmp_path / "s.db", "s", {}, 2) as stored:
            parted = automl.run(bench, parts, stored, 12, seed=3, stop_after=stop)
    assert [judged.stack for judged in parted] == [judged.stack for judged in whole]
    assert [step.optimization for step in whole[0].stack] == ["one"], "the defaults come first"
    assert any(len(judged.stack) == 2 for judged in whole)


def test_stacks_that_served_other_models_are_tried_first(tiny, monkeypatch, tmp_path):
    parts = [_fake("one", _scale, share=SHARE), _fake("two", _scale, share=SHARE)]
    bench = _untimed(_bench(tiny("qwen3-4b-instruct-2507"), parts), monkeypatch)

    def store(model: str, stem: str, accuracy: str = "maintained", effort: str = "standard") -> None:
        steps = [RecipeStep(optimization=stem, knobs={"share": 0.3})]
        about = {"model": model, "scale": "proxy", "chosen_by": "automl_components", "weights": "w"}
        recipe.write(recipe.Recipe(**about, stack=steps, accuracy=accuracy, effort=effort), tmp_path)

    store("glm", "two")
    store("lossy", "one", "not_maintained")
    store("own", "one")
    store("strange", "three")
    store("a_first_pass", "one", effort="preview")
    (tmp_path / "coder.yaml").write_text("stack: [")
    first = automl.elsewhere(tmp_path, "own", "standard", parts)
    assert [[step.optimization for step in stack] for stack in first] == [["two"]], (
        "not the one that was judged to lose, nor that of a smaller effort"
    )
    assert len(automl.elsewhere(tmp_path, "own", "preview", parts)) == 2
    assert automl.elsewhere(tmp_path, "own", "thorough", parts) == []
    assert automl.elsewhere(tmp_path, "own", "standard", parts[:0]) == []
    with study.opened(None, "s", {}, 2) as memory:
        assert automl.run(bench, parts, memory, 2, first=first)[0].stack == first[0]


@pytest.mark.parametrize("knobs", ['{kind: "c"}', '{share: "much"}', "{share: .nan}", "{share: true}", "{size: 2.5}"])
def test_an_outdated_value_in_a_stored_stack_does_not_stop_the_search(tmp_path, knobs):
    """Previously another model's stack, outdated or written by hand, ended the search when its trial was stored."""
    size = {"type": "int", "range": (1, 9), "default": 4}
    parts = [_fake("one", _scale, share=SHARE, kind=KIND, size=size)]
    text = "model: other\nscale: proxy\neffort: quick\nchosen_by: a search\nstack:\n- optimization: one\n  knobs: "
    (tmp_path / "other.yaml").write_text(text + knobs)
    assert automl.elsewhere(tmp_path, "own", "quick", parts) == []
    (tmp_path / "other.yaml").write_text(text + '{kind: "b", share: 1, size: 2}')
    (served,) = automl.elsewhere(tmp_path, "own", "quick", parts)
    assert automl.params_of(served, parts) | {"one": True} == automl.params_of(served, parts)


def test_chance_starts_with_the_first_trials_of_the_search(tiny, monkeypatch):
    parts = [_fake("one", _scale, share=SHARE)]
    bench = _untimed(_bench(tiny("qwen3-4b-instruct-2507"), parts), monkeypatch)
    first = [JudgedStack([RecipeStep(optimization="one")], 0.5, 0.05, 1.0, None, 3.0)]
    judged = controls.at_random(bench, parts, 3.0, 0, first)
    assert judged[0] is first[0] and len(judged) == 2, "its seconds are counted, and at least one more is drawn"


def _finalist(time: float, lost: float = 0.0, growth: float = 0.0, spread: float = 0.005, steps: int = 1) -> Finalist:
    stack = [RecipeStep(optimization="one")] * steps
    estimate = shapley.Estimate(np.log(time), np.log(time) - spread, np.log(time) + spread, 8)
    outcome = JudgedStack(stack, time, 0.1, 1.0, None, 0.0)
    return Finalist(outcome, estimate, 0.0, 0.1, search_quality.QualityLoss(lost, growth, growth))


def test_the_rule_takes_the_largest_sure_saving_that_keeps_its_scores():
    fast, kept, slower = _finalist(0.5, 0.1), _finalist(0.7, 0.01), _finalist(0.8)
    nothing = _finalist(1.0, spread=0.0, steps=0)
    assert finalists.choose([fast, slower, kept, nothing], 0.02) is kept
    assert finalists.choose([_finalist(0.3, 0.0, 0.5), slower, nothing], 0.02) is slower, "its text fell apart"
    lucky = _finalist(0.6, spread=0.3)
    assert finalists.choose([lucky, kept, nothing], 0.02) is kept, "fastest at the median, not by its interval"
    with pytest.raises(NotApplicable, match=r"no stack loses at most 0\.02 of any score .* a score loses 10\.0 points"):
        finalists.choose([fast], 0.02)


def test_near_ties_go_to_the_stack_that_does_least():
    """Noise below the practical margin does not change the choice."""
    random = np.random.default_rng(0)
    chosen = set()
    for _ in range(50):
        noise = np.exp(random.uniform(-0.009, 0.009, 3))
        three = [_finalist(0.7 * factor, steps=steps) for factor, steps in zip(noise, (3, 1, 2))]
        chosen.add(len(finalists.choose([*three, _finalist(1.0, spread=0.0, steps=0)], 0.02).outcome.stack))
    assert chosen == {1}


def test_two_timings_of_a_search_choose_the_same_stack():
    """Planted: two equally fast stacks, one of which does more; rounds scatter by 6 %. By intervals alone each is the
    best at times, and sometimes one does not surely save anything.
    """
    random, chosen = np.random.default_rng(1), set()
    nothing = _finalist(1.0, spread=0.0, steps=0)
    for _ in range(50):
        pair = []
        for steps in (1, 2):
            rounds = np.log(0.87) + random.normal(0, 0.06, 32)
            timed = replace(_finalist(1.0, steps=steps), time=shapley.over_rounds(rounds), rounds=tuple(rounds))
            pair.append(timed)
        chosen.add(len(finalists.choose([nothing, *pair], 0.02).outcome.stack))
    assert chosen == {1}
    slow = tuple(np.log(0.97) + random.normal(0, 0.01, 32))
    slower = replace(_finalist(0.97), time=shapley.over_rounds(slow), rounds=slow)
    assert finalists.choose([nothing, pair[1], slower], 0.02) is pair[1], "surely slower than the best"


def test_the_rule_takes_nothing_where_gains_are_within_noise():
    nothing, noise, better = _finalist(1.0, spread=0.0, steps=0), _finalist(0.985), _finalist(0.95)
    assert finalists.choose([nothing, noise], 0.02) is nothing
    assert finalists.choose([nothing, noise, better], 0.02) is better
    unsteady = replace(better, floor=0.1)
    assert finalists.choose([nothing, unsteady], 0.02) is nothing, "two copies of the baseline differ by more"
    # An interval that ends below 1 was shown with `surely faster: False`, without the required bound.
    frame = finalists.table([noise, better, unsteady], 0.02)
    assert list(frame["surely faster"]) == [False, True, False] and frame["high"].max() < 1
    assert frame["surely faster below"].tolist() == pytest.approx([0.98, 0.98, 0.905], abs=1e-3)


def test_an_unmet_memory_budget_is_named():
    with pytest.raises(
        NotApplicable, match=r"memory budget of 0\.01 of the baseline's; the smallest .* takes 0\.62"
    ) as raised:
        finalists.choose([], 0.02, memory_budget=0.01, smallest=0.62)
    assert "\n" not in str(raised.value)


def test_finalists_are_timed_again_with_a_copy_of_the_baseline(tiny, monkeypatch):
    parts = [_fake("one", _scale, share=SHARE)]
    bench = _bench(tiny("qwen3-4b-instruct-2507"), parts)
    outcome = JudgedStack([RecipeStep(optimization="one", knobs={"share": 0.1})], 0.9, 0.01, 1.0, None, 0.0)
    models_asked = []

    class Quality:
        def of(self, model):
            models_asked.append(model)
            return search_quality.NOTHING_LOST

    idle, finalist = finalists.judge(bench, [outcome], 2, Quality(), 0, seconds=0)
    assert idle.outcome.stack == [] and idle.at_most == 1.0 and finalist.outcome is outcome
    assert (
        finalist.time.n == len(finalist.rounds) == finalists.ROUNDS
        and finalist.floor == idle.floor >= 0
        and len(models_asked) == 1
    )
    least = paired_stats.NORMAL * process_variance.between_processes("generate").sigma
    assert finalist.time.high - finalist.time.value >= 0.999 * least, "what one process hides is no certainty"
    frame = finalists.table([idle, finalist], 0.02)
    assert list(frame["stack"]) == ["nothing", "one"] and frame["high"][0] == 1.0


def test_promotion_judges_the_best_on_more_text(tiny, monkeypatch):
    parts = [_fake("one", _scale, share=SHARE)]
    bench = _untimed(_bench(tiny("qwen3-4b-instruct-2507"), parts), monkeypatch)
    outcomes = [bench.judge([RecipeStep(optimization="one", knobs={"share": share})]) for share in (0.1, 0.4, 0.9)]
    best = automl.promote(bench, outcomes, 1)
    assert best[0][0] is outcomes[0] and best[0][1] == pytest.approx(
        bench.divergence(bench.apply(outcomes[0].stack), 1)
    )


def test_stacks_flattered_by_little_text_fall_behind_on_more():
    bench = SimpleNamespace(texts=["little", "more"], apply=lambda stack: stack[0].knobs["share"])
    on_more_text, asked = {0.1: 0.01, 0.2: 0.4, 0.3: 0.02, 0.4: 0.0}, []
    bench.divergence = lambda share, rung: asked.append((share, rung)) or on_more_text[share]

    def judged(share: float, seconds: float, nats: float) -> JudgedStack:
        stack = [RecipeStep(optimization="one", knobs={"share": share})]
        return JudgedStack(stack, seconds, nats, 1.0, None, 0.0)

    near, quick = judged(0.1, 0.9, 0.01), judged(0.2, 0.3, 0.4)
    assert [each for each, _ in automl.promote(bench, [quick, near], 2)] == [near, quick], "within the margin is first"
    flattered, steady, slow = judged(0.2, 0.5, 0.01), judged(0.3, 0.8, 0.01), judged(0.4, 0.95, 0.0)
    asked.clear()
    assert automl.promote(bench, [flattered, steady, slow], 1) == [(steady, 0.02)]
    assert asked == [(0.2, 1), (0.3, 1)], "twice as many as are kept are read"


def test_a_stack_judged_twice_takes_one_finalist_place():
    bench = SimpleNamespace(texts=["little", "more"], apply=lambda stack: stack, divergence=lambda model, rung: 0.01)
    share = lambda value: [RecipeStep(optimization="one", knobs={"share": value})]  # noqa: E731
    judged = [JudgedStack(share(at), time, 0.01, 1.0, None, 0.0) for at, time in ((0.1, 0.5), (0.1, 0.6), (0.2, 0.9))]
    assert [each for each, _ in automl.promote(bench, judged, 2)] == [judged[0], judged[2]]


def test_models_timed_in_the_last_round_have_equal_age(tiny, monkeypatch):
    """Previously the baseline was copied just before the rounds, and the search's older stacks were slower for their
    age.
    """
    parts = [_fake("one", _scale, share=SHARE)]
    bench, timed = _bench(tiny("qwen3-4b-instruct-2507"), parts), []
    outcome = JudgedStack([RecipeStep(optimization="one", knobs={"share": 0.1})], 0.9, 0.01, 1.0, None, 0.0)
    generate = finalists.workloads.generate
    monkeypatch.setattr(finalists.workloads, "generate", lambda *args: timed.append(args[0]) or generate(*args))
    quality = SimpleNamespace(of=lambda model: search_quality.NOTHING_LOST)
    finalists.judge(bench, [outcome], 1, quality, 0, seconds=0)
    assert len({id(model) for model in timed}) == 3
    assert not {id(model) for model in timed} & {id(model) for model in (bench.model, *bench.applied.values())}


def test_chance_starts_in_the_middle_of_a_grid_like_the_search():
    areas = np.full((3, 3), 0.25)
    areas[1, 1], areas[2, 0] = 0.5, 1.0
    assert controls.by_chance(areas, 2, 800) == pytest.approx(1 / 8 + 7 / 8 * 0.5, abs=0.03)
    areas[1, 1] = 1.0
    assert controls.by_chance(areas, 2) == controls.regret(areas, 2, 0)[-1] == 1.0, "both find what lies in the middle"


def test_regret_finds_a_planted_optimum():
    rows, columns = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
    utilities = np.exp(-((rows - 4) ** 2 + (columns - 2) ** 2) / 8)
    curves = [controls.regret(utilities, 18, seed) for seed in range(3)]
    assert all(np.diff(curve).min() >= 0 and curve[-1] > 0.7 for curve in curves)
    assert controls.regret(utilities, 5, 1) == controls.regret(utilities, 5, 1)


def test_grids_pair_the_most_valuable_components():
    parts = [_fake(name, _scale, share=SHARE, kind=KIND) for name in ("idle", "quick", "middling", "refused")]
    alone = {"idle": (1.0, 0.5, None), "quick": (0.6, 9.0, None), "middling": (0.8, 2.0, None)}
    alone["refused"] = (0.1, 0.1, "refused")
    outcomes = [
        JudgedStack([RecipeStep(optimization=stem)], time, 0.0, 1.0, reason, seconds)
        for stem, (time, seconds, reason) in alone.items()
    ]
    stacks = controls.grid(outcomes, parts, 3)
    assert stacks[0][0] == [] and [step.optimization for step in stacks[2][1]] == ["quick", "middling"]
    assert stacks[1][0][0].knobs == {"share": 0.05, "kind": "a"} and stacks[2][0][0].knobs["share"] == 0.75
    with pytest.raises(UserError, match="needs two components"):
        controls.grid(outcomes, parts[:1], 3)
    without = [judged for judged in outcomes if judged.stack[0].optimization != "middling"]
    pair = controls.grid(without, parts, 3)[1][1]
    assert [step.optimization for step in pair] == ["quick", "idle"], "one that is refused at once is not the quicker"


def test_a_real_stack_is_judged(tiny):
    bench = _bench(tiny("qwen3-coder-30b"), automl.components())
    step = RecipeStep(optimization="structured_pruning", knobs={"ratio": 0.2, "granularity": "experts"})
    judged = bench.judge([step])
    assert judged.reason is None and 0 < judged.memory_share < 1 and judged.time_share > 0 and judged.divergence > 0
    assert judged.time_high is None or judged.time_high > judged.time_share
    assert 0 < automl.automation(automl.components(), ["memory budget"]) < 1


def test_a_component_starts_with_its_trial_defaults():
    part = next(part for part in automl.components() if part.stem == "streaming_computation")
    assert part.module.SEARCH_SPACE["memory_ratio"]["default"] < 1 and part.defaults["memory_ratio"] == 1.0
    assert part.defaults["prefill_chunk"] == part.module.SEARCH_SPACE["prefill_chunk"]["default"]
    space = automl.space([part])
    assert 1.0 in space["streaming_computation.memory_ratio"].choices
