"""Walking block by block against the whole model, and the memory held meanwhile: one block's, never the model's."""

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.errors import UserError
from lib.models.calibration.activations import observe
from lib.models.calibration.observed import Observed, nbytes
from lib.models.calibration.second_moments import Moments, matrices
from lib.models.calibration.walk import Walk, finish
from lib.models.decoding import chunked
from lib.models.structure.anatomy import anatomy
from lib.models.structure.sharing import sharing
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.structured_pruning import method as pruning


def alternating(blocks: int = 4):
    """Return a tiny model whose blocks alternate between a window of 8 tokens and the whole text."""
    kinds = ["sliding_attention", "full_attention"] * (blocks // 2)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=96, layer_types=kinds, use_sliding_window=True, sliding_window=8,
        max_window_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_walking_from_any_block_matches_the_model(tiny, name, batch):
    model = tiny(name)
    expected = model(**batch).logits
    walk = Walk(model, [batch])
    for block in walk:
        torch.testing.assert_close(finish(model, walk.carried[0], block.index), expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_chunked_prefill_is_walked_as_a_whole(tiny, name, batch):
    """Pruning after streaming computation raised an IndexError where a chunk was shorter than the text."""
    model = tiny(name)
    expected = model(**batch).logits
    seen = observe(model, [batch])
    chunked.chunk_prefill(model, 8)
    walk = Walk(model, [batch])
    for block in walk:
        torch.testing.assert_close(finish(model, walk.carried[0], block.index), expected, rtol=1e-4, atol=1e-5)
    again = observe(model, [batch])
    assert [block.tokens for block in again.blocks] == [block.tokens for block in seen.blocks]
    assert again.blocks[-1].influence == pytest.approx(seen.blocks[-1].influence, rel=1e-4)
    assert "forward" in anatomy(model).decoder.__dict__, "it reads in chunks as before"


def test_each_block_keeps_its_own_mask():
    model = alternating()
    ids = {"input_ids": torch.randint(8, 96, (2, 24), generator=torch.Generator().manual_seed(3))}
    expected = model(**ids).logits
    walk = Walk(model, [ids])
    for block in walk:
        torch.testing.assert_close(finish(model, walk.carried[0], block.index), expected, rtol=1e-4, atol=1e-5)


def test_picture_features_are_added_where_the_model_adds_them(tiny):
    model = tiny("qwen3-vl-2b")
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[9, 3, *[5] * 4, 4, 10, 11, 12]])
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 5).int()}
    expected = model(**inputs).logits
    walk = Walk(model, [inputs])
    assert walk.carried[0].added, "the vision tower adds features behind the first blocks"
    for block in walk:
        torch.testing.assert_close(finish(model, walk.carried[0], block.index), expected, rtol=1e-4, atol=1e-5)


def test_a_changed_block_gives_its_new_outputs(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    seen = []
    changed = sharing(model)
    walk = Walk(changed, [batch])
    for block in walk:
        seen.append(walk.carried[0].states_BTH.clone())
        if block.index == 1:
            block.feed_forward.down.weight = torch.nn.Parameter(torch.zeros(32, 64), requires_grad=False)
    inputs = []
    for block in anatomy(changed).blocks:
        block.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    changed(**batch, use_cache=False)
    for ours, theirs in zip(seen, inputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert anatomy(model).blocks[1].feed_forward.down.weight.any(), "the model that it shares tensors with is whole"


def _held(objects: list[object]) -> int:
    """Return the bytes of all live moments."""
    return nbytes({str(id(moments)): moments for moments in objects if isinstance(moments, Moments)})


def test_memory_held_does_not_grow_with_depth():
    peaks = {}
    for blocks in (2, 4, 8):
        model, peak, visited = alternating(blocks), 0, 0
        ids = {"input_ids": torch.randint(8, 96, (2, 40), generator=torch.Generator().manual_seed(3))}
        for _, by_name in Observed(model, [ids], room=0):
            visited += 1
            peak = max(peak, _held(gc.get_objects()))
            assert nbytes(by_name) > 0
        assert visited == blocks
        peaks[blocks] = peak
        del model
    assert peaks[8] == peaks[4] <= 2 * peaks[2]


def test_small_moments_are_kept_for_the_next_pass_and_large_ones_recomputed(tiny, batch, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    kept, again = Observed(model, [batch]), Observed(model, [batch], room=0)
    first = {name: sums for _, by_name in kept for name, sums in by_name.items()}
    assert set(first) == {matrix.name for matrix in matrices(model)}
    second = {name: sums for _, by_name in kept for name, sums in by_name.items()}
    assert all(second[name] is sums for name, sums in first.items())
    for _ in range(2):
        third = {name: sums for _, by_name in again for name, sums in by_name.items()}
        assert all(torch.equal(third[name].gram, sums.gram) for name, sums in first.items())
        assert not any(third[name] is sums for name, sums in first.items())


def test_every_block_runs_once_per_pass(tiny, batch):
    model = tiny("qwen3-coder-30b")
    runs = []
    for block in anatomy(model).blocks:
        block.attention.output.register_forward_hook(lambda module, args, output, index=block.index: runs.append(index))
    list(Observed(model, [batch, batch]))
    assert runs == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3-coder-30b"])
def test_a_damaged_expert_is_named(tiny, name, batch):
    model = tiny(name)
    anatomy(model).blocks[2].feed_forward.experts.down[5, 3, 1] = float("nan")
    with pytest.raises(UserError, match=r"block 2, expert 5: mlp\.experts\.down_proj holds numbers that"):
        list(Observed(model, [batch]))


def test_calibration_without_tokens_is_refused(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    for calibration in ([], [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}]):
        with pytest.raises(UserError, match="no token"):
            Walk(model, calibration)


def overflowing(tiny, name: str, block: int, part: str):
    """Return a model in which one linear layer of a block gives infinite numbers, as float16 can."""
    model = tiny(name)
    layer = anatomy(model).blocks[block].module.get_submodule(part)
    layer.register_forward_hook(lambda module, args, output: output * float("inf"))
    return model


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_block_with_non_finite_output_is_named_and_not_used_for_ranking(tiny, batch, method):
    """NaN would be the highest score: its part would be kept, and the rest ranked at random."""
    model = overflowing(tiny, "qwen3-4b-instruct-2507", 1, "mlp.down_proj")
    for use in (lambda: sparse.prune(model, [batch], method=method), lambda: pruning.apply(model, [batch], ratio=0.2)):
        with pytest.raises(UserError, match=r"^block 1: its outputs on the calibration text are not finite") as why:
            use()
        assert "float16" in str(why.value) and "\n" not in str(why.value)


def test_a_non_finite_matrix_in_the_last_block_is_named(tiny, batch):
    model = overflowing(tiny, "qwen3-4b-instruct-2507", 3, "mlp.up_proj")
    with pytest.raises(UserError, match=r"^block 3, model\.layers\.3\.mlp\.down_proj\.weight: its inputs on the"):
        list(Observed(model, [batch]))
    with pytest.raises(UserError, match=r"^block 3: its outputs on the calibration text"):
        observe(model, [batch])


def test_padding_may_give_non_finite_outputs(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    padding = ~batch["attention_mask"].bool()[..., None]
    anatomy(model).blocks[0].module.register_forward_hook(
        lambda module, args, output: output.masked_fill(padding, float("nan"))
    )
    blocks = iter(Walk(model, [batch]))
    assert [next(blocks).index for _ in range(2)] == [0, 1]
