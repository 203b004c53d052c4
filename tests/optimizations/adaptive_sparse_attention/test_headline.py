"""The decoding headline credits only what is left out: both arms have the same paged cache."""

from types import SimpleNamespace

import pytest
import torch

from lib.measure.metrics import settings
from lib.measure.timing import workloads
from lib.models.decoding import cache_names
from lib.optimizations.adaptive_sparse_attention import attention_timing, kernels, method

KNOBS = {"tau": 0.9, "block_size": 16, "stride": 4, "page_size": 4, "full_last": 8, "pages": 2, "dense_blocks": 0}
PROMPT = torch.randint(8, 96, (1, 40), generator=torch.Generator().manual_seed(1))


def _caches(model) -> tuple[set[str], float]:
    """Return the kinds of cache that decoding makes, and the share of tokens that it reads."""
    method.reset_counts(model)
    with torch.inference_mode():
        cache = cache_names.of(model(PROMPT, use_cache=True))
        model(PROMPT[:, :1], **cache_names.as_kwargs(cache), use_cache=True)
    return {type(layer).__name__ for layer in cache.layers}, method.density(model)["tokens"]


def test_decoding_is_compared_with_reading_all_pages_of_the_same_cache(tiny, monkeypatch):
    baseline = tiny("qwen3-4b-instruct-2507")
    optimized = method.apply(baseline, **KNOBS)
    arms = []

    def compare(first, second, *_, names, **__):
        arms.append((names, first, second))
        return SimpleNamespace()

    monkeypatch.setattr(attention_timing.speed, "compare", compare)
    formula = {"costs": {}, "baseline_costs": {}}
    attention_timing.whole_model(baseline, optimized, KNOBS, PROMPT, settings.read("quick"), {}, formula)
    (_, prompt_first, _), (names, first, second) = arms
    assert prompt_first is baseline and names == ("decode",) and second is optimized and first is not baseline
    (every, all_read), (chosen, some_read) = _caches(first), _caches(second)
    assert every == chosen and some_read < all_read


@torch.inference_mode()
@pytest.mark.parametrize("padded", [False, True])
def test_both_arms_of_decoding_use_one_kernel(tiny, monkeypatch, padded):
    """The stock function repeats shared keys or reads them once per query head: that gain is not due to sparsity."""
    baseline = tiny("qwen3-4b-instruct-2507")
    ids_BT = PROMPT.repeat(2, 1)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : 6 * padded] = 0
    longer_BT, token_B1 = torch.cat([mask_BT, mask_BT[:, -1:]], 1), ids_BT[:, :1]
    every, chosen = (method.apply(baseline, **KNOBS | {"tau": 1.0, "pages": pages}) for pages in (0, 2))
    logits = []
    for arm in (baseline, every, chosen):
        cache = cache_names.as_kwargs(cache_names.of(arm(ids_BT, attention_mask=mask_BT, use_cache=True)))
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "sdpa_attention_forward", None)
            logits.append(arm(token_B1, attention_mask=longer_BT, use_cache=True, **cache).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits[2], logits[0], atol=1e-3)


def test_the_gain_of_the_cache_alone_is_reported_separately(tiny, monkeypatch):
    baseline = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(attention_timing, "FEW_BLOCKS", 6)
    timed = SimpleNamespace(timed={})
    parts = attention_timing.decode_apart(baseline, method.apply(baseline, **KNOBS), KNOBS, PROMPT, timed, 2)
    assert [part["name"] for part in parts] == [
        "all pages against the stock cache", "chosen pages against the stock cache"
    ]  # fmt: skip


def test_the_first_named_arm_is_the_optimized_one(tiny, monkeypatch):
    """This includes latent attention, which also has the stock path; the notebook's caption says so."""
    baseline = tiny("glm-4.7-flash")
    optimized = method.apply(baseline, **KNOBS)
    made, arms = {}, []
    monkeypatch.setattr(attention_timing.workloads, "steps", lambda model, *_: made.setdefault(id(model), model))
    monkeypatch.setattr(attention_timing, "every_page", lambda *_: "all pages")
    monkeypatch.setattr(attention_timing.absorbed_baseline, "absorbed_baseline", lambda _: "the stock cache")
    monkeypatch.setattr(attention_timing, "time_calls", lambda first, second, *_, **__: arms.append((first, second)))
    monkeypatch.setattr(attention_timing.paired_samples, "from_pairs", lambda *_: None)
    parts = attention_timing.decode_apart(baseline, optimized, KNOBS, PROMPT, SimpleNamespace(timed={}), 2)
    words = {"all pages": "all pages", "the stock cache": "the stock cache"}

    def called(arm):
        return "the stock path" if arm is baseline else "chosen pages" if arm is optimized else words[arm]

    assert [part["name"] for part in parts] == [f"{called(second)} against {called(first)}" for first, second in arms]
    assert len(arms) == 3 and parts[-1]["name"].endswith("the stock path")


@pytest.mark.parametrize("new_tokens, again", [(4, False), (2, True)])
def test_arms_beside_the_headline_decode_equally_many_tokens_per_call(tiny, monkeypatch, new_tokens, again):
    """The headline's timings decode in turns of two tokens; they are reused where all arms do."""
    baseline = tiny("qwen3-4b-instruct-2507")
    optimized = method.apply(baseline, **KNOBS)
    models = attention_timing.every_page(baseline, KNOBS), optimized
    every, sparse = (workloads.steps(model, PROMPT, new_tokens, workloads.TURN_STEPS) for model in models)
    headline = SimpleNamespace(timed={"decode": SimpleNamespace(baseline=every, optimized=sparse)})
    calls = []
    monkeypatch.setattr(attention_timing, "time_calls", lambda first, second, *_, **__: calls.append((first, second)))
    monkeypatch.setattr(attention_timing.paired_samples, "from_pairs", lambda *arguments: arguments[3])
    parts = attention_timing.decode_apart(baseline, optimized, KNOBS, PROMPT, headline, new_tokens)
    assert [[work.new_tokens for work in pair] for pair in calls] == [[new_tokens] * 2] * 2
    assert [part["measurements"] for part in parts] == [[new_tokens]] * 2
    assert (calls[0][1] is every and calls[1][1] is sparse) == again


def test_blocks_that_read_all_pages_are_judged_by_their_best_pages(tiny):
    """Reading all pages holds all mass by construction; the best pages hold less."""
    model = method.apply(tiny("qwen3-4b-instruct-2507"), **KNOBS | {"pages": 4, "dense_blocks": 2})
    read = attention_timing.pages_read(model, SimpleNamespace(timed={}), PROMPT)
    assert read.by_block["mass held"][:2].tolist() == [1.0, 1.0]
    assert (read.by_block["in chosen pages"] < 0.999).all() and len(read.by_block) == 4
    assert read.by_block["mass held"][2:].equals(read.by_block["in chosen pages"][2:])
    assert read.mass == read.by_block["mass held"].mean()
