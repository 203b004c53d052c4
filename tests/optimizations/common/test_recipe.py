"""A model's recipe: what is written is read back; damaged files are named and never lost."""

import pytest

from lib.errors import UserError
from lib.optimizations.common import recipe
from lib.optimizations.common.recipe import Recipe, RecipeStep
from lib.report.records import migration


def _stack(**changes) -> Recipe:
    steps = [
        RecipeStep(optimization="structured_pruning", knobs={"ratio": 0.25, "granularity": "channels"}),
        RecipeStep(optimization="sparse_neural_networks", knobs={"sparsity": 0.5}),
    ]
    fields = {"model": "glm-4.7-flash", "scale": "proxy", "stack": steps, "chosen_by": "automl_components"}
    return Recipe(**fields | changes)


def test_the_round_trip_keeps_the_order(tmp_path):
    path = recipe.write(_stack(study="s"), tmp_path)
    assert path == recipe.path_of("glm-4.7-flash", "proxy", tmp_path)
    assert recipe.read(path) == _stack(study="s")
    assert recipe.find("glm-4.7-flash", "proxy", tmp_path).stack[0].knobs["ratio"] == 0.25
    assert recipe.find("qwen3-vl-2b", "proxy", tmp_path) is None
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no half file stays"


def test_a_step_is_a_request():
    assert _stack().stack[0].request() == ["structured_pruning", "-p", "ratio=0.25", "-p", "granularity=channels"]


def test_more_effort_is_not_overwritten_by_less(tmp_path):
    recipe.write(_stack(effort="standard", study="long"), tmp_path)
    recipe.write(_stack(effort="quick", study="short"), tmp_path)
    assert recipe.find("glm-4.7-flash", "proxy", tmp_path).study == "long"
    recipe.write(_stack(effort="standard", study="newer"), tmp_path)
    assert recipe.find("glm-4.7-flash", "proxy", tmp_path).study == "newer"
    recipe.write(_stack(effort="quick", study="short"), tmp_path, replace_better=True)
    assert recipe.find("glm-4.7-flash", "proxy", tmp_path).study == "short"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stack: [", "not YAML at line"),
        ("- 1", "not a recipe"),
        ("model: a\nscale: proxy\nstack: []\nchosenby: x", 'unknown key "chosenby". Did you mean "chosen_by"?'),
        ("model: a\nscale: proxy\nchosen_by: x", '"stack": field required'),
        ("model: a\nscale: small\nstack: []\nchosen_by: x", 'scale "small"; expected one of proxy, slice, full'),
        ("model: a\nscale: proxy\nstack: [{optimization: ../x}]\nchosen_by: x", '"stack.0.optimization"'),
        ("model: a\nscale: proxy\nstack: [{optimization: x, knobs: {a: [1]}}]\nchosen_by: x", '"stack.0.knobs'),
    ],
)
def test_damaged_files_are_named(tmp_path, text, says):
    path = tmp_path / "glm-4.7-flash.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        recipe.read(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    recipe.write(_stack(), tmp_path)
    assert path.with_name(path.name + ".aside-1").read_text() == text, "kept aside, not overwritten"
    assert recipe.read(path) == _stack()


def test_another_models_stack_is_refused(tmp_path):
    recipe.write(_stack(), tmp_path).rename(tmp_path / "qwen3-vl-2b.yaml")
    with pytest.raises(UserError, match=r"a recipe of glm-4\.7-flash"):
        recipe.find("qwen3-vl-2b", "proxy", tmp_path)
    with pytest.raises(UserError, match="the recipe cannot be read"):
        recipe.read(tmp_path / "none.yaml")


def test_knobs_of_earlier_recipes_get_their_current_names(tmp_path):
    path = tmp_path / "glm-4.7-flash.yaml"
    knobs = "{recovery_steps: 4, ratio: 0.3}"
    stack = f"[{{optimization: structured_pruning, knobs: {knobs}}}]"
    path.write_text(f"model: glm-4.7-flash\nscale: proxy\nchosen_by: a search\nstack: {stack}")
    assert recipe.read(path).stack[0].knobs == {"finetune_steps": 4, "ratio": 0.3}
    assert RecipeStep(optimization="x", knobs={"fine_tuning_steps": 2}).knobs == {"finetune_steps": 2}
    assert set(recipe.EARLIER_KNOBS.items()) == set(migration.PARAMETERS.items())
