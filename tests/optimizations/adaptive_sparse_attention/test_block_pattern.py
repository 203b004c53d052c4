"""Block-sparse attention against dense masks, the pattern against exact mass and planted blocks, paged reads against
full ones.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lib.models.decoding.attention_inputs import Heads
from lib.optimizations.adaptive_sparse_attention import attended_mass, page_controls
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention.paged_cache import (
    PagedLayer,
    best_pages,
    by_bounds,
    decode,
    decode_latent,
    mass_read,
    page_scores,
)

BLOCK, STRIDE = 16, 4


def _heads(heads=4, groups=2, tokens=128, queries=None, width=8, value_width=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, queries or tokens, width, generator=random)
    key = torch.randn(groups, tokens, width, generator=random)
    return query, key, torch.randn(groups, tokens, value_width, generator=random)


def _dense(query, key, value, pattern_HNM, scaling, block):
    """The slow, obvious reference: full scores with a dense mask."""
    tokens, length, rep = query.shape[1], key.shape[1], query.shape[0] // key.shape[0]
    offset = length - tokens
    mask = pattern_HNM.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :tokens, :length]
    mask = mask & torch.ones(tokens, length, dtype=torch.bool).tril(offset)
    logits = query @ key.repeat_interleave(rep, 0).transpose(1, 2) * scaling
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value.repeat_interleave(rep, 0)


@pytest.mark.parametrize("tokens,queries", [(128, 128), (117, 117), (128, 64), (119, 55)])
@pytest.mark.parametrize("value_width", [8, 5, 12])
def test_attention_to_kept_blocks_equals_a_dense_mask(tokens, queries, value_width):
    query, key, value = _heads(tokens=tokens, queries=queries, value_width=value_width)
    pattern = blocks.choose(blocks.scores(query, key, 0.3, BLOCK, STRIDE), 0.6)
    rows, columns = pattern.shape[1:]
    assert 0 < pattern.sum() < len(pattern) * blocks.causal_blocks(rows, columns).sum()
    expected = _dense(query, key, value, pattern, 0.3, BLOCK)
    torch.testing.assert_close(blocks.attend(query, key, value, pattern, 0.3, BLOCK), expected, atol=2e-6, rtol=1e-5)


def test_flex_attention_matches_the_gather_implementation():
    query, key, value = _heads(tokens=120, queries=120)
    pattern = blocks.choose(blocks.scores(query, key, 0.3, BLOCK, STRIDE), 0.6)
    torch.testing.assert_close(
        blocks.attend_flex(query, key, value, pattern, 0.3, BLOCK),
        blocks.attend(query, key, value, pattern, 0.3, BLOCK),
        atol=2e-6,
        rtol=1e-5,
    )


def test_scores_are_the_causal_softmax_of_anti_diagonal_means(monkeypatch):
    query, key, _ = _heads(heads=2, groups=1, tokens=64, queries=48)
    offset = 16 // STRIDE
    logits = torch.full((2, 12, 16), float("-inf"))
    for row in range(12):
        for column in range(row + offset + 1):
            pairs = [(row * STRIDE + i, column * STRIDE + STRIDE - 1 - i) for i in range(STRIDE)]
            logits[:, row, column] = sum((query[:, q] * key[:, k]).sum(-1) for q, k in pairs) * 0.3 / STRIDE
    expected = logits.softmax(-1).view(2, 3, 4, 4, 4).sum((2, 4)) / 4
    for rows in (1024, 4):  # in one pass, and in chunks
        monkeypatch.setattr(blocks, "SCORED_ROWS", rows)
        shares = blocks.scores(query, key, 0.3, BLOCK, STRIDE)
        torch.testing.assert_close(shares, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))


def test_the_fewest_blocks_that_reach_tau_are_kept():
    share = torch.tensor([[[0.1, 0.05, 0.5, 0.05, 0.3]]])
    rows = [blocks.choose(share, tau)[0, 0].tolist() for tau in (0.3, 0.5, 0.91, 1.0)]
    assert rows[0] == [True, False, False, True, True]
    assert rows[1] == [True, False, True, True, True]
    assert sum(rows[2]) == 4 and all(rows[3])
    assert blocks.choose(share, 1.0, 0.4)[0, 0].tolist() == [True, False, False, True, True]
    assert blocks.choose(share, 1.0, 0.8)[0, 0].tolist() == [True, False, True, True, True]


def test_the_block_before_the_diagonal_is_kept_even_without_mass():
    share = torch.zeros(1, 9, 9)
    share[:, :, 0] = 1.0
    chosen = blocks.choose(share, 0.5)
    for pattern in (chosen, *(blocks.same_budget(chosen, name, share, 1) for name in blocks.PATTERNS[1:])):
        assert pattern[0].diagonal(-1).all() and pattern[0].diagonal().all() and pattern[0, :, 0].all()
        assert int(pattern.sum()) == 1 + 2 + 7 * blocks.ALWAYS


def test_rows_without_a_query_do_not_enter_the_last_blocks_mean():
    """With four queries in the last block, its scores come from these four alone, without the twelve zeros beside
    them.
    """
    query, key, _ = _heads(tokens=BLOCK * 3 + 4, queries=BLOCK * 3 + 4)
    estimate = blocks.scores(query, key, 0.3, BLOCK, 4)
    torch.testing.assert_close(estimate.sum(-1), torch.ones(estimate.shape[:2]))
    grouped = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    whole_key = torch.nn.functional.pad(grouped, (0, 0, 0, BLOCK - 4))
    flipped = whole_key.unflatten(1, (-1, 4)).flip(2).flatten(2)
    logits = torch.einsum("hs,hks->hk", query[:, BLOCK * 3 :].flatten(1), flipped[:, : 3 * BLOCK // 4 + 1])
    share = (logits * (0.3 / 4)).softmax(-1)
    torch.testing.assert_close(estimate[:, 3, 0], share[:, : BLOCK // 4].sum(-1), atol=1e-5, rtol=1e-4)


def test_full_attention_of_the_last_queries_matches_that_of_all_queries():
    query, key, value = _heads(tokens=40, queries=40)
    every = torch.ones(4, 3, 3).bool()
    full = _dense(query, key, value, every, 0.3, BLOCK)
    torch.testing.assert_close(blocks.attend_all(query[:, -7:], key, value, 0.3), full[:, -7:], atol=1e-5, rtol=1e-4)


def test_tau_of_one_keeps_blocks_without_any_mass():
    share = torch.zeros(1, 3, 3)
    share[:, :, 0] = 1.0
    assert torch.equal(blocks.choose(share, 1.0)[0], blocks.causal_blocks(3, 3))


def test_controls_keep_as_many_blocks_in_every_row_and_stay_causal():
    query, key, _ = _heads(tokens=256)
    chosen = blocks.choose(blocks.scores(query, key, 0.3, BLOCK, STRIDE), 0.7)
    exact = blocks.exact_mass(query, key, 0.3, BLOCK)
    controls = {name: blocks.same_budget(chosen, name, exact, 1) for name in blocks.PATTERNS[1:]}
    for control in controls.values():
        assert torch.equal(control.sum(-1), chosen.sum(-1))
        assert not (control & ~blocks.causal_blocks(16, 16)).any()
        assert control[:, :, 0].all() and control.diagonal(dim1=1, dim2=2).all()
    recall = {name: float((exact * control).sum(-1).mean()) for name, control in controls.items()}
    assert recall["oracle"] >= float((exact * chosen).sum(-1).mean()) > recall["random"]
    row = controls["window"][0, 10]
    assert row[10 - int(chosen[0, 10].sum()) + 2 : 11].all()


def test_exact_mass_matches_the_full_probabilities():
    query, key, _ = _heads(tokens=40, queries=40)
    probabilities = _dense(query, key, torch.eye(40).expand(2, -1, -1), torch.ones(4, 3, 3).bool(), 0.3, BLOCK)
    mass = blocks.exact_mass(query, key, 0.3, BLOCK)
    assert torch.allclose(mass[:, 1, 0], probabilities[:, 16:32, :16].sum(-1).mean(1), atol=1e-6)
    assert torch.allclose(mass[:, 2, 2], probabilities[:, 32:, 32:].sum(-1).mean(1), atol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, 3))


def test_exact_mass_of_half_precision_heads_is_not_rounded():
    """Heads that look for one key have logits of several tens, which rounding to half precision shifts by tenths."""
    query, key, _ = (4 * part.bfloat16() for part in _heads(tokens=40, queries=40))
    expected = blocks.exact_mass(query.float(), key.float(), 0.3, BLOCK)
    torch.testing.assert_close(blocks.exact_mass(query, key, 0.3, BLOCK), expected, atol=1e-5, rtol=1e-4)
    layer = PagedLayer(4)
    layer.update(key[None], key[None])
    logits = query.float()[:, -1:] @ key.float().repeat_interleave(2, 0).transpose(1, 2) * 0.3
    read = best_pages(query[None, :, -1].unflatten(1, (2, 2)), layer, 3)
    held = logits.softmax(-1).unflatten(-1, (10, 4)).sum(-1)[:, 0]  # [H, pages]
    expected = held.gather(1, read[0].repeat_interleave(2, 0)).sum(-1) + held[:, 9]
    torch.testing.assert_close(mass_read(query[None, :, -1], layer, 0.3, 3)[0], expected, atol=1e-5, rtol=1e-4)


def test_planted_mass_is_found_and_random_mass_is_not_sparse():
    noise = Heads(0, *_heads(tokens=1024, width=32, value_width=32), 32**-0.5)
    sparse = attended_mass.planted(noise, BLOCK)
    find = attended_mass.Finder(0.95, BLOCK, STRIDE)
    attended = attended_mass.attended(sparse, find(sparse), BLOCK)
    assert attended.recall >= 0.95 and attended.density < 0.4
    assert attended.density_H.std() > 0  # the budget adapts to the head
    spread = attended_mass.attended(noise, find(noise), BLOCK)
    assert spread.density > 0.8 and attended_mass.needed(noise, BLOCK, 0.95) > 0.8


def _cached(page=4, tokens=30, groups=2, width=8, latent=False):
    layer = PagedLayer(page, latent)
    random = torch.Generator().manual_seed(5)
    key, value = torch.randn(1, groups, tokens, width, generator=random), torch.randn(1, groups, tokens, 8)
    for first, last in ((0, 20), (20, 21), (21, tokens)):
        layer.update(key[:, :, first:last], value[:, :, first:last])
    return layer, key, value


def test_the_paged_cache_stores_its_input_and_bounds_each_page():
    layer, key, value = _cached()
    assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)
    query = torch.randn(1, 2, 3, 8)
    bound = page_scores(query, layer.bounds())
    exact = (query @ key[:, :, :28].transpose(-1, -2)).unflatten(-1, (7, 4)).amax(-1)
    assert (bound >= exact - 1e-5).all()
    before = layer.bounds().clone()
    layer.crop(-6)
    assert layer.get_seq_length() == 24
    layer.update(key[:, :, 24:] + 1, value[:, :, 24:])
    assert torch.equal(layer.bounds()[:, :, :6], before[:, :, :6])
    assert not torch.equal(layer.bounds()[:, :, 6], before[:, :, 6])


def test_sums_beyond_the_float16_range_are_still_estimated():
    """Previously sums over a stride were infinite, their shares NaN, and the kept blocks arbitrary."""
    query, key, _ = (128 * part.half() for part in _heads())
    assert not (query @ key.repeat_interleave(2, 0).transpose(1, 2)).isfinite().all()
    expected = blocks.scores(query.float(), key.float(), 1e-4, BLOCK, STRIDE)
    torch.testing.assert_close(blocks.scores(query, key, 1e-4, BLOCK, STRIDE), expected, atol=2e-2, rtol=0)


def test_page_bounds_beyond_the_float16_range_still_rank_pages():
    """Planted: the third and fifth pages have keys three times as large. The first page is always read."""
    random = torch.Generator().manual_seed(0)
    query, key = (200 * torch.randn(1, 2, size, 8, generator=random) for size in (3, 5 * 16 + 1))
    for page in (2, 4):
        key[:, :, 16 * page : 16 * (page + 1)] *= 3
    layer = PagedLayer(16)
    layer.update(key.half(), key.half())
    assert not page_scores(query.half(), layer.bounds()).isfinite().all()
    assert by_bounds(query.half(), layer).isfinite().all()
    assert best_pages(query.half(), layer, 3).tolist() == [[[0, 2, 4]] * 2]


def test_the_paged_cache_survives_reordering_and_growth():
    layer, key, value = _cached()
    layer.batch_repeat_interleave(2)
    layer.update(key[:, :, :1].repeat(2, 1, 1, 1), value[:, :, :1].repeat(2, 1, 1, 1))
    assert torch.equal(layer.keys[1], torch.cat([key[0], key[0, :, :1]], dim=1))
    states = torch.randn(2, 2, 500, 8)
    layer.update(states, states)
    assert torch.equal(layer.keys[:, :, 31:], states) and torch.equal(layer.keys[1, :, :30], key[0])


@pytest.mark.parametrize("pages", [7, 3])
def test_decoding_reads_the_chosen_pages_and_the_rest(pages):
    layer, key, value = _cached()
    query = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    output = decode(query, layer, 0.3, pages)
    share = mass_read(query, layer, 0.3, pages)
    full = scaled_dot_product_attention(query[:, :, None], key, value, scale=0.3, enable_gqa=True)[:, :, 0]
    if pages == 7:
        torch.testing.assert_close(output, full, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(share, torch.ones(1, 6))
    else:
        assert not torch.allclose(output, full, atol=1e-3) and (share < 1).all() and (share > 0).all()


@pytest.mark.parametrize("tokens", [31, 32, 33])
def test_a_new_token_reads_itself_even_where_it_fills_its_page(tokens):
    """Planted: the newest key scores worst for every query, so no ranking would choose its page."""
    random = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 8, generator=random)
    key, value = (torch.randn(1, 2, tokens, 8, generator=random) for _ in range(2))
    key[:, :, (tokens - 1) // 4 * 4 :] = -9.0 * query.unflatten(1, (2, 2)).sum(2)[:, :, None]
    layer = PagedLayer(4)
    layer.update(key, value)
    ranks = [by_bounds, *(page_controls.rank_of("random", seed) for seed in range(20)), page_controls.rank_of("recent")]
    for rank in ranks:
        page_BGN = best_pages(query.unflatten(1, (2, 2)), layer, 3, rank=rank)
        assert page_BGN.shape[-1] == 3 and int(page_BGN.max()) < layer.full_pages == (tokens - 1) // 4
        read = torch.zeros(1, 2, tokens, dtype=torch.bool)
        for group, pages in enumerate(page_BGN[0]):
            for page in pages.tolist():
                read[0, group, page * 4 : page * 4 + 4] = True
        read[..., layer.full_pages * 4 :] = True
        mask = read.repeat_interleave(2, 1)[:, :, None]
        options = {"attn_mask": mask, "scale": 0.1, "enable_gqa": True}
        expected = scaled_dot_product_attention(query[:, :, None], key, value, **options)
        torch.testing.assert_close(decode(query, layer, 0.1, 3, rank=rank), expected[:, :, 0], atol=1e-6, rtol=1e-5)
        full = (query[:, :, None] @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.1).softmax(-1)
        held = (full * mask).sum(-1)[..., 0]
        torch.testing.assert_close(mass_read(query, layer, 0.1, 3, rank=rank), held, atol=1e-6, rtol=1e-5)


def test_left_padding_is_never_read():
    layer, key, value = _cached()
    query = torch.randn(1, 6, 8)
    start = torch.tensor([10])
    expected = scaled_dot_product_attention(
        query[:, :, None], key[:, :, 10:], value[:, :, 10:], scale=0.3, enable_gqa=True
    )[:, :, 0]
    torch.testing.assert_close(decode(query, layer, 0.3, 7, start), expected, atol=1e-6, rtol=1e-5)


def test_latent_decoding_equals_expanding_the_cache():
    layer, latent, rope = _cached(groups=1, latent=True)
    weight = torch.randn(3, 9, 8)  # 3 heads: keys of 4 without rotation, values of 5
    query = torch.randn(1, 3, 4 + 8)
    expanded = torch.einsum("bgcl,hel->bhce", latent, weight)
    key = torch.cat([expanded[..., :4], rope.expand(-1, 3, -1, -1)], dim=-1)
    full = (query[:, :, None] @ key.transpose(-1, -2) * 0.3).softmax(-1) @ expanded[..., 4:]
    for pages in (0, 7):
        torch.testing.assert_close(decode_latent(query, layer, 0.3, pages, weight), full[:, :, 0], atol=1e-4, rtol=1e-4)
    share = mass_read(query, layer, 0.3, 3, weight)
    assert (share > 0).all() and (share < 1).all()
