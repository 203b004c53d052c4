"""Parts found in the folder, their order and refusals; the caller's model is unchanged; a live model is fully
restored.
"""

import copy
import itertools
import types

import pytest
import torch

from lib.errors import UserError
from lib.measure.timing import workloads
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common import discovery
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import attempts, hot_swap, traits
from lib.optimizations.modular_components import method as composing

STEMS = discovery.stems()
PRUNING, FACTORS, SPARSE = "structured_pruning", "tensor_decomposition", "sparse_neural_networks"


def step(stem: str, **knobs) -> RecipeStep:
    light = {PRUNING: {"ratio": 0.2}, FACTORS: {"method": "plain"}, SPARSE: {"method": "magnitude"}}
    return RecipeStep(optimization=stem, knobs=light.get(stem, {}) | knobs)


@pytest.mark.parametrize("stem", STEMS)
def test_optimizations_that_change_a_model_declare_how_they_compose(stem):
    module = discovery.method(stem)
    if hasattr(module, "apply"):
        assert hasattr(module, "COMPOSES"), (
            f"{stem}: it has apply, so it must say what it touches, needs and takes away"
        )
        composing.check(stem, module)


def test_parts_are_found_by_walking_the_folder():
    assert set(composing.parts()) == {stem for stem in STEMS if hasattr(discovery.method(stem), "COMPOSES")}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"needs": ("whole chanels",)}, 'needs: unknown "whole chanels"'),
        ({"touches": ("souls",)}, 'touches: unknown "souls"'),
        ({"trial": {"speed": 3}}, 'trial: unknown "speed"'),
        ({"wants": ()}, 'key "wants"'),
        ({"mildest": {"speed": 0}}, 'mildest: unknown "speed"'),
        ({"at": ({"knobs": {"speed": 1}},)}, 'knobs: unknown "speed"'),
        ({"at": ({"needs": ("whole chanels",)},)}, 'needs: unknown "whole chanels"'),
    ],
)
def test_a_faulty_descriptor_is_named(change, says):
    sound = {"touches": (), "needs": (), "invalidates": (), "trial": {}}
    module = types.SimpleNamespace(apply=None, applies_to=None, SEARCH_SPACE={}, COMPOSES=sound)
    composing.check("twelfth", module)
    module.COMPOSES = sound | change
    with pytest.raises(UserError, match=says):
        composing.check("twelfth", module)


def test_order_follows_needs_whatever_the_input_order(tiny, name):
    model = tiny(name)
    wanted = [PRUNING, FACTORS, SPARSE]
    for stems in (wanted, wanted[::-1], [SPARSE, PRUNING, FACTORS]):
        arranged = composing.order([step(stem) for stem in stems], model)
        assert [step.optimization for step in arranged] == wanted
    assert composing.refusal([step(SPARSE), step(PRUNING)], model)
    routed = any(block.feed_forward.experts for block in anatomy(model).blocks)
    assert (composing.refusal([step(FACTORS), step(PRUNING)], model) is None) == routed, (
        "experts in factors can still be removed, channels in factors cannot"
    )


def test_a_stack_that_cannot_be_ordered_is_refused(tiny, monkeypatch):
    modules = {}
    for stem, needed, lost in (
        ("one", "whole matrices", "stock attention"),
        ("two", "stock attention", "whole matrices"),
    ):
        described = {"touches": (), "needs": (needed,), "invalidates": (lost,), "trial": {}}
        modules[stem] = types.SimpleNamespace(
            COMPOSES=described, SEARCH_SPACE={}, apply=None, applies_to=lambda model: None
        )
    monkeypatch.setattr(composing, "parts", lambda: modules)
    model = tiny("qwen3-coder-30b")
    with pytest.raises(
        UserError, match="cannot be ordered: one takes away stock attention, which two needs; two takes"
    ):
        composing.order([RecipeStep(optimization="one"), RecipeStep(optimization="two")], model)
    with pytest.raises(UserError, match="cannot be ordered"):
        composing.compose(model, [], [RecipeStep(optimization="one"), RecipeStep(optimization="two")])
    arranged, reasons = composing.orderable([RecipeStep(optimization="two"), RecipeStep(optimization="one")], model)
    assert [step.optimization for step in arranged] == ["one"]
    assert reasons["two"].startswith("these steps cannot be ordered: one takes away stock attention")


def test_composing_leaves_the_caller_alone_and_copies_nothing(tiny, name, batch):
    model = tiny(name)
    before = io.weights_hash(model)
    identity = composing.compose(model, [batch], [])
    assert io.weights_hash(identity.model) == before and identity.model is not model and identity.steps == []
    composed = composing.compose(model, [batch], [step(SPARSE), step(FACTORS), step(PRUNING)])
    assert [step.optimization for step in composed.steps] == [PRUNING, FACTORS, SPARSE]
    assert io.weights_hash(model) == before != io.weights_hash(composed.model)
    assert torch.isfinite(composed.model(**batch).logits).all()


def test_a_pipeline_equals_its_steps_one_by_one(tiny, name, batch):
    from lib.optimizations.sparse_neural_networks import method as sparse_neural_networks
    from lib.optimizations.structured_pruning import method as structured_pruning

    model = tiny(name)
    by_hand = structured_pruning.apply(model, [batch], ratio=0.2)
    by_hand = sparse_neural_networks.apply(by_hand, [batch], method="magnitude")
    composed = composing.compose(model, [batch], [step(PRUNING), step(SPARSE)]).model
    assert io.weights_hash(composed) == io.weights_hash(by_hand)


def _worked(steps):
    return attempts.Attempt(steps, "works", None)


def test_stale_statistics_are_collected_again(tiny, batch):
    model = tiny("qwen3-coder-30b")
    twice = [step(FACTORS, compression=0.4), step(PRUNING, ratio=0.2)]  # factored experts can still be removed
    fresh = composing.compose(model, [batch], twice, arrange=False)
    again = composing.compose(model, [batch], [*twice, step(PRUNING, ratio=0.1)], arrange=False)
    stale = next(iter(attempts.stale(model, [batch], {(FACTORS, PRUNING): _worked(twice)}).values()))
    assert (fresh.observations, again.observations) == (1, 2)
    assert io.weights_hash(stale) != io.weights_hash(fresh.model), "old statistics chose the same experts"
    begun = {FACTORS: composing.compose(model, [batch], twice[:1]).model}
    known = next(iter(attempts.stale(model, [batch], {(FACTORS, PRUNING): _worked(twice)}, begun=begun).values()))
    assert io.weights_hash(known) == io.weights_hash(stale), "a first step that is known already makes a difference"
    by_hand = composing.compose(composing.compose(model, [batch], twice[:1]).model, [batch], twice[1:]).model
    assert io.weights_hash(fresh.model) == io.weights_hash(by_hand)


def test_every_ordered_pair_works_or_is_refused(tiny, name, batch):
    model, sample = tiny(name), batch["input_ids"]
    options = {"random_weights": True}
    singles = {s: attempts.attempt(model, [batch], [step(s)], sample, **options) for s in (PRUNING, FACTORS, SPARSE)}
    assert {attempt.state for attempt in singles.values()} == {"works"}
    pairs = {
        (first, second): attempts.both(model, [batch], singles[first], singles[second], sample, **options)
        for first, second in itertools.permutations(singles, 2)
    }
    assert len(pairs) == 6 and {attempt.state for attempt in pairs.values()} <= {"works", "refused"}
    assert all(attempt.reason for attempt in pairs.values() if attempt.state == "refused")
    works = [key for key, attempt in pairs.items() if attempt.state == "works"]
    assert attempts.modularity(pairs) == len(works) / 6 and (PRUNING, SPARSE) in works
    forced = attempts.attempt(model, [batch], pairs[SPARSE, PRUNING].steps, sample, checked=False, **options)
    assert forced.state in ("refused", "crashed"), "the refusal was right"
    assert attempts.stale(model, [batch], pairs).keys() <= set(works)


def test_requirements_may_depend_on_the_knobs(tiny, name, batch):
    """Weights that stay in memory may be changed afterwards; those moved to a file may not."""
    model, stem = tiny(name), "streaming_computation"
    here, away = (RecipeStep(optimization=stem, knobs={"memory_ratio": ratio}) for ratio in (1.0, 0.6))
    for part in (PRUNING, FACTORS, SPARSE):
        assert composing.refusal([here, step(part)], model) is None
        assert (composing.refusal([away, step(part)], model) is None) == (
            not set(composing.described(away)["invalidates"])
            & set(composing.described(step(part))["needs"])
            & traits.concerning(model)
        )
    assert composing.refusal([away, step(SPARSE)], model)
    for pair in ([here, step(SPARSE)], [step(SPARSE), here]):
        both = composing.compose(model, [batch], pair, arrange=False).model
        alone = composing.compose(model, [batch], [step(SPARSE)]).model
        ids = batch["input_ids"][:1, :20]
        tokens = [_generated(arm, ids) for arm in (both, alone)]
        assert torch.equal(*tokens)


def _generated(model, ids):
    work = workloads.generate(model, ids, 4)
    work()
    return work.output_BN


def test_a_crash_and_a_broken_output_are_outcomes(tiny, batch, monkeypatch):
    def crash(model, calibration):
        raise RuntimeError("no such kernel")

    def silence(model, calibration):
        muted = composing.copy.deepcopy(model)
        anatomy(muted).final_norm.weight.fill_(float("nan"))
        return muted

    described = {"touches": (), "needs": (), "invalidates": (), "trial": {}}
    modules = {
        stem: types.SimpleNamespace(COMPOSES=described, SEARCH_SPACE={}, apply=apply, applies_to=lambda model: None)
        for stem, apply in (("crash", crash), ("silence", silence))
    }
    monkeypatch.setattr(composing, "parts", lambda: modules)
    model = tiny("qwen3-4b-instruct-2507")
    outcomes = [
        attempts.attempt(model, [], [RecipeStep(optimization=s)], batch["input_ids"]) for s in ("crash", "silence")
    ]
    assert [attempt.state for attempt in outcomes] == ["crashed", "invalid"]
    assert outcomes[0].reason == "RuntimeError: no such kernel" and "not finite" in outcomes[1].reason


def test_bad_requests_are_named(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    with pytest.raises(UserError, match=r'no optimization "structured_prunning".*structured_pruning'):
        composing.compose(model, [batch], [RecipeStep(optimization="structured_prunning")])
    with pytest.raises(UserError, match=r'structured_pruning has no knob "ration".*ratio'):
        composing.compose(model, [batch], [RecipeStep(optimization=PRUNING, knobs={"ration": 0.2})])
    with pytest.raises(UserError, match="structured_pruning needs whole channels, which sparse_neural_networks takes"):
        composing.compose(model, [batch], [step(SPARSE), step(PRUNING)], arrange=False)
    sparse = composing.compose(model, [batch], [step(SPARSE)]).model
    with pytest.raises(UserError, match=r"structured_pruning cannot be applied here: whole channels: .* stored sparse"):
        composing.compose(sparse, [batch], [step(PRUNING)])


def test_traits_are_read_from_the_model(tiny, name, batch):
    model = tiny(name)
    assert traits.lacking(model, tuple(traits.TRAITS)) is None
    sparse = composing.compose(model, [batch], [step(SPARSE)]).model
    for trait in ("whole matrices", "dense matrices"):
        assert traits.lacking(sparse, [trait])
    sparse.config.get_text_config()._attn_implementation = "something_else"
    assert "something_else" in traits.lacking(sparse, ["stock attention"])
    with pytest.raises(UserError, match="unknown trait"):
        traits.lacking(model, ["dense"])


def test_factored_experts_stored_sparse_equal_their_cores(tiny, batch, tmp_path):
    """Sparse cores between shared factors, compared with the same zeros multiplied densely; then saved to disk."""
    model = tiny("glm-4.7-flash")
    wanted = [step(FACTORS), step(SPARSE, sparsity=0.5)]
    sparse = composing.compose(model, [batch], wanted).model
    dense = composing.compose(model, [batch], [step(FACTORS), step(SPARSE, sparsity=0.5, execute="dense")]).model
    experts = next(b.feed_forward.experts.module for b in anatomy(sparse).blocks if b.feed_forward.experts)
    assert type(experts).__name__ == "SparseExperts"
    assert experts.input_factor is not None or experts.output_factor is not None, "no stack of experts was factored"
    torch.testing.assert_close(sparse(**batch).logits, dense(**batch).logits, atol=1e-4, rtol=1e-4)
    back = io.load_folder(io.save(sparse, tmp_path), torch.float32)
    assert io.weights_hash(back) == io.weights_hash(sparse)
    torch.testing.assert_close(back(**batch).logits, sparse(**batch).logits, atol=1e-4, rtol=1e-4)


# --- a live model ----------------------------------------------------------------------------------------------------


def test_a_live_model_is_fully_restored(tiny, name, batch):
    model = tiny(name)
    prompt, before, logits = batch["input_ids"][:1], io.weights_hash(model), model(**batch).logits
    optimized = composing.compose(model, [batch], [step(PRUNING)]).model
    changed, theirs = io.weights_hash(optimized), optimized(**batch).logits
    serving = hot_swap.Live(model)
    answer = serving.generate(prompt, 6)
    serving.swap(optimized)
    assert io.weights_hash(model) == changed and torch.equal(model(**batch).logits, theirs)
    with pytest.raises(UserError, match="swapped in already"):
        serving.swap(optimized)
    serving.revert()
    assert io.weights_hash(model) == before and torch.equal(model(**batch).logits, logits)
    assert torch.equal(serving.generate(prompt, 6), answer)
    with pytest.raises(UserError, match="nothing to revert"):
        serving.revert()


def test_a_swap_mid_request_takes_effect_and_leaves_no_trace(tiny, batch):
    model = tiny("qwen3-coder-30b")
    prompt, before = batch["input_ids"][:1], io.weights_hash(model)
    optimized = composing.compose(model, [batch], [step(PRUNING, ratio=0.4)]).model
    serving, ran = hot_swap.Live(model), []
    experts = lambda: anatomy(model).blocks[-1].feed_forward.experts.count  # noqa: E731

    def between(count: int) -> None:
        ran.append(experts())
        if count == 2:
            serving.swap(optimized)
        if count == 4:
            serving.revert()

    serving.generate(prompt, 6, between)
    assert ran[0] == ran[1] == ran[4] == 8 > ran[2] == ran[3] and io.weights_hash(model) == before
    report = hot_swap.trial(serving, optimized, prompt, 6)
    assert report.reason is None and len(report.waits) == 2 and serving.original is None


def test_another_models_earlier_prompt_shifts_no_position_of_a_swapped_request(tiny, name, batch):
    """A vision-language model keeps an offset of positions: that of two prompts ended the run or shifted the rest."""
    model = tiny(name)
    same = copy.deepcopy(model)
    same(**batch)
    inner = same.model
    if hasattr(inner, "rope_deltas"):
        inner.rope_deltas = torch.tensor([[7], [9]])
    assert len(batch["input_ids"]) > 1
    report = hot_swap.trial(hot_swap.Live(model), same, batch["input_ids"][:1], 6)
    assert report.changed == 0 and report.reason is None


def test_a_cache_that_would_not_fit_waits_for_the_end_of_the_request(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    optimized = composing.compose(model, [batch], [step(PRUNING, granularity="heads", ratio=0.1)]).model
    assert hot_swap.cache_shape(model) != hot_swap.cache_shape(optimized)
    serving, prompt = hot_swap.Live(model), batch["input_ids"][:1]
    with pytest.raises(UserError, match=r"1 request under way.*Swap between requests"):
        serving.generate(prompt, 4, lambda count: serving.swap(optimized))
    assert serving.requests == 0 and serving.original is None
    report = hot_swap.trial(serving, optimized, prompt, 6)
    assert "Swap between requests" in report.reason and len(report.waits) == 2


def test_models_that_cannot_be_exchanged_are_refused(tiny):
    first, second = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-coder-30b")
    with pytest.raises(UserError, match="in the place of"):
        hot_swap.exchange(first, second)
    bound = tiny("qwen3-4b-instruct-2507", seed=1)
    bound.answer = types.MethodType(lambda self: None, bound)
    with pytest.raises(UserError, match="answer belongs to its object"):
        hot_swap.exchange(first, bound)
    wrapped = tiny("qwen3-4b-instruct-2507", seed=1)
    wrapped.forward = lambda *arguments, **options: None
    report = hot_swap.trial(hot_swap.Live(first), wrapped, torch.tensor([[9, 10, 11]]), 4)
    assert "forward belongs to its object" in report.reason and report.waits == []
    assert report.changed is None and not report.done, "what was not exchanged changed no tokens, known or unknown"
