"""The experiment's conclusions from planted outcomes: chance, defaults, and a small grid."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lib.measure.metrics import measurement, settings
from lib.models.checkpoints import io
from lib.optimizations.automl_components import experiment, outcome
from lib.optimizations.automl_components.controls import EqualSeconds, SmallGrid
from lib.optimizations.automl_components.successive_filtering import REFERENCE, JudgedStack
from lib.optimizations.common import recipe
from lib.optimizations.common.judgement import Judgement
from lib.optimizations.common.recipe import Recipe, RecipeStep
from lib.report.figures import style
from lib.report.text import brief, reading


def _judged(level: float, reason: str | None = None) -> JudgedStack:
    """Return time and divergence at the same share of the reference."""
    return JudgedStack([RecipeStep(optimization="one")], level, level * REFERENCE[1], 1.0, reason, 2.0)


def _area(level: float) -> float:
    return (1 - level) ** 2 * REFERENCE[1]


def _equal(search: float, *others: float, defaults: float = 0.8) -> EqualSeconds:
    arms = {"search": [_judged(defaults), _judged(search), _judged(0.1, "crashed: ValueError")]}
    arms |= {f"random {n}": [_judged(level)] for n, level in enumerate(others, start=1)}
    return EqualSeconds(arms | {"defaults": [_judged(defaults)]})


@pytest.mark.parametrize(
    ("search", "others", "outcome"),
    [
        (0.2, (0.4, 0.5), False),
        (0.7, (0.4, 0.5), True),
        (0.45, (0.4, 0.5), None),
        (0.4, (0.2, 0.4), True),
        (0.2, (0.4,), None),
    ],
)
def test_chance_is_judged_by_several_draws(search, others, outcome):
    refuted, evidence = _equal(search, *others).random_refuted()
    assert refuted is outcome and f"{_area(search):.4g}" in evidence


def test_a_gain_below_the_margin_is_a_tie():
    """Repeated timing moves an area by more than this: a thousandth does not make the search better."""
    refuted, evidence = _equal(0.4999, 0.5, 0.5, defaults=0.5).random_refuted()
    assert refuted is True and evidence.endswith("at most 5 % more is as good"), "why a larger area is no better"
    assert _equal(0.4999, defaults=0.5).defaults_refuted() == (
        True, "hypervolume 0.02501, defaults 0.025; at most 5 % more is as good"
    )  # fmt: skip
    assert not outcome.targets(
        _equal(0.4999, 0.5, 0.5, defaults=0.5), SmallGrid("a × b", np.ones((3, 3)), 2, [[1.0]], 0.7),
        Recipe(model="m", scale="proxy", stack=[], chosen_by="a search"),
    ).reached[:2].any()  # fmt: skip


def test_areas_without_a_sure_gain_decide_nothing():
    """Previously the search beat chance by the scatter of six pairs: timed anew, nothing was faster than the
    baseline.
    """
    sure, unsure = (replace(_judged(0.9), time_high=high) for high in (0.95, 1.02))
    arms = {"random 1": [_judged(0.95)], "random 2": [_judged(0.95)], "defaults": [_judged(0.96)]}
    known, doubtful = EqualSeconds(arms | {"search": [sure, unsure]}), EqualSeconds(arms | {"search": [unsure]})
    assert known.random_refuted()[0] is False and known.defaults_refuted()[0] is False and not known.unsure
    for refuted, evidence in (doubtful.random_refuted(), doubtful.defaults_refuted()):
        assert refuted is None and evidence.endswith("so the areas may be timing noise")
    first, second = doubtful.reading().split(". ", 1)
    assert reading.two(f"{first}.", second) and second.endswith("timing noise.")
    assert max(map(brief.count, brief.split(doubtful.reading()))) <= brief.MOST_WORDS
    grid = SmallGrid("a × b", np.ones((3, 3)), 2, [[1.0]], 0.7, False)
    assert grid.refuted()[0] is None and replace(grid, sure=True).refuted()[0] is False
    chosen = Recipe(model="m", scale="proxy", stack=[], chosen_by="a search")
    assert not outcome.targets(doubtful, grid, chosen).reached.any()
    assert outcome.targets(known, replace(grid, sure=True), chosen).reached[:3].all()


def test_cut_configurations_dominate_nothing_and_are_counted():
    equal = _equal(0.5, 0.4)
    assert equal.volumes["search"] == pytest.approx(_area(0.5)) and equal.crashed == 1
    assert len(equal.points()) == 3, "the one that crashed is no point, the defaults are one already"
    assert list(equal.table()["cut"]) == [1, 0, 0] and equal.table()["seconds"][0] == 6.0
    assert equal.defaults_refuted()[0] is False and _equal(0.9, 0.4, defaults=0.8).defaults_refuted()[0] is True
    assert [arm.purpose for arm in equal.controls()] == ["same start, equal seconds", "no search"]
    assert [row["strength"] for row in equal.impact()] == [1, 2, 3, 1]
    first, second = equal.reading().split(". ", 1)
    assert reading.two(f"{first}.", second)


def test_the_figure_exists_even_if_every_configuration_was_cut():
    """Without a row the points had no columns, and the notebook's figure raised KeyError for its arms."""
    equal = EqualSeconds({arm: [_judged(0.9, "beyond the limit")] for arm in ("search", "random 1", "defaults")})
    assert equal.points().empty and equal.described().startswith("0 configurations")
    assert style.png(style.trade_off(equal.points(), x_label="time, %", y_label="KL", reference=(100, 0)))


def test_shared_trials_are_counted_once():
    """The first trials were part of every arm, so a crash among them was counted three times."""
    first = [_judged(0.8), _judged(0.1, "crashed: ValueError")]
    equal = EqualSeconds(
        {"search": [*first, _judged(0.5)], "random 1": [*first, _judged(0.6)], "defaults": list(first)}
    )
    assert equal.crashed == 1 and equal.reading().startswith("3 configurations were timed")
    assert list(equal.points()["arm"]) == ["search", "search", "random 1"]
    assert list(equal.table()["configurations"]) == [3, 3, 2], "each arm has its own all the same"


def test_the_gain_is_undefined_where_chance_dominates_nothing():
    grid = SmallGrid("a × b", np.ones((3, 3)), 2, [[1.0]], 0.7)
    chosen = Recipe(model="m", scale="proxy", stack=[], chosen_by="a search")
    alone, nothing = _equal(0.5, 1.2), _equal(1.2, 1.2, defaults=1.1)
    assert alone.gain is nothing.gain is None and "0.00 times" not in alone.described() + nothing.described()
    assert alone.described() == "3 configurations; the search dominates 0.025, random configurations dominate nothing."
    assert _equal(0.5, 0.5).described().endswith("dominates 1.00 times the area of random configurations.")
    assert (
        outcome.targets(alone, grid, chosen).reached[0] and not outcome.targets(nothing, grid, chosen).reached[:2].any()
    )


@pytest.mark.parametrize(
    ("accuracy", "better"),
    [("maintained", True), ("inconclusive", True), ("", True), ("not_maintained", False), ("invalid", False)],
)
def test_a_stack_judged_to_lose_quality_misses_the_target(accuracy, better):
    """Previously any stack reached the target, even next to the verdict that it does not keep the scores."""
    grid, step = SmallGrid("a × b", np.ones((3, 3)), 2, [[1.0]], 0.7), RecipeStep(optimization="one")
    chosen = Recipe(model="m", scale="proxy", stack=[step], chosen_by="a search", accuracy=accuracy)
    assert bool(outcome.targets(_equal(0.2, 0.4), grid, chosen).reached.iloc[3]) is better


def test_a_grid_is_judged_by_all_its_seeds():
    grid = lambda *ends: SmallGrid("a × b", np.ones((3, 3)), 2, [[0.5, end] for end in ends], 0.7)  # noqa: E731
    assert [grid(*ends).refuted()[0] for ends in ((0.96, 1.0), (0.9, 0.5), (0.9, 1.0))] == [False, True, None]
    assert grid(0.9).refuted()[1] == "share of the optimum after 2 of 9 cells 0.90; by chance 0.70", "what limits it"
    assert grid().refuted()[0] is None and grid().reached == 0.0 and len(grid().frame()) == 0
    assert grid(0.96, 1.0).reached == 0.96 and list(grid(1.0).frame()["strength"]) == [1, 2]
    for text in (grid(1.0).reading(), grid().reading()):
        first, second = text.split(". ", 1)
        assert reading.two(f"{first}.", second)


def test_every_claim_has_its_answer():
    equal, grid = _equal(0.2, 0.4), SmallGrid("a × b", np.ones((3, 3)), 2, [[0.5, 1.0]], 0.7)
    answers = outcome.refutations(equal, grid)
    assert [claim for claim, _, _ in answers] == list(outcome.CLAIMS)
    chosen = Recipe(model="m", scale="proxy", stack=[RecipeStep(optimization="one")], chosen_by="a search")
    assert outcome.targets(equal, grid, chosen).reached.all()
    assert experiment.commands("m", chosen.stack) == ["python build.py run one --model m"]
    assert experiment.commands("m", [])[0].startswith("nothing: ")


@pytest.mark.parametrize(
    ("verdicts", "degenerate", "word"),
    [
        (["maintained", "informative"], None, "maintained"),
        (["better", "inconclusive"], None, "inconclusive"),
        (["maintained", "worse"], None, "not_maintained"),
        (["maintained"], "it repeats one token", "invalid"),
    ],
)
def test_a_stack_is_stored_with_its_verdict_and_hashes(tiny, verdicts, degenerate, word):
    model, changed = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=1)
    score = measurement.counted("f1_macro", "classify", 0.9, 0.9, "planted")
    judged = Judgement(None, [score.model_copy(update={"verdict": verdict}) for verdict in verdicts], degenerate)
    setup = SimpleNamespace(loaded=SimpleNamespace(name="m", scale="proxy", model=model), level="quick")
    steps = [RecipeStep(optimization="one")]
    stored = experiment.stored(setup, SimpleNamespace(name="a study"), steps, changed, judged)
    assert stored.accuracy == word and stored.weights == io.weights_hash(model) != stored.optimized
    assert (recipe.unfit(stored, stored.weights) is None) == (word in ("maintained", "inconclusive"))
    assert "chosen for weights" in recipe.unfit(stored, "others")


def test_only_a_preview_shortens_the_timed_request():
    asked = experiment.TimedRequest(256, 2, 3)
    assert asked.within(settings.read("quick")) == asked
    assert asked.within(settings.read("preview")) == (64, 2, 3)


def test_a_grid_names_its_rows_before_its_columns(monkeypatch):
    """The first stack with a step is in the first row, so its step names the columns: previously names came out
    reversed.
    """
    step = lambda stem, level: [RecipeStep(optimization=stem)] if level else []  # noqa: E731
    stacks = [[step("of_rows", row) + step("of_columns", column) for column in range(3)] for row in range(3)]
    monkeypatch.setattr(experiment.controls, "grid", lambda outcomes, parts, levels: stacks)
    rows_alone = lambda stack: [step.optimization for step in stack] == ["of_rows"]  # noqa: E731
    judge = lambda stack: replace(_judged(0.5 if rows_alone(stack) else 1.0), stack=stack)  # noqa: E731
    setup = SimpleNamespace(bench=SimpleNamespace(judge=judge, memory_budget=1.0), factor=1, parts=[])
    grid = experiment.small_grid(setup, [])
    assert grid.pair == "of_rows × of_columns"
    assert (grid.areas_LL[1:, 0] > 0).all() and not grid.areas_LL[0].any(), "rows alone are faster"
