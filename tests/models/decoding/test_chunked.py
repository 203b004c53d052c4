"""Chunks, absorbed latents, windows, and token-by-token decoding, each against the plain computation."""

import sys

import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.models.decoding import cache_names, chunked, mla_absorption
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import sink_window
from tests.models.architectures import build

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def ids_of(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(8, 96, (rows, length), generator=torch.Generator().manual_seed(5))


def cache_kwargs(output: object) -> dict[str, object]:
    """Return the cache of `output` as keyword arguments of the next call."""
    return cache_names.as_kwargs(cache_names.of(output))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_chunked_prompt_equals_the_whole_prompt(tiny, name, chunk):
    plain, model = tiny(name), chunked.chunk_prefill(tiny(name), chunk)
    ids = ids_of(40)
    with torch.inference_mode():
        expected, actual = plain(ids), model(ids)
        torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
        assert cache_names.of(actual).get_seq_length() == 40
        assert cache_names.of(model(ids, use_cache=False)) is None
        step = ids[:, :1]
        torch.testing.assert_close(
            model(step, **cache_kwargs(actual)).logits, plain(step, **cache_kwargs(expected)).logits, **CLOSE
        )
    torch.testing.assert_close(chunked.whole_prefill(model)(ids).logits, expected.logits, atol=0, rtol=0)


def test_chunks_respect_padding(tiny, name, batch):
    plain, model = tiny(name), chunked.chunk_prefill(tiny(name), 5)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], plain(**batch).logits[real], **CLOSE)


def test_chunks_may_split_pictures(tiny):
    plain, model = tiny("qwen3-vl-2b"), chunked.chunk_prefill(tiny("qwen3-vl-2b"), 3)
    ids = torch.tensor([[3, *[5] * 4, 4, 20, 21, 22], [30, 31, 3, *[5] * 4, 4, 23]])
    picture = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": picture, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    inputs["mm_token_type_ids"] = (ids == 5).int()
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, **CLOSE)


def test_only_one_chunk_is_in_flight(tiny, name):
    model = chunked.chunk_prefill(tiny(name), 8)
    lengths = []
    anatomy(model).blocks[0].module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(ids_of(30), logits_to_keep=1)
    assert lengths == [8, 8, 8, 6]


def test_chunked_losses_equal_those_of_whole_logits(tiny, name):
    model, ids = tiny(name), ids_of(30)
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    for rows in (1, 7, 1000):
        torch.testing.assert_close(chunked.losses(model, ids, rows=rows).flatten(), expected, **CLOSE)


@pytest.mark.parametrize("new", [1, 3])
def test_absorbed_attention_is_exact(tiny, new):
    plain, model = tiny("glm-4.7-flash"), mla_absorption.absorb(tiny("glm-4.7-flash"))
    calls = []
    for block in anatomy(model).blocks:
        block.attention.module.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
    ids = ids_of(40)
    with torch.inference_mode():
        expected, actual = plain(ids), model(ids)
        calls.clear()
        for at in range(3):
            new_ids = ids[:, at : at + new]
            expected, actual = plain(new_ids, **cache_kwargs(expected)), model(new_ids, **cache_kwargs(actual))
            torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    assert not calls, "the cache was expanded"
    assert mla_absorption.is_absorbed(model) and not mla_absorption.is_absorbed(mla_absorption.expand(model))


def test_absorbed_attention_respects_padding_and_eager_masks(tiny):
    plain, model = tiny("glm-4.7-flash"), mla_absorption.absorb(tiny("glm-4.7-flash"))
    ids, mask = ids_of(20), torch.ones(2, 22, dtype=torch.long)
    mask[1, :6] = 0
    for backend in ("sdpa", "eager"):
        plain.set_attn_implementation(backend), model.set_attn_implementation(backend)
        with torch.inference_mode():
            read = [arm(ids, attention_mask=mask[:, :20]) for arm in (plain, model)]
            expected, actual = (
                arm(ids[:, :2], attention_mask=mask, **cache_kwargs(before)).logits
                for arm, before in zip((plain, model), read)
            )
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_absorbing_leaves_other_attention_unchanged(tiny):
    model = mla_absorption.absorb(tiny("qwen3-4b-instruct-2507"))
    assert not mla_absorption.is_absorbed(model)


def test_the_cheaper_path_follows_from_counts(tiny):
    module = anatomy(tiny("glm-4.7-flash")).blocks[0].attention.module
    module.kv_lora_rank, module.qk_nope_head_dim, module.v_head_dim = 512, 192, 256
    assert mla_absorption.most_tokens(module) == 512 * 448 // (1024 - 448)


def test_shifting_a_key_equals_rotating_it_at_the_new_position(tiny, name):
    decoder = anatomy(tiny(name)).decoder
    hidden = torch.zeros(1, 1, 4)
    shape = (4, 1, 1) if name == "qwen3-vl-2b" else (1, 1)
    raw = torch.randn(1, 1, 1, 2 * len(decoder.rotary_emb.inv_freq))

    def rotated(position: int) -> torch.Tensor:
        at = torch.full(shape, position)
        cos, sin = decoder.rotary_emb(hidden, at[:3] if name == "qwen3-vl-2b" else at)
        first, second = raw.chunk(2, dim=-1)
        return raw * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    turned = sink_window.turn(rotated(90), -37, decoder.rotary_emb.inv_freq)
    torch.testing.assert_close(turned, rotated(53), **CLOSE)


def test_a_window_that_holds_everything_changes_nothing(tiny, name):
    model, ids = tiny(name), ids_of(30)
    cache = sink_window.windowed_cache(model, sinks=2, window=100)
    expected = list(chunked.tokens(model, ids, 8))
    actual = list(chunked.tokens(model, ids, 8, cache=cache))
    assert torch.equal(torch.stack(actual), torch.stack(expected))


def _assert_window_is_a_short_text(model):
    """Cut `model` to its first block, and compare window and short text."""
    ids = ids_of(50)
    decoder = anatomy(model).decoder
    decoder.layers = decoder.layers[:1]
    decoder.config.num_hidden_layers = 1
    cache = sink_window.windowed_cache(model, sinks=3, window=10)
    for at in range(50):
        actual = model(ids[:, at : at + 1], use_cache=True, **cache_names.as_kwargs(cache)).logits[:, -1]
    short = torch.cat([ids[:, :3], ids[:, 39:]], dim=1)  # ten before the last token, and that token
    torch.testing.assert_close(actual, model(short).logits[:, -1], atol=1e-4, rtol=1e-3)
    assert cache.layers[0].keys.shape[-2] == 13 and cache.layers[0].forgotten == 37


def test_one_block_sees_exactly_sinks_and_window(tiny, name):
    """In a one-block model, continuing with a window equals reading sinks and window as one short text."""
    _assert_window_is_a_short_text(tiny(name))


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 128}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}),
        ("cohere", {}),
        ("ernie4_5", {}),
        ("cohere2", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 128}),
        ("exaone4", {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 128}),
        ("llama", {}),
    ],
)
def test_a_window_shifts_keys_by_their_own_block_s_frequencies(architecture, own):
    """As above, if block kinds rotate differently, neighbors rotate together, or a block does not rotate at all."""
    _assert_window_is_a_short_text(build(architecture, **own))


def test_keys_with_unknown_rotation_are_refused(monkeypatch):
    model = build("llama")
    file = sys.modules[type(model.model.layers[0].self_attn).__module__]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda query, key, cos, sin: (query, key.flip(-1)))
    with pytest.raises(NotApplicable, match="LlamaAttention rotates its keys in an unknown way"):
        sink_window.windowed_cache(model, sinks=2, window=8)


def test_only_the_rotated_part_of_a_key_is_shifted():
    key, frequency = torch.randn(2, 3, 5, 12), torch.tensor([1.0, 0.1])
    turned = sink_window.turn(key, -7, frequency)
    assert torch.equal(turned[..., 4:], key[..., 4:])
    torch.testing.assert_close(turned[..., :4], sink_window.turn(key[..., :4], -7, frequency), atol=0, rtol=0)


def test_the_window_has_constant_size(tiny, name):
    model = chunked.chunk_prefill(tiny(name), 16)
    cache = sink_window.windowed_cache(model, sinks=4, window=32, slack=8)
    sizes = []
    for _ in chunked.tokens(model, ids_of(300), 250, cache=cache):  # longer than the model's 512 positions
        sizes.append(cache.layers[-1].keys.shape[-2])
    assert max(sizes) <= 4 + 32 + 8 and min(sizes) >= 4 + 32
    assert cache.layers[0].forgotten + cache.get_seq_length() == 300 + 249


def test_tokens_are_streamed_and_the_reader_may_stop(tiny, name):
    model, ids, passes = tiny(name), ids_of(12), []
    model.register_forward_hook(lambda *_: passes.append(1))
    stream = chunked.tokens(model, ids, 100)
    first = next(stream)
    assert len(passes) == 1 and first.shape == (2,)
    next(stream)
    stream.close()
    assert len(passes) == 2


def test_a_context_longer_than_the_model_is_refused(tiny, name):
    model = chunked.chunk_prefill(tiny(name), 64)
    with pytest.raises(UserError, match="513 tokens is longer than this model's 512 positions"):
        model(ids_of(513))
    with pytest.raises(UserError, match="longer than"):
        list(chunked.tokens(model, ids_of(510), 8))


def test_a_text_longer_than_the_context_is_read_through_a_window(tiny, name):
    model = chunked.chunk_prefill(tiny(name), 8)
    cache = sink_window.windowed_cache(model, sinks=4, window=32, slack=8)
    assert chunked.losses(model, ids_of(600), rows=64, cache=cache).isfinite().all()
    whole = sink_window.whole_cache()
    with pytest.raises(UserError, match="a context of 600 tokens is longer than this model's 512 positions"):
        chunked.losses(model, ids_of(600), rows=64, cache=whole)
    assert whole.get_seq_length() == 0, "none of it is read"


@pytest.mark.parametrize("wrong", [{"sinks": -1}, {"window": 0}, {"slack": 0}, {"window": 4096}])
def test_invalid_windows_are_refused(tiny, wrong):
    with pytest.raises(UserError, match="window: "):
        sink_window.windowed_cache(tiny("qwen3-4b-instruct-2507"), **wrong)


def test_invalid_chunks_are_refused(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    with pytest.raises(UserError, match="prefill_chunk 0"):
        chunked.chunk_prefill(model, 0)
    with pytest.raises(UserError, match="logit_rows 0"):
        chunked.losses(model, ids_of(8), rows=0)
