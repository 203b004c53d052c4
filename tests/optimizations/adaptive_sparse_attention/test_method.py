"""Adaptive sparse attention on tiny models: equal to full attention where all is kept; causality; padding; invalid
input.
"""

import re

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lib.errors import NotApplicable, UserError
from lib.models.checkpoints import io
from lib.models.decoding import batch_cache, cache_names
from lib.models.decoding.attention_inputs import watch
from lib.models.structure import slice_depth
from lib.models.structure.replacements import no_op
from lib.optimizations.adaptive_sparse_attention import method as sparse

SMALL = {"block_size": 16, "stride": 4, "page_size": 4, "full_last": 0, "dense_blocks": 0}
PAD = 21


@pytest.fixture
def prompts():
    """Return two sequences of 90 tokens; the second is padded on the left by PAD."""
    ids = torch.randint(8, 96, (2, 90), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _real(logits, mask):
    return logits[mask.bool()]


def _steps(model, prompts, count=3):
    """Return logits of the prompt's real tokens, then of `count` forced tokens."""
    out, mask = model(**prompts, use_cache=True), prompts["attention_mask"]
    logits = [_real(out.logits, mask)]
    for token in range(10, 10 + count):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        ids = torch.full((2, 1), token)
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, **cache_names.as_kwargs(cache_names.of(out)))
        logits.append(out.logits[:, -1])
    return torch.cat(logits)


@torch.inference_mode()
def test_keeping_everything_equals_full_attention_in_padded_batches_and_decoding(tiny, name, prompts):
    model = tiny(name)
    whole = sparse.apply(model, tau=1.0, pages=1000, **SMALL)
    torch.testing.assert_close(_steps(whole, prompts), _steps(model, prompts), atol=2e-5, rtol=1e-4)
    assert sparse.density(whole) == {"blocks": 1.0, "tokens": 1.0}


@torch.inference_mode()
def test_the_question_reads_everything_and_is_counted(tiny, prompts):
    model = tiny("qwen3-4b-instruct-2507")
    bare, reading = (sparse.apply(model, tau=0.3, **SMALL | {"full_last": last}) for last in (0, 5))
    answers = [arm(input_ids=prompts["input_ids"]).logits for arm in (bare, reading)]
    torch.testing.assert_close(answers[0][:, :85], answers[1][:, :85], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(answers[0][:, 85:], answers[1][:, 85:], atol=1e-3)
    assert sparse.density(bare)["blocks"] < sparse.density(reading)["blocks"]


@torch.inference_mode()
def test_the_question_length_excludes_padding(tiny, prompts):
    """In a right-padded sequence the question is the sequence's own last tokens, as if it were alone."""
    model = sparse.apply(tiny("qwen3-4b-instruct-2507"), tau=0.3, **SMALL | {"full_last": 6})
    ids = prompts["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    together = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[1:, :70]).logits
    torch.testing.assert_close(together[1, :70], alone[0], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_first_blocks_read_all_pages(tiny, prompts):
    model = sparse.apply(tiny("qwen3-4b-instruct-2507"), tau=1.0, pages=5, **SMALL | {"dense_blocks": 3})
    _steps(model, {**prompts, "attention_mask": torch.ones_like(prompts["attention_mask"])})
    read = [state.read_tokens / state.cached_tokens for state in sparse.sparsities(model)]
    assert read[:3] == [1.0, 1.0, 1.0] and read[3] < 0.5
    assert slice_depth.alone(model) == {0, 1, 2}, "of a slice they stand for no others"
    assert not slice_depth.alone(sparse.apply(model, tau=1.0, pages=0, **SMALL | {"dense_blocks": 3}))
    assert not slice_depth.alone(sparse.revert(model))


@torch.inference_mode()
def test_pages_chosen_by_other_rules_are_equal_in_number(tiny, name, prompts):
    plain = {**prompts, "attention_mask": torch.ones_like(prompts["attention_mask"])}
    answers, read = [], []
    for choice in sparse.SEARCH_SPACE["page_choice"]["choices"]:
        arm = sparse.apply(tiny(name), tau=1.0, pages=5, page_choice=choice, **SMALL)
        answers.append(_steps(arm, plain)[-6:])
        read.append(sparse.density(arm)["tokens"])
    assert len(set(read)) == 1
    assert all(not torch.equal(answers[0], answer) for answer in answers[1:])


@torch.inference_mode()
def test_later_tokens_and_padding_change_nothing(tiny, name, prompts):
    model = sparse.apply(tiny(name), tau=0.5, **SMALL)
    before = model(**prompts).logits
    assert 0 < sparse.density(model)["blocks"] < 0.9
    changed = {**prompts, "input_ids": prompts["input_ids"].clone()}
    changed["input_ids"][:, 70:] = 11
    changed["input_ids"][1, :PAD] = 12
    after = model(**changed).logits
    # The pattern of a query block is computed from the whole block: its last tokens may change it.
    torch.testing.assert_close(after[0, :64], before[0, :64], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after[1, PAD : PAD + 48], before[1, PAD : PAD + 48], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after[0, 70:], before[0, 70:], atol=1e-3)
    alone = model(input_ids=prompts["input_ids"][1:, PAD:]).logits
    torch.testing.assert_close(before[1, PAD:], alone[0], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_fewer_pages_are_read_and_named(tiny, name, prompts):
    model = tiny(name)
    few = sparse.apply(model, tau=1.0, pages=5, **SMALL)
    shares = []
    for state in sparse.sparsities(few):
        state.watch = lambda index, share_BH: shares.append(share_BH)
    plain = {**prompts, "attention_mask": torch.ones_like(prompts["attention_mask"])}
    logits, full = _steps(few, plain), _steps(model, plain)
    assert not torch.allclose(logits[-6:], full[-6:], atol=1e-3)
    assert 0.2 < sparse.density(few)["tokens"] < 0.35
    share = torch.stack(shares)
    assert (share > 0).all() and (share <= 1 + 1e-5).all() and share.mean() < 0.99


@torch.inference_mode()
def test_the_callers_model_is_unchanged_and_revert_is_exact(tiny, name, prompts):
    model = tiny(name)
    before, weights = model(**prompts).logits, io.weights_hash(model)
    applied = sparse.apply(sparse.apply(model, tau=0.5, **SMALL), tau=0.4, **SMALL)
    assert not torch.equal(applied(**prompts).logits, before)
    assert torch.equal(model(**prompts).logits, before) and not sparse.is_sparse(model)
    assert next(applied.parameters()).data_ptr() == next(model.parameters()).data_ptr()
    back = sparse.revert(applied)
    assert torch.equal(back(**prompts).logits, before) and io.weights_hash(back) == weights
    assert not sparse.is_sparse(back) and sparse.is_sparse(applied)


def test_both_functions_are_registered():
    assert sparse.NAME in ALL_MASK_ATTENTION_FUNCTIONS


@torch.inference_mode()
def test_chunked_prompts_and_padding_in_the_middle_stay_correct(tiny, name, prompts):
    model = tiny(name)
    sparse_model, ids = sparse.apply(model, tau=1.0, pages=3, **SMALL), prompts["input_ids"]
    for edge in (48, 50):  # on a block boundary, and off it
        whole, cache = model(input_ids=ids).logits, None
        for part in (ids[:, :edge], ids[:, edge:]):
            out = sparse_model(input_ids=part, use_cache=True, **cache_names.as_kwargs(cache))
            cache = cache_names.of(out)
        torch.testing.assert_close(out.logits, whole[:, edge:], atol=2e-5, rtol=1e-4)
    holes = torch.ones_like(ids)
    holes[0, 30:40] = 0
    both = [_steps(arm, {"input_ids": ids, "attention_mask": holes}, 2) for arm in (sparse_model, model)]
    torch.testing.assert_close(*both, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_patterns_have_equal_budgets(tiny, prompts):
    model, counts, answers = tiny("qwen3-4b-instruct-2507"), [], []
    for pattern in sparse.SEARCH_SPACE["pattern"]["choices"]:
        arm = sparse.apply(model, tau=0.5, pattern=pattern, **SMALL)
        answers.append(arm(input_ids=prompts["input_ids"].repeat(1, 2)).logits)  # twelve blocks to choose from
        counts.append(sparse.sparsities(arm)[0].kept)
    assert len(set(counts)) == 1
    assert all(not torch.equal(answers[0], answer) for answer in answers[1:])


@torch.inference_mode()
def test_watched_heads_match_the_inputs_of_attention(tiny, name, prompts):
    model = tiny(name)
    watched = watch(model, prompts["input_ids"][:1], {1, 2})
    assert [heads.index for heads in watched] == [1, 2]
    view = sparse.anatomy(model).blocks[1].attention
    assert watched[0].query_HTD.shape == (view.heads, 90, view.head_dim)
    assert watched[0].value_GTV.shape == (view.key_value_heads, 90, view.value_dim)
    assert torch.equal(watched[0].first(40).key_GTD, watched[0].key_GTD[:, :40])


@pytest.mark.parametrize(
    "knobs, says",
    [
        ({"tau": 0.0}, "tau 0.0 is out of range; expected 0 < tau <= 1"),
        ({"tau": 1.5}, "tau 1.5 is out of range"),
        ({"max_density": 0}, "max_density 0 is out of range"),
        ({"block_size": 100, "stride": 16}, "stride 16 does not divide block_size 100"),
        ({"block_size": 8}, "block_size 8 is out of range; expected 16 to 512"),
        ({"pages": -1}, "pages -1 is out of range"),
        ({"full_last": -1}, "full_last -1 is out of range; expected 0 (none) or more"),
        ({"dense_blocks": -1}, "dense_blocks -1 is out of range"),
        ({"page_choice": "stars"}, 'page_choice "stars"; expected one of'),
        ({"pattern": "stars"}, 'pattern "stars"; expected one of'),
    ],
)
def test_invalid_knobs_are_named_in_one_line(tiny, knobs, says):
    with pytest.raises(UserError, match="adaptive_sparse_attention: ") as raised:
        sparse.apply(tiny("qwen3-4b-instruct-2507"), **knobs)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@torch.inference_mode()
def test_a_context_beyond_the_model_is_refused(tiny, name):
    model = sparse.apply(tiny(name), **SMALL)
    with pytest.raises(NotApplicable, match="513 tokens is longer than this model allows; expected at most 512"):
        model(input_ids=torch.full((1, 513), 9))


@torch.inference_mode()
def test_truncated_rows_do_not_write_into_their_source(tiny, name):
    """The paged cache appends in place, and in a single row of latents the first columns are already contiguous."""
    model = sparse.apply(tiny(name), tau=1.0, pages=0, **SMALL)
    ids_T = torch.randint(8, 96, (24,), generator=torch.Generator().manual_seed(5))
    rows = batch_cache.prefill(model, [ids_T])
    held = [(layer.keys.clone(), layer.values.clone()) for layer in rows.cache.layers]
    cut = batch_cache.first(rows, 12)
    for _ in range(3):
        batch_cache.step(model, cut)
    for layer, (keys, values) in zip(rows.cache.layers, held):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@torch.inference_mode()
def test_padding_in_the_middle_is_reported_as_nothing_left_out(tiny, name, prompts):
    """Full attention serves such masks, also in the latent space, so nothing may be counted as left out."""
    model = sparse.apply(tiny(name), tau=1.0, pages=3, **SMALL)
    holes = torch.ones_like(prompts["attention_mask"])
    holes[0, 30:40] = 0
    _steps(model, {**prompts, "attention_mask": holes})
    assert sparse.left_out(model) == 0


@torch.inference_mode()
def test_a_block_without_attention_has_no_pages(tiny, name, prompts):
    """It fills no layer of the cache: the following layers belong to the next blocks, with or without latents."""
    model = no_op.remove(tiny(name), 1, "attention")
    whole = sparse.apply(model, tau=1.0, pages=1000, **SMALL)
    torch.testing.assert_close(_steps(whole, prompts), _steps(model, prompts), atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_matrices_can_be_stored_sparse_afterwards(tiny, name, prompts):
    """The latents are then expanded again, because the matrix that multiplies them is no longer one dense piece."""
    from lib.optimizations.sparse_neural_networks import method

    model = tiny(name)
    thinned = [
        method.apply(arm, [{"input_ids": prompts["input_ids"]}], method="magnitude", sparsity=0.5)
        for arm in (model, sparse.apply(model, tau=1.0, pages=1000, **SMALL))
    ]
    torch.testing.assert_close(_steps(thinned[1], prompts), _steps(thinned[0], prompts), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("block_size", "stride"), [(512, 48), (512, 3), (16, 64), (17, 9), (100, 16)])
def test_the_block_size_suggested_for_a_stride_is_accepted(block_size, stride):
    with pytest.raises(UserError, match="does not divide") as refused:
        sparse.check(0.9, block_size, stride, 1.0, 64, 64, 16)
    suggested = int(re.search(r"for example (\d+)", str(refused.value))[1])
    sparse.check(0.9, suggested, stride, 1.0, 64, 64, 16)
