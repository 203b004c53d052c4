"""Rows that join and leave a running batch must compute what each of them would compute alone."""

import copy

import pytest
import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.decoding import batch_cache
from lib.models.structure.replacements import no_op
from tests.models.architectures import build


def _alone(model, ids_T, steps):
    """Return the greedy tokens of one prompt by rereading everything for every token: slow and obvious."""
    ids = ids_T[None]
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(ids_T) :].tolist()


def _prompts(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(8, 96, (length,), generator=generator) for length in lengths]


@torch.inference_mode()
def test_rows_come_and_go_without_changing_each_others_tokens(tiny, name):
    model = tiny(name)
    first, second, third, fourth = prompts = _prompts(12, 5, 17, 9)
    out = {index: [] for index in range(4)}

    def note(running, order):
        for index, token in zip(order, running.token_B.tolist()):
            out[index].append(token)

    running = batch_cache.prefill(model, [first, second])
    note(running, [0, 1])
    batch_cache.step(model, running), note(running, [0, 1])
    late = batch_cache.prefill(model, [third])
    note(late, [2])
    running = batch_cache.join(running, late)
    assert running.length == 17 and len(running) == 3
    batch_cache.step(model, running), note(running, [0, 1, 2])
    running = batch_cache.keep(running, [1, 2])
    late = batch_cache.prefill(model, [fourth])
    note(late, [3])
    running = batch_cache.join(running, late)
    for _ in range(3):
        batch_cache.step(model, running), note(running, [1, 2, 3])
    running = batch_cache.keep(running, [0, 2])
    assert running.length == 9 + 3, "the padding that the long row needed must go with it"
    batch_cache.step(model, running), note(running, [1, 3])
    for index, tokens in out.items():
        assert tokens == _alone(model, prompts[index], len(tokens)), index


@torch.inference_mode()
def test_rows_of_a_model_with_an_attention_free_block(tiny, name):
    """Such a block has no layer in the cache, and the cache's last layer stays empty."""
    model = no_op.remove(copy.deepcopy(tiny(name)), 1, "attention")
    first, second, third = prompts = _prompts(12, 5, 9)
    running = batch_cache.join(batch_cache.prefill(model, [first, second]), batch_cache.prefill(model, [third]))
    tokens = [running.token_B, batch_cache.step(model, running)]
    assert running.bytes == running.length * 3 * cost_model.kv_cache_bytes_per_token(model)
    again = batch_cache.repeat(batch_cache.first(running, running.length), 2)
    running = batch_cache.keep(running, [0, 2])
    tokens.append(batch_cache.step(model, running))
    for row, prompt in ((0, 0), (2, 2)):
        expected = _alone(model, prompts[prompt], 3)
        assert [int(tokens[0][row]), int(tokens[1][row]), int(tokens[2][row // 2])] == expected
    assert len(again) == 6


@torch.inference_mode()
def test_padding_keeps_numbers_finite_and_logits_close(tiny, name):
    model = tiny(name)
    short, long = _prompts(3, 40)
    together, alone = batch_cache.prefill(model, [short, long]), batch_cache.prefill(model, [short])
    for padded, plain in zip(together.cache.layers, alone.cache.layers):
        assert torch.isfinite(padded.keys).all() and torch.isfinite(padded.values).all()
        torch.testing.assert_close(padded.keys[0, :, -3:], plain.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(padded.values[0, :, -3:], plain.values[0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_bytes_match_the_cache_formula(tiny, name):
    model = tiny(name)
    running = batch_cache.prefill(model, _prompts(6, 10))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in running.cache.layers)
    assert running.bytes == 2 * 10 * cost_model.kv_cache_bytes_per_token(model) == held
    many = batch_cache.repeat(running, 3)
    assert len(many) == 6 and many.bytes == 3 * running.bytes
    token_B = batch_cache.step(model, many)
    assert torch.equal(token_B[:2], token_B[2:4]) and running.length == 10 and many.length == 11


@torch.inference_mode()
def test_truncated_rows_continue_as_if_nothing_more_had_been_read(tiny, name):
    model, prompts = tiny(name), _prompts(12, 12)
    long = batch_cache.prefill(model, prompts)
    cut, read = batch_cache.first(long, 8), batch_cache.prefill(model, [prompt_T[:8] for prompt_T in prompts])
    assert long.length == 12 and cut.length == 8 and torch.equal(cut.position_B, read.position_B)
    cut.token_B = read.token_B = torch.stack([prompt_T[8] for prompt_T in prompts])
    assert torch.equal(batch_cache.step(model, cut), batch_cache.step(model, read))
    for cut_layer, read_layer in zip(cut.cache.layers, read.cache.layers):
        torch.testing.assert_close(cut_layer.keys, read_layer.keys, atol=1e-5, rtol=1e-5)
    assert long.length == 12


@torch.inference_mode()
def test_a_picture_row_joins_text_rows(tiny):
    model = tiny("qwen3-vl-2b")
    ids_BT = torch.tensor([[9, 3, 5, 5, 5, 5, 4, 11, 12]])
    pictures = {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))}
    inputs = {"input_ids": ids_BT, "image_grid_thw": torch.tensor([[1, 4, 4]]), **pictures}
    inputs["mm_token_type_ids"] = (ids_BT == 5).int()
    alone = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, ids_BT.shape[1] :]
    (text,) = _prompts(14)
    running = batch_cache.join(batch_cache.prefill(model, [text]), batch_cache.prefill(model, [inputs]))
    tokens = [running.token_B] + [batch_cache.step(model, running) for _ in range(3)]
    assert [int(token[1]) for token in tokens] == alone.tolist()
    assert [int(token[0]) for token in tokens] == _alone(model, text, 4)


def test_invalid_prompts_are_refused(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    with pytest.raises(UserError, match="rows: no prompt"):
        batch_cache.prefill(model, [])
    with pytest.raises(UserError, match="a prompt is empty"):
        batch_cache.prefill(model, [torch.tensor([9]), torch.tensor([], dtype=torch.long)])
    with pytest.raises(UserError, match="processed alone"):
        batch_cache.prefill(model, [{"input_ids": torch.ones(1, 2)}] * 2)


def test_windowed_caches_are_refused(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    assert batch_cache.joinable(model) is None
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert "sliding_attention" in batch_cache.joinable(model)


def test_windows_without_a_list_of_block_kinds_are_refused():
    """Mistral lists no block kinds, yet its cache holds only the window: its rows have other lengths."""
    assert "sliding_attention" in batch_cache.joinable(build("mistral"))
    assert batch_cache.joinable(build("mistral", sliding_window=None)) is None
