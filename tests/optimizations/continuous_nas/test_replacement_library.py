"""Replacements against slow references: silenced parts, whole divergences, exact swaps back, disk."""

import copy

import pytest
import torch

from lib.errors import UserError
from lib.models.calibration.activations import observe
from lib.models.calibration.distillation import divergence as whole_divergence
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import no_op
from lib.models.structure.surgery import keep_groups, synchronise
from lib.optimizations.continuous_nas import replacement_library
from lib.optimizations.continuous_nas.costs import subblock_costs
from lib.optimizations.continuous_nas.scoring import divergence, probe
from lib.optimizations.structured_pruning.method import saliency_scores
from tests.models import architectures
from tests.models.architectures import build


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=2e-5, rtol=1e-4)


@pytest.fixture
def built(tiny, name, batch):
    """Return a tiny model and its library."""
    model = tiny(name)
    seen = observe(model, [batch])
    return model, replacement_library.build(
        model, [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, seen.blocks)]
    )


def test_an_absent_part_equals_a_silenced_one(tiny, name, batch):
    silenced, lacking = tiny(name), tiny(name)
    block = anatomy(silenced).blocks[1]
    block.attention.output.weight.zero_()
    no_op.remove(lacking, 1, "attention")
    part = anatomy(silenced).blocks[2].feed_forward
    for weight in (part.down.weight if part.dense is not None else None, part.experts.down if part.experts else None):
        if weight is not None:
            weight.zero_()
    no_op.remove(lacking, 2, "feed_forward")
    assert close(lacking(**batch).logits, silenced(**batch).logits)
    prompt = {"input_ids": batch["input_ids"][:1]}
    assert torch.equal(lacking.generate(**prompt, max_new_tokens=6), silenced.generate(**prompt, max_new_tokens=6))


def test_the_first_block_may_lack_attention_too(tiny, name, batch):
    """The cache's first layer is then the second block's; otherwise decoding would start at position zero again."""
    silenced, lacking = tiny(name), tiny(name)
    anatomy(silenced).blocks[0].attention.output.weight.zero_()
    no_op.remove(lacking, 0, "attention")
    prompt = {"input_ids": batch["input_ids"][:1]}
    assert torch.equal(lacking.generate(**prompt, max_new_tokens=6), silenced.generate(**prompt, max_new_tokens=6))
    for index in (1, 2):
        no_op.remove(lacking, index, "attention")
    with pytest.raises(UserError, match="the last attention must stay"):
        no_op.remove(lacking, 3, "attention")


def test_every_option_runs_survives_the_disk_and_reverts_exactly(built, batch, tmp_path):
    model, shelf = built
    expected, before = model(**batch).logits, io.weights_hash(model)
    assert torch.equal(shelf.student(**batch).logits, expected)
    for turn in range(1, max(len(options) for options in shelf.space.values())):
        choice = {slot: options[turn % len(options)] for slot, options in shelf.space.items()}
        logits = replacement_library.swap(shelf, choice)(**batch).logits
        assert not torch.equal(logits, expected)
        own = replacement_library.child(shelf, choice)
        assert close(own(**batch).logits, logits)
        back = io.load_folder(io.save(own, tmp_path / str(turn)), torch.float32)
        assert io.weights_hash(back) == io.weights_hash(own)
        torch.testing.assert_close(back(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(replacement_library.swap(shelf, shelf.whole)(**batch).logits, expected)
    assert io.weights_hash(model) == io.weights_hash(shelf.student) == before


def test_the_student_shares_every_tensor(built):
    model, shelf = built
    assert {id(tensor) for tensor in shelf.student.parameters()} == {id(tensor) for tensor in model.parameters()}


def _storages(modules) -> dict[int, int]:
    """Return the bytes of every storage that holds the modules' tensors, by address."""
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_a_library_adds_the_memory_of_one_model_and_a_finer_one_adds_none(built, batch):
    model, shelf = built
    scores = [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, observe(model, [batch]).blocks)]
    own = _storages([model])
    held = _storages([module for options in shelf.modules.values() for module in options.values()])
    added = sum(size for address, size in held.items() if address not in own)
    assert added <= 1.2 * sum(own.values())
    finer = replacement_library.build(model, scores, replacement_library.UNIFORM, shelf.ordered)
    more = _storages([module for options in finer.modules.values() for module in options.values()])
    assert not set(more) - set(held) - set(own), "the finer library copied something"


def test_a_cut_keeps_the_most_salient_pieces(built, batch):
    """Compared with pruning in place: the same pieces, copied."""
    model, shelf = built
    scores = [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, observe(model, [batch]).blocks)]
    for slot, options in shelf.modules.items():
        index, part = replacement_library.locate(slot)
        if part == "attention" and "groups_50" in options:
            reference = copy.deepcopy(model)
            block = anatomy(reference).blocks[index]
            count = block.attention.key_value_heads // 2
            keep_groups(block.attention, scores[index]["heads"].topk(count).indices.sort().values)
            synchronise(reference)
            cut = replacement_library.swap(shelf, shelf.whole | {slot: "groups_50"})
            assert close(cut(**batch).logits, reference(**batch).logits)
    replacement_library.swap(shelf, shelf.whole)


def test_options_match_their_descriptions(built):
    model, shelf = built
    for slot, options in shelf.modules.items():
        index, part = replacement_library.locate(slot)
        block = anatomy(model).blocks[index]
        if part == "attention":
            halved = anatomy(replacement_library.swap(shelf, shelf.whole | {slot: "groups_50"})).blocks[index].attention
            assert halved.key_value_heads * 2 == block.attention.key_value_heads
            assert halved.heads * 2 == block.attention.heads
        elif block.feed_forward.kind == "dense":
            assert options["channels_50"].down_proj.in_features * 2 == block.feed_forward.channels
        else:
            assert options["experts_75"].experts.down_proj.shape[0] * 4 == block.feed_forward.experts.count * 3
            assert options["top_k_50"].gate.top_k * 2 == block.feed_forward.experts.top_k
    replacement_library.swap(shelf, shelf.whole)


def test_options_that_keep_the_same_pieces_are_merged(built, batch):
    """With few heads, channels or experts per token, shares coincide: one architecture was evaluated as several."""
    model, _ = built
    scores = [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, observe(model, [batch]).blocks)]
    finer = replacement_library.build(model, scores, replacement_library.UNIFORM)
    signatures = {
        slot: [subblock_costs.signature(module) for module in options.values()]
        for slot, options in finer.modules.items()
    }
    assert all(len(set(kept)) == len(kept) for kept in signatures.values()), "one shape under two names"
    assert {options[0] for options in finer.space.values()} == {"whole"}


def test_divergence_from_a_later_block_equals_that_of_the_whole(built, batch):
    model, shelf = built
    pictures = [{"input_ids": batch["input_ids"]}, batch]
    seen = probe(model, pictures)
    assert divergence(shelf.student, seen) < 1e-6
    for slot in list(shelf.modules)[-3:]:
        option = shelf.space[slot][1]
        changed = replacement_library.swap(shelf, shelf.whole | {slot: option})
        later = divergence(changed, seen, replacement_library.locate(slot)[0])
        assert later == pytest.approx(divergence(changed, seen), rel=1e-4, abs=1e-7)
        tokens = [24 * 2, 24 + 15]
        both = sum(
            float(whole_divergence(changed, model, pictured)) * n for pictured, n in zip(pictures, tokens)
        ) / sum(tokens)
        assert later == pytest.approx(both, rel=1e-3, abs=1e-6)
    replacement_library.swap(shelf, shelf.whole)


def test_bad_options_are_named(tiny, batch):
    model = tiny("glm-4.7-flash")
    scores = [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, observe(model, [batch]).blocks)]
    for kind, option in (
        ("dense", "channels_150"),
        ("experts", "channels_50"),
        ("attention", "half"),
        ("dense", "x_y"),
    ):
        with pytest.raises(UserError, match=f'option "{option}" of {kind}; expected one like'):
            replacement_library.build(model, scores, {kind: ("whole", option)})
    with pytest.raises(UserError, match=r'slot "00\.attention" has no option'):
        replacement_library.build(model, scores, {"attention": ()})


def test_other_optimizations_accept_models_with_absent_parts(tiny, name, batch):
    """The remaining parts are pruned as usual; an absent part has nothing to lose."""
    from lib.optimizations.structured_pruning import method as pruning

    model = tiny(name)
    no_op.remove(model, 1, "attention")
    no_op.remove(model, 2, "feed_forward")
    for granularity, ratio in (("channels", 0.1), ("heads", 0.05), ("depth", 0.25)):
        pruned = pruning.apply(model, [batch], ratio=ratio, granularity=granularity)
        assert pruning.decoder_parameters(pruned) < pruning.decoder_parameters(model)
        assert torch.isfinite(pruned(**batch).logits).all()


def _of_other_architecture(name: str):
    """Return a tiny model of another architecture, ids to read, the saliency of its parts, and its library."""
    model, ids = architectures.build(name), architectures.prompt()
    seen = observe(model, [{"input_ids": ids}])
    scores = [saliency_scores(*pair) for pair in zip(anatomy(model).blocks, seen.blocks)]
    return model, ids, scores, replacement_library.build(model, scores)


@pytest.mark.parametrize("architecture", ["olmoe", "gemma3_text", "qwen2_moe"])
def test_every_option_of_other_architectures_runs_and_is_timed(architecture):
    """Norms over all heads are cut with them (OLMoE); where blocks attend in different ways none loses its attention,
    and a part is timed on a cache of its own kind (Gemma 3, with a window shorter than the prompt).
    """
    model, ids, _, shelf = _of_other_architecture(architecture)
    expected = model(ids).logits
    for slot, options in shelf.space.items():
        for option in options[1:]:
            logits = replacement_library.swap(shelf, shelf.whole | {slot: option})(ids).logits
            assert torch.isfinite(logits).all() and not torch.equal(logits, expected), (slot, option)
    assert torch.equal(replacement_library.swap(shelf, shelf.whole)(ids).logits, expected)
    assert any("none" in options for slot, options in shelf.space.items() if slot.endswith("attention")) == (
        architecture != "gemma3_text"
    )
    times = subblock_costs.measure(model, shelf.modules, replacement_library.locate, ids[:1], rounds=1)
    assert {slot: set(options) for slot, options in times.decode.items()} == {
        slot: set(options) for slot, options in shelf.space.items()
    }


@pytest.mark.parametrize("architecture", ["olmoe", "gemma3_text", "qwen2_moe"])
def test_a_skeleton_keeps_only_the_attentions_that_must_stay(architecture):
    """It is the model without its parts, shares every tensor, and leaves the model unchanged."""
    model, ids, *_ = _of_other_architecture(architecture)
    expected, attending = model(ids).logits, replacement_library.must_attend(model)
    bare = replacement_library.skeleton(model)
    kinds = [(block.attention.kind != "none", block.feed_forward.kind) for block in anatomy(bare).blocks]
    assert kinds == [(index in attending, "none") for index in range(len(kinds))]
    assert len(attending) == (len(kinds) if architecture == "gemma3_text" else 1)
    reference = copy.deepcopy(model)
    for index in range(len(kinds)):
        no_op.remove(reference, index, "feed_forward")
        if index not in attending:
            no_op.remove(reference, index, "attention")
    assert torch.equal(bare(ids).logits, reference(ids).logits)
    assert {id(tensor) for tensor in bare.parameters()} <= {id(tensor) for tensor in model.parameters()}
    assert torch.equal(model(ids).logits, expected)


def test_work_outside_the_parts_is_timed_separately(built, batch, monkeypatch):
    """Planted times: every attention takes 3 s, every feed-forward 5 s, the rest of the model 2 s."""
    model, shelf = built

    def planted(works, rounds, seed):
        def seconds(slot, option):
            if slot == subblock_costs.SKELETON:
                return 2.0 + 3.0
            return {"attention": 3.0, "feed_forward": 5.0}[slot[3:]] * (option == "whole")

        return {key: [seconds(*key[:2])] * rounds for key in works}

    monkeypatch.setattr(subblock_costs, "_rounds", planted)
    times = subblock_costs.measure(model, shelf.modules, replacement_library.locate, batch["input_ids"][:1], rounds=2)
    assert times.prefill_rest == times.decode_rest == 2.0


@pytest.mark.parametrize("architecture", ["olmoe", "qwen2"])
def test_a_cut_of_heads_equals_pruning_in_place_on_other_architectures(architecture):
    model, ids, scores, shelf = _of_other_architecture(architecture)
    reference = copy.deepcopy(model)
    for block in anatomy(reference).blocks:
        kept = scores[block.index]["heads"].topk(block.attention.key_value_heads // 2).indices.sort().values
        keep_groups(block.attention, kept)
    synchronise(reference)
    halved = {slot: "groups_50" if slot.endswith("attention") else "whole" for slot in shelf.space}
    assert close(replacement_library.swap(shelf, halved)(ids).logits, reference(ids).logits)


def test_equal_shapes_with_different_windows_are_timed_separately():
    """Otherwise a block with full attention would be credited with the seconds of one with a window."""
    blocks = anatomy(build("gemma3_text")).blocks
    sliding, full, again = (subblock_costs.signature(blocks[at].attention.module) for at in (0, 1, 2))
    assert sliding == again != full
