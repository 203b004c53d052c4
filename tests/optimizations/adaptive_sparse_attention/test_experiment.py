"""What refutes the claim about mass, on survey rows; the lengths of a run; exactness on tiny models."""

import copy
from types import SimpleNamespace

import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.measure.compare import saved
from lib.measure.metrics import measurement
from lib.measure.roofline import cost_model
from lib.measure.trackers import memory
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import no_op
from lib.optimizations.adaptive_sparse_attention import attention_timing, experiment, method

TRAINED = SimpleNamespace(random_weights=False)


def _survey(*leads, density=0.5):
    rows = [{"recall": 0.9, "window": 0.9 - lead, "random": 0.2, "density": density, "length": 256} for lead in leads]
    return [{"recall": 0.1, "window": 0.9, "random": 0.9, "density": 0.5, "length": 128}, *rows]


@pytest.mark.parametrize(
    "leads, refuted", [((0.1, 0.2, 0.1), False), ((-0.1, -0.2, -0.1), True), ((-0.1, 0.2, 0.1), None)]
)
def test_others_hold_as_much_is_decided_by_the_interval_at_the_longest_prompt(leads, refuted):
    claim, answer, evidence = experiment.others_hold_as_much(TRAINED, _survey(*leads))
    assert (claim, answer) == (experiment.CLAIMS[0], refuted) and "256 tokens" in evidence


def test_random_weights_and_full_density_give_no_answer():
    assert experiment.others_hold_as_much(SimpleNamespace(random_weights=True), _survey(0.1, 0.1))[1] is None
    assert experiment.others_hold_as_much(TRAINED, _survey(0.0, 0.0, density=1.0))[1] is None


def _loaded(model, scale):
    return SimpleNamespace(model=model, scale=scale, dtype="float32", parameters=SimpleNamespace(name="tiny"))


def test_lengths_follow_effort_and_scale(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    anatomy(model).config.max_position_embeddings = 32768
    proxy, blocks = _loaded(model, "proxy"), _loaded(model, "slice")
    assert experiment.lengths_of(proxy, "quick") == experiment.PromptLengths([1024, 2048], 2048)
    assert experiment.lengths_of(blocks, "standard") == experiment.PromptLengths([4096, 8192], 4096)
    assert experiment.lengths_of(proxy, "quick", 3000) == experiment.PromptLengths([1024, 2048, 3000], 3000)


def test_effort_lengths_fit_the_positions_of_the_model(tiny):
    """SmolLM2 has 8,192 positions, where a thorough run would read 16,384 tokens and decode after 8,192 of them."""
    model = tiny("qwen3-4b-instruct-2507")
    assert experiment.lengths_of(_loaded(model, "proxy"), "quick") == experiment.PromptLengths([496], 496)
    real = _loaded(model, "full")
    anatomy(model).config.max_position_embeddings = 8192
    fitted = experiment.lengths_of(real, "thorough")
    assert fitted.curves == [4096, 8192] and fitted.timed + fitted.behind == 8192
    assert experiment.lengths_of(real, "thorough", 9000).timed == 9000  # requested: refused later
    anatomy(model).config.max_position_embeddings = 40
    assert experiment.lengths_of(real, "quick").timed == 2048  # too short for anything: `facts` refuses it


def test_a_context_too_short_for_any_question_is_refused(tiny):
    with pytest.raises(UserError, match=r"context 40: expected 0 .by effort. or at least 64 tokens"):
        experiment.lengths_of(_loaded(tiny("qwen3-4b-instruct-2507"), "proxy"), "quick", 40)


def test_a_prompt_that_fills_all_positions_is_refused_before_reading(tiny):
    """It leaves none of the 512 positions for the decoded tokens and the questions asked after it."""
    loaded = _loaded(tiny("qwen3-4b-instruct-2507"), "proxy")
    with pytest.raises(NotApplicable, match=r"512 tokens, with 16 more .* at most 496, the model's 512 minus these"):
        experiment.facts(loaded, experiment.lengths_of(loaded, "quick", 512))
    with pytest.raises(NotApplicable, match="a context of 600 tokens is longer"):
        experiment.facts(loaded, experiment.lengths_of(loaded, "quick", 600))
    assert "[496]" in set(experiment.facts(loaded, experiment.lengths_of(loaded, "quick", 496))["value"])


def test_a_prompt_too_short_for_a_pattern_is_priced_without_a_search(tiny):
    model, prompt_1T = tiny("qwen3-4b-instruct-2507"), torch.arange(8, 88)[None]
    knobs = {"tau": 0.3, "stride": 4, "full_last": 8}
    whole, some = (method.apply(model, **knobs, block_size=size) for size in (64, 16))
    assert attention_timing.priced(whole, prompt_1T, 4) == {"density": 1.0, "stride": 0}
    priced = attention_timing.priced(some, prompt_1T, 4)
    assert priced["stride"] == 4 and 0 < priced["density"] < 1


def test_page_bounds_count_as_reads(tiny):
    """Chosen pages, plus a minimum and a maximum of every page: half a token each where keys are half of the cache."""
    knobs = {"pages": 64, "page_size": 16, "dense_blocks": 0}
    model = tiny("qwen3-4b-instruct-2507")
    assert experiment.attended(model, knobs, 8192) == 1024 + 512
    assert experiment.attended(model, knobs | {"dense_blocks": 2}, 8192) == (2 * 8192 + 2 * 1536) / 4
    assert experiment.attended(tiny("glm-4.7-flash"), knobs, 8192) == 1024 + 2 * 512
    assert experiment.attended(model, knobs, 1000) == experiment.attended(model, knobs | {"pages": 0}, 1000) == 1000


@torch.inference_mode()
@pytest.mark.parametrize("dense_blocks", [0, 1])
def test_the_cache_per_token_includes_the_page_bounds(tiny, name, dense_blocks):
    """It equals the bytes that the layers hold once pages were chosen; without chosen pages no bounds are made."""
    knobs = {"tau": 1.0, "block_size": 16, "stride": 4, "page_size": 4, "pages": 2, "dense_blocks": dense_blocks}
    model, ids_1T = tiny(name), torch.arange(8, 72)[None]
    optimized = method.apply(model, **knobs)
    cache = cache_names.of(optimized(input_ids=ids_1T, use_cache=True))
    optimized(input_ids=ids_1T[:, :1], use_cache=True, **cache_names.as_kwargs(cache))
    held = [part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)]
    bounds = [layer._bounds_BGPE.nbytes for layer in cache.layers if layer._bounds_BGPE is not None]
    per_token = cost_model.kv_cache_bytes_per_token(model)
    counted = measurement.counted("kv_cache_bytes_per_token", "decode", per_token, per_token, "by formula")
    again = experiment._with_bounds(counted, model, knobs, 64)
    assert len(bounds) == 4 - dense_blocks and sum(held) == 65 * per_token
    assert again.baseline == per_token and again.optimized == pytest.approx(per_token + sum(bounds) / 64)
    assert again.verdict == "worse" and again.source.endswith("with the bounds of its pages")
    assert experiment._with_bounds(counted, model, knobs | {"pages": 0}, 64) is counted
    assert experiment._with_bounds(counted, model, knobs | {"pages": 16}, 64) is counted
    slice_depth_of = SimpleNamespace(whole=lambda _: ["dense"] * 10)
    whole = measurement.counted("full_depth_kv_cache_bytes_per_token", "decode", 100.0, 100.0, "derived")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "slice_depth", slice_depth_of)
        share = experiment._with_bounds(whole, model, knobs, 64).optimized / 100 - 1
    assert share == pytest.approx((10 - dense_blocks) / 10 * sum(bounds) / len(bounds) * 4 / 64 / per_token)


def test_blocks_without_attention_are_skipped(tiny, monkeypatch):
    model = no_op.remove(tiny("qwen3-4b-instruct-2507"), 2, "attention")
    knobs = {"pages": 64, "page_size": 16, "dense_blocks": 0}
    assert experiment.attended(model, knobs, 8192) == 1024 + 512
    monkeypatch.setattr(experiment.task_list, "text_windows", lambda *_: torch.arange(8, 40)[None])
    _, heads = experiment.watched(SimpleNamespace(model=model), 32)
    assert heads.index == 1 and heads.tokens == 32, "the middle one has none"


def test_a_knob_out_of_range_is_named_before_anything_is_loaded():
    knobs = {"tau": 0.9, "block_size": 100, "stride": 16, "max_density": 1.0, "full_last": 1, "pages": 4}
    with pytest.raises(UserError, match="does not divide"):
        experiment.sizes("quick", "proxy", knobs | {"page_size": 16})


@pytest.mark.parametrize("name, transform", [("glm-4.7-flash", saved.ABSORBING), ("qwen3-4b-instruct-2507", None)])
def test_the_memory_child_of_full_attention_decodes_latents_absorbed(tiny, monkeypatch, name, transform):
    seen = []

    def peaks(*arms):
        seen.extend(arm.transform for arm in arms)
        return [memory.Peaks([memory.failed("planted")]) for _ in arms]

    monkeypatch.setattr(memory, "peaks", peaks)
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 1.0, 1.0, "planted")
    model, load = tiny(name), {"name": name, "device": "cpu"}
    experiment.costs(model, model, {}, 64, {}, load, [rate], 1.0)
    assert seen == [transform, "lib.optimizations.adaptive_sparse_attention.method:apply"]


@pytest.mark.parametrize(("effort", "positions"), [("quick", 2048), ("standard", 4096), ("thorough", 4096)])
def test_the_shortest_curve_is_at_most_as_long_as_the_timed_prompt(tiny, effort, positions):
    """OLMoE has 4,096 positions: the only survey was longer than the timed prompt, and `shares` found no row."""
    model = copy.deepcopy(tiny("qwen3-4b-instruct-2507"))
    anatomy(model).config.max_position_embeddings = positions
    fitted = experiment.lengths_of(_loaded(model, "full"), effort)
    assert fitted.timed + fitted.behind == positions and fitted.curves == [fitted.timed]


def test_exactness_stays_within_the_positions_of_the_model(tiny, monkeypatch):
    """Blocks of 128 take 532 tokens; this model has 512 positions, and the refusal blamed the user's context."""
    drawn = []

    def windows(loaded, split, count, tokens, seed):
        drawn.append(tokens)
        return torch.randint(8, 96, (count, tokens), generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(experiment.task_list, "text_windows", windows)
    model = copy.deepcopy(tiny("qwen3-4b-instruct-2507"))
    anatomy(model).config.max_position_embeddings = 512
    knobs = {"tau": 0.5, "block_size": 128, "stride": 16}
    loaded = SimpleNamespace(model=model, scale="proxy", device="cpu")
    exact = experiment.exactness(loaded, method.apply(model, **knobs), knobs)
    assert drawn == [512] and max(exact.values()) < 1e-3
