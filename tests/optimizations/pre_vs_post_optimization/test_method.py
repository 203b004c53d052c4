"""Stacks chosen and stored, subsets against composing, sweeps and accounts against numbers computed by hand."""

import copy
import itertools
import sys
import types
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, process_variance
from lib.measure.metrics import settings as efforts
from lib.measure.timing import control, interleaved
from lib.measure.trackers import energy
from lib.models import loading
from lib.models.checkpoints import io
from lib.models.parameters import read
from lib.optimizations.common import recipe
from lib.optimizations.common.evidence import interactions, shapley
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import search_quality
from lib.optimizations.modular_components import attempts
from lib.optimizations.modular_components import method as composing
from lib.optimizations.pre_vs_post_optimization import attribution, returns, sweeps
from lib.optimizations.pre_vs_post_optimization import method as comparing

PRUNING, FACTORS, SPARSE = "structured_pruning", "tensor_decomposition", "sparse_neural_networks"
STEPS = [
    RecipeStep(optimization=PRUNING, knobs={"ratio": 0.2}),
    RecipeStep(optimization=FACTORS, knobs={"method": "plain"}),
    RecipeStep(optimization=SPARSE, knobs={"method": "magnitude"}),
]


def _loaded(model, name: str) -> loading.Loaded:
    """A tiny random model as `load` would return it: without a tokenizer, with meaningless answers."""
    return loading.Loaded(
        model, None, None, read(name), name, "proxy", "cpu", torch.float32, None, random_weights=True, seconds=0.0
    )


def _stored(**fields) -> recipe.Recipe:
    about = {"model": "m", "scale": "proxy", "stack": STEPS[::-1], "chosen_by": "a search", "weights": "w"}
    return recipe.Recipe(**about | fields)


def test_a_stored_stack_is_used_and_ordered(tiny, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(recipe, "find", lambda name, scale: _stored(accuracy="inconclusive"))
    stack = comparing.chosen(_loaded(model, "qwen3-4b-instruct-2507"), [], weights="w")
    assert stack.steps == STEPS and stack.origin.startswith("a search") and stack.considered == []


def test_a_stored_stack_keeps_the_order_in_which_it_was_judged(tiny, batch, monkeypatch):
    """Parts that may come in either order were put in pipeline order, which was another stack than the one found."""
    model, name = tiny("qwen3-4b-instruct-2507"), "qwen3-4b-instruct-2507"
    steps = [RecipeStep(optimization="adaptive_sparse_attention", knobs={"block_size": 64}), STEPS[0]]
    assert composing.order(steps, model) == steps[::-1], "the pipeline's own order is the other one"
    monkeypatch.setattr(recipe, "find", lambda name, scale: _stored(stack=steps))
    stack = comparing.chosen(_loaded(model, name), [], weights="w")
    assert stack.steps == steps
    assert comparing.apply_stack(model, [batch], stack.steps).steps == steps


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"stack": [STEPS[2], STEPS[2].model_copy()]}, "cannot be ordered"),
        ({"stack": [RecipeStep(optimization="gone")]}, 'no optimization "gone"'),
        ({"stack": []}, "it chose to change nothing"),
        ({"weights": "other"}, "chosen for weights other, not for w"),
        ({"weights": ""}, "weights that are not recorded"),
        ({"accuracy": "not_maintained"}, "judged not maintained"),
    ],
)
def test_a_stored_stack_that_does_not_fit_is_refused_with_its_reason(tiny, monkeypatch, fields, says):
    model = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(recipe, "find", lambda name, scale: _stored(**fields))
    default = comparing.ChosenStack([], "the default rule; nothing pays")
    monkeypatch.setattr(comparing, "default_stack", lambda *_, **__: default)
    stack = comparing.chosen(_loaded(model, "qwen3-4b-instruct-2507"), [], weights="w")
    assert stack.steps == [] and stack.origin.startswith("the default rule; nothing pays (of a search: ")
    assert says in stack.origin
    assert list(stack.inputs) == ["stacks/qwen3-4b-instruct-2507.yaml"], "a record keeps what was read"


def test_a_stored_stack_of_another_model_is_refused(tiny, tmp_path, monkeypatch):
    name = "qwen3-4b-instruct-2507"
    foreign = recipe.Recipe(model="qwen3-vl-2b", scale="proxy", stack=STEPS, chosen_by="a search")
    path = recipe.path_of(name, "proxy", tmp_path)
    recipe.write(foreign, tmp_path).rename(path)
    finding = recipe.find
    monkeypatch.setattr(recipe, "find", lambda name, scale: finding(name, scale, tmp_path))
    with pytest.raises(UserError, match="a recipe of qwen3-vl-2b"):
        comparing.chosen(_loaded(tiny(name), name), [])


def _parts(**applied):
    described = {"touches": ("weights",), "needs": (), "invalidates": (), "trial": {}}
    return {
        stem: types.SimpleNamespace(COMPOSES=described, SEARCH_SPACE={}, apply=apply, applies_to=lambda model: None)
        for stem, apply in applied.items()
    }


def _copy(model, calibration):
    return composing.copy.deepcopy(model)


def _gain(value: float, spread: float = 0.01) -> shapley.Estimate:
    return shapley.Estimate(value, value - spread, value + spread, 6)


def test_the_default_stack_keeps_what_pays_and_explains_the_rest(tiny, batch, monkeypatch):
    """Speeds are planted: surely faster parts stay; those that are slower, refuse or are undecided go."""

    def refuse(model, calibration):
        raise UserError("not today")

    planted = {"brisk": _gain(0.3), "idle": _gain(0.0), "maybe": _gain(0.05, 0.2), "tardy": _gain(-0.5)}
    parts = _parts(**dict.fromkeys(planted, _copy), unwilling=refuse)
    monkeypatch.setattr(composing, "parts", lambda: parts)
    gains = iter(planted.values())
    monkeypatch.setattr(comparing, "_faster", lambda *arguments: next(gains))
    name = "qwen3-4b-instruct-2507"
    stack = comparing.default_stack(_loaded(tiny(name), name), [batch])
    assert [step.optimization for step in stack.steps] == ["brisk"]
    assert [(row["step"], row["kept"]) for row in stack.considered] == [
        ("brisk", True), ("idle", False), ("maybe", False), ("tardy", False), ("unwilling", False),
    ]  # fmt: skip
    assert "not surely faster" in stack.considered[1]["why"] and "not today" in stack.considered[4]["why"]


def test_candidates_that_exceed_the_margins_are_rejected_before_timing(tiny, batch, monkeypatch):
    name = "qwen3-4b-instruct-2507"
    monkeypatch.setattr(composing, "parts", lambda: _parts(lossy=_copy))
    monkeypatch.setattr(comparing, "_faster", lambda *_: pytest.fail("a rejected candidate was timed"))
    lost = search_quality.QualityLoss(0.0, 0.04, 0.05)
    monkeypatch.setattr(search_quality.SearchQuality, "of", lambda *_: lost)
    stack = comparing.default_stack(_loaded(tiny(name), name), [batch])
    assert stack.steps == [] and stack.considered[0]["why"] == "perplexity grows 4.0 % (up to 5.0 %)"
    assert lost.within(perplexity_margin=0.06) and not lost.within()


def test_the_stack_is_empty_where_nothing_pays(tiny, batch, monkeypatch):
    name = "qwen3-4b-instruct-2507"
    monkeypatch.setattr(composing, "parts", lambda: _parts(one=_copy, two=_copy))
    monkeypatch.setattr(comparing, "_faster", lambda *arguments: _gain(-0.5))
    stack = comparing.default_stack(_loaded(tiny(name), name), [batch])
    assert stack.steps == [] and "nothing pays" in stack.origin and len(stack.considered) == 2


def test_a_candidate_is_timed_until_its_interval_is_narrow(tiny, monkeypatch):
    """Planted rounds have a wide interval at first; six suffice where it is narrow or where no more are allowed."""
    unclear = np.full(6, 0.02) + np.linspace(-0.02, 0.02, 6)
    draws = iter([unclear, *[np.full(6, 0.05)] * 2])
    seeds = []

    def timed(arms, prompt, count, seed):
        seeds.append(seed)
        gain = next(draws)
        seconds = {"baseline": [1.0] * 6, "after": np.exp(-gain).tolist()}
        return {"prefill": interleaved.Rounds(seconds, 1, [None] * 6, [["baseline", "after"]] * 6, copied=True)}

    monkeypatch.setattr(interactions, "time_arms", timed)
    first = comparing._faster(None, None, None, comparing.MOST_ROUNDS, 0)
    assert seeds == [0, 6, 12] and first.n == 18
    for gains, most in ((np.full(6, 0.3), comparing.MOST_ROUNDS), (unclear, comparing.ROUNDS)):
        draws = iter([gains])
        assert comparing._faster(None, None, None, most, 0).n == 6


def _both(rounds: interleaved.Rounds, copied: bool) -> dict[str, interleaved.Rounds]:
    return dict.fromkeys(("prefill", "decode"), replace(rounds, copied=copied))


def test_a_candidates_interval_covers_process_variance_and_copies_narrow_it(monkeypatch):
    seconds = {"baseline": [1.0] * 6, "after": [0.98] * 6}
    rounds = interleaved.Rounds(seconds, 1, [None] * 6, [["baseline", "after"]] * 6)
    sigma = process_variance.between_processes("prefill").sigma
    monkeypatch.setattr(comparing, "SPEED_MARGIN", 0.001)
    for of_looks, groups in (((True,) * 3, 3), ((False,) * 3, 1), ((True, False, False), 9 / 5)):
        copied = iter(of_looks)
        monkeypatch.setattr(interactions, "time_arms", lambda *_, copied=copied: _both(rounds, next(copied)))
        gain = comparing._faster(None, None, None, comparing.MOST_ROUNDS, 0)
        assert gain.n == 18 and gain.value - gain.low == pytest.approx(1.96 * sigma / groups**0.5)


def test_a_candidate_that_cannot_be_copied_counts_as_one_draw(tiny, monkeypatch):
    model, sigma = tiny("qwen3-4b-instruct-2507"), 5.0  # which dwarfs the noise of the rounds
    monkeypatch.setattr(interactions, "process_sigma", lambda *_: sigma)
    monkeypatch.setattr(control, "separate_copy", lambda given: (given, "no room"))
    monkeypatch.setattr(comparing, "SPEED_MARGIN", 0.0)
    gain = comparing._faster(model, copy.deepcopy(model), torch.arange(8, 24)[None], comparing.MOST_ROUNDS, 0)
    assert gain.n == 18 and gain.value - gain.low >= 1.96 * sigma * 0.999


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_further_looks_do_not_favor_a_candidate_at_the_margin(monkeypatch, noise):
    """Rounds continued until the interval excluded a margin: one of three looks was lucky in one case in twenty."""
    random, seen = np.random.default_rng(0), []

    def timed(arms, prompt, count, seed):
        gain = comparing.SPEED_MARGIN + noise * random.standard_normal(6)
        seconds = {"baseline": [1.0] * 6, "after": np.exp(-gain).tolist()}
        return {"prefill": interleaved.Rounds(seconds, 1, [None] * 6, [["baseline", "after"]] * 6, copied=True)}

    monkeypatch.setattr(interactions, "time_arms", timed)
    seen = [comparing._faster(None, None, None, comparing.MOST_ROUNDS, 0) for _ in range(1500)]
    assert np.mean([gain.low > comparing.SPEED_MARGIN for gain in seen]) < 0.04
    # An effect of any size is timed as long as its interval is as wide.
    assert all(gain.n == comparing.MOST_ROUNDS or gain.high - gain.low <= 2 * comparing.SPEED_MARGIN for gain in seen)


@pytest.mark.parametrize(("effort", "tokens", "rounds"), [("preview", 128, 6), ("quick", 256, 18), (None, 256, 18)])
def test_preview_asks_candidates_less_and_times_them_briefly(tiny, batch, monkeypatch, effort, tokens, rounds):
    asked, timed = [], []

    def prepare(loaded, size, seed):
        asked.append(size)
        return types.SimpleNamespace(of=lambda *_: search_quality.NOTHING_LOST)

    def faster(before, after, prompt_BT, most, seed):
        timed.append((prompt_BT.shape[1], most))
        return _gain(0.3)

    monkeypatch.setattr(search_quality, "prepare", prepare)
    monkeypatch.setattr(composing, "parts", lambda: _parts(one=_copy))
    monkeypatch.setattr(comparing, "_faster", faster)
    name, size = "qwen3-4b-instruct-2507", effort and efforts.read(effort)
    assert len(comparing.default_stack(_loaded(tiny(name), name), [batch], effort=size).steps) == 1
    assert asked == [efforts.read(effort or "quick")] and timed == [(tokens, rounds)]


def test_models_tried_for_a_stack_are_not_kept_in_memory(tiny, name, batch, monkeypatch):
    tried, attempt = [], attempts.attempt

    def watched(*arguments, **options):
        outcome = attempt(*arguments, **options)
        tried.append(weakref.ref(outcome.model) if outcome.model is not None else lambda: None)
        return outcome

    held, parts = [], composing.parts

    def imported():
        held.append(sys._getframe()) if not held else None  # as a failed import inside does, through its traceback
        return parts()

    monkeypatch.setattr(composing, "parts", imported)
    monkeypatch.setattr(attempts, "attempt", watched)
    monkeypatch.setattr(comparing.recipe, "find", lambda *_: None)
    comparing.chosen(_loaded(tiny(name), name), [batch], effort=efforts.read("preview"))
    assert tried and all(model() is None for model in tried)


def test_every_subset_equals_the_pipelines_result(tiny, name, batch):
    model = tiny(name)
    parts = attribution.groups(STEPS)
    assert list(parts) == [PRUNING, FACTORS, SPARSE]
    models = attribution.every_subset(model, [batch], parts)
    assert set(models) == set(shapley.subsets(list(parts))) and models[()] is model
    for subset in ((FACTORS,), (PRUNING, SPARSE), (PRUNING, FACTORS, SPARSE)):
        steps = [step for part in subset for step in parts[part]]
        whole = composing.compose(model, [batch], steps).model
        assert io.weights_hash(models[subset]) == io.weights_hash(whole)
    assert attribution.every_subset(model, [batch], parts, whole=whole)[(PRUNING, FACTORS, SPARSE)] is whole


def test_long_stacks_are_grouped_and_names_stay_apart():
    five = [*STEPS, *STEPS[:2]]
    named = attribution.groups(five)
    assert list(named) == [PRUNING, FACTORS, SPARSE, f"{PRUNING} + {FACTORS}"]
    assert [step for part in named.values() for step in part] == five
    assert list(attribution.groups([STEPS[0], STEPS[0]])) == [PRUNING, f"{PRUNING} 2"]
    assert list(attribution.groups(STEPS, 1)) == [f"{PRUNING} + {FACTORS} + {SPARSE}"]


def test_attribution_adds_up_to_the_whole():
    random = np.random.default_rng(0)
    names = [interactions.named(*subset) for subset in shapley.subsets(("x", "y"))]
    seconds = {name: list(np.exp(random.normal(size=12))) for name in names}
    timed = {"prefill": interleaved.Rounds(seconds, 1, [None] * 12, [names] * 12)}
    rows = attribution.attribute(["x", "y"], timed, {name: random.normal(size=8) for name in names})
    for what in ("prefill", "loss"):
        of = {row["part"]: row["value"] for row in rows if row["what"] == what}
        assert of["x"] + of["y"] == pytest.approx(of["the whole stack"])


def test_a_single_part_has_the_whole_gain(tiny, batch):
    from lib.measure.compare import speed

    model = tiny("qwen3-4b-instruct-2507")
    pruned = composing.compose(model, [batch], STEPS[:1]).model
    prompt_BT = torch.arange(8, 40)[None]
    compared = speed.compare(model, pruned, prompt_BT, "quick", names=("prefill", "decode"), with_energy=False)
    timed = attribution.one_part(PRUNING, compared.timed)
    assert set(timed) == {"prefill", "decode"}
    pairs = timed["decode"].pairs(interactions.BASELINE, PRUNING)
    assert pairs.order == compared.timed["decode"].pairs.order
    for row in attribution.attribute([PRUNING], timed, {}):
        gain = -float(np.mean(compared.timed[row["what"]].pairs.differences))
        assert row["value"] == pytest.approx(gain) and row["part"] in (PRUNING, "the whole stack")


def test_applying_is_timed_and_its_joules_are_labelled(tiny, batch, monkeypatch):
    model = tiny("qwen3-coder-30b")
    before = io.weights_hash(model)
    seconds, joules = itertools.count(100.0, 3.0), itertools.count(20.0, 7.0)  # one reading before, one after
    meter = energy.Counter("rapl", "measured", "a counter", 0.1, None, lambda: next(joules))
    monkeypatch.setattr(comparing, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(comparing.energy, "counter", lambda device: meter)
    applied = comparing.apply_stack(model, [batch], STEPS[:1])
    assert (applied.seconds, applied.joules, applied.provenance) == (3.0, 7.0, "measured")
    assert io.weights_hash(model) == before != io.weights_hash(applied.model)


def test_a_device_is_synchronized_before_its_counter_is_read(tiny, batch, monkeypatch):
    """Work still running when the call returned was in no reading, and earlier work was in the first one."""
    done: list[str] = []
    meter = energy.Counter("nvml", "measured", "a counter", 2.0, None, lambda: done.append("read") or float(len(done)))
    monkeypatch.setattr(comparing.energy, "counter", lambda device: meter)
    monkeypatch.setattr(comparing.workloads, "barrier", lambda model: lambda: done.append("waited"))
    comparing.apply_stack(tiny("qwen3-coder-30b"), [batch], STEPS[:1])
    assert done[:2] == ["waited", "read"] == done[-2:] and done.count("read") == 2


def _rate(verdict: str, baseline: float, optimized: float, metric: str = "prefill_tokens_per_second"):
    return measurement.judged(
        metric, metric.split("_")[0], baseline=baseline, optimized=optimized, ratio=optimized / baseline,
        verdict=verdict, provenance="measured", source="planted",
    )  # fmt: skip


def test_break_even_is_the_cost_divided_by_the_saving_per_token():
    applied = comparing.AppliedStack(torch.nn.Identity(), [], 10.0, 30.0, "estimated", "planted")
    energy = _rate("better", 0.02, 0.01, "energy_joules_per_token")
    returned = returns.returns(
        applied, [_rate("better", 100.0, 200.0), _rate("worse", 50.0, 40.0, "decode_tokens_per_second"), energy]
    )
    paid = {row.workload: row for row in returned if row.metric == "break_even_tokens"}
    assert paid["prefill, by time"].optimized == pytest.approx(10.0 / (0.01 - 0.005))
    assert paid["energy, by energy"].optimized == pytest.approx(30.0 / 0.01)
    assert paid["energy, by energy"].provenance == "estimated"
    assert paid["decode, by time"].verdict == "unavailable" and "worse" in paid["decode, by time"].reason
    crossed = _rate("better", 100.0, 99.0).model_copy(update={"ratio": 1.1})  # the medians of two sets of pairs
    [paid_off] = [row for row in returns.returns(applied, [crossed]) if row.metric == "break_even_tokens"]
    assert paid_off.optimized == pytest.approx(10.0 * 100 / (1 - 1 / 1.1))
    rows = returns.account(applied, _rate("better", 100.0, 200.0))
    at = {(row["arm"], round(row["strength"], 6)): row["value"] for row in rows}
    assert at["before", 4.0] == pytest.approx(40.0) and at["after, with applying", 4.0] == pytest.approx(30.0)
    assert at["after, with applying", 0.0] == 10.0
    rows = returns.account(applied, crossed)
    saved = {(row["arm"], row["strength"]): row["value"] for row in rows}
    end = max(row["strength"] for row in rows)
    assert end == pytest.approx(2 * paid_off.optimized / 1000), "the figure ends at twice the break-even that is stated"
    assert saved["before", end] - saved["after, with applying", end] == pytest.approx(10.0), "twice 10 s less 10 s"
    never = returns.account(applied, _rate("worse", 100.0, 50.0))
    assert max(row["strength"] for row in never) == pytest.approx(10 * 10.0 * 100 / 1000)


def test_a_sweep_has_every_point_with_its_control(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    pruned = composing.compose(model, [batch], [RecipeStep(optimization=PRUNING, knobs={"saliency": "random"})]).model
    prompt = torch.randint(8, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    rates = sweeps.sweep(model, pruned, prompt, lengths=(16, 64), batches=(2,), new_tokens=2)
    assert [rate.workload for rate in rates] == ["prefill, 16 tokens", "prefill, 64 tokens", "decode, batch of 2"]
    assert all(rate.noise_floor is not None and rate.ci and rate.n == 6 for rate in rates)
    assert [(row["arm"], row["strength"]) for row in sweeps.gains(rates)] == [
        ("decode", 2),
        ("prefill", 16),
        ("prefill", 64),
    ]
    both = [_rate("better", 1.0, 2.0), _rate("better", 1.0, 3.0, "decode_tokens_per_second")]
    known = sweeps.points_known([*both, *rates], 32, 4)
    assert [(row["arm"], row["strength"], row["value"]) for row in sweeps.gains(known)] == [
        ("decode", 1, 3.0),
        ("prefill", 32, 2.0),
    ]


def test_recall_is_tested_at_longer_distances(tiny, monkeypatch):
    from lib.measure.quality import evaluate
    from lib.measure.quality.answers import Retrieved

    seen = []

    def recall(loaded, distance, count, seed):
        seen.append((loaded.model, distance))
        return Retrieved(distance, np.array([True, False, True, True]))

    monkeypatch.setattr(evaluate, "retrieval", recall)
    name = "qwen3-4b-instruct-2507"
    loaded, optimized = _loaded(tiny(name), name), tiny(name, seed=1)
    size = replace(efforts.EFFORTS["quick"], retrieval_prompts=4)
    matches = sweeps.retrieval(loaded, optimized, size, (64, 512), resamples=50)
    assert [match.workload for match in matches] == ["generate, 64 tokens back", "generate, 512 tokens back"]
    assert [distance for _, distance in seen] == [64, 64, 512, 512] and seen[1][0] is optimized
