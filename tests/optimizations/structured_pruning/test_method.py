"""Pruned shapes against dense masks: removing a part must equal silencing it. Then shares, saliency and saving."""

import copy
import dataclasses
import re

import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.models.calibration.distillation import divergence
from lib.models.checkpoints import io
from lib.models.structure import surgery
from lib.models.structure.anatomy import anatomy
from lib.models.structure.surgery import synchronise
from lib.optimizations.structured_pruning import depth
from lib.optimizations.structured_pruning import method as pruning


def close(weights: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(weights, expected, atol=2e-5, rtol=1e-4)


def test_removed_channels_equal_silenced_channels(tiny, name, batch):
    masked, pruned = tiny(name), tiny(name)
    for block, other in zip(anatomy(masked).blocks, anatomy(pruned).blocks):
        if block.feed_forward.dense is not None:
            kept = torch.arange(0, block.feed_forward.channels, 2)
            block.feed_forward.down.weight[:, 1::2] = 0
            surgery.keep_channels(other, kept)
        if experts := block.feed_forward.experts:
            kept_EJ = torch.stack([torch.randperm(32)[:8].sort().values for _ in range(experts.count)])
            mask = torch.zeros(experts.count, 32).scatter_(1, kept_EJ, 1.0)
            experts.down.mul_(mask[:, None, :])
            surgery.keep_expert_channels(other.feed_forward.experts, kept_EJ)
    assert close(synchronise(pruned)(**batch).logits, masked(**batch).logits)


def test_removed_groups_equal_silenced_groups(tiny, name, batch):
    masked, pruned = tiny(name), tiny(name)
    for block, other in zip(anatomy(masked).blocks, anatomy(pruned).blocks):
        attention = block.attention
        output = attention.output.weight.view(attention.output.out_features, attention.key_value_heads, -1)
        output[:, [0, 2]] = 0
        surgery.keep_groups(other.attention, torch.tensor([1, 3]))
    synchronise(pruned)
    assert anatomy(pruned).blocks[0].attention.heads == anatomy(masked).blocks[0].attention.heads // 2
    assert close(pruned(**batch).logits, masked(**batch).logits)


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3-coder-30b"])
def test_removed_experts_equal_experts_never_chosen(tiny, name, batch):
    masked, pruned = tiny(name), tiny(name)
    removed, kept = [1, 4, 6], torch.tensor([0, 2, 3, 5, 7])
    for block, other in zip(anatomy(masked).blocks, anatomy(pruned).blocks):
        if experts := block.feed_forward.experts:
            _never_choose(experts.router, removed)
            surgery.keep_experts(other.feed_forward.experts, kept)
    assert close(synchronise(pruned)(**batch).logits, masked(**batch).logits)


def _never_choose(router, removed):
    """Route as if the experts `removed` did not exist, with the full-size router: their score is minus infinity."""
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[removed] = -1e9
        return
    router_weight = router.weight

    def forward(hidden):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router_weight.T
        logits[:, removed] = float("-inf")
        weight, index = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        return logits, weight / weight.sum(-1, keepdim=True), index

    router.forward = forward


def test_removed_blocks_equal_skipped_blocks(tiny, name, batch):
    whole, pruned = tiny(name), tiny(name)
    depth.remove_blocks(pruned, [2])
    synchronise(pruned)
    skipped = anatomy(whole).decoder.layers[2]
    skipped.forward = lambda hidden_states, **kwargs: hidden_states
    assert close(pruned(**batch).logits, whole(**batch).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(pruned.generate(**batch, **greedy), whole.generate(**batch, **greedy))


@pytest.mark.parametrize("granularity", ["auto", *pruning.GRANULARITIES])
def test_shapes_config_and_saved_model_agree_and_the_caller_is_unchanged(tiny, name, batch, tmp_path, granularity):
    model = tiny(name)
    if granularity == "experts" and not any(block.feed_forward.experts for block in anatomy(model).blocks):
        with pytest.raises(UserError, match="no experts"):
            pruning.apply(model, [batch], ratio=0.2, granularity=granularity)
        return
    before, size = io.weights_hash(model), pruning.decoder_parameters(model)
    view = anatomy(model)
    one_group = pruning._removable(view, "heads") / size / view.blocks[0].attention.key_value_heads
    ratio = {"depth": 0.25, "heads": one_group}.get(granularity, 0.2)
    pruned = pruning.apply(model, [batch], ratio=ratio, granularity=granularity)
    assert io.weights_hash(model) == before, "the caller's model is left alone"
    step = 1 / len(anatomy(model).blocks) if granularity == "depth" else 0.06
    assert abs(1 - pruning.decoder_parameters(pruned) / size - ratio) < step, "as near as whole parts come"
    expected = pruned(**batch).logits
    own = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert torch.equal(own(**batch).logits, expected)
    view = anatomy(own)
    assert view.config.num_hidden_layers == len(view.blocks)
    assert view.config.num_attention_heads == view.blocks[0].attention.heads
    (tmp_path / "workbench.json").unlink()
    assert torch.equal(io.load_folder(tmp_path, torch.float32)(**batch).logits, expected), "transformers' own loader"


def test_irregular_shapes_survive_saving_and_loading(tiny, name, batch, tmp_path):
    model = tiny(name)
    view = anatomy(model)
    surgery.keep_groups(view.blocks[1].attention, torch.tensor([0, 3]))
    surgery.keep_groups(view.blocks[2].attention, torch.tensor([1, 2, 3]))
    if view.blocks[3].feed_forward.experts:
        surgery.keep_experts(view.blocks[3].feed_forward.experts, torch.arange(5))
    if view.blocks[0].feed_forward.dense is not None:
        surgery.keep_channels(view.blocks[0], torch.arange(24))
    synchronise(model)
    back = io.load_folder(io.save(model, tmp_path), torch.float32)
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_activation_finds_the_planted_idle_parts(tiny, batch):
    """Parts idle on this text, despite large weights, are removed first by activation, not by magnitude."""
    model = tiny("qwen3-4b-instruct-2507")
    idle = torch.arange(0, 16)
    for block in anatomy(model).blocks:
        block.feed_forward.up.weight[idle] = 0  # the channel's activation is zero …
        block.feed_forward.gate.weight[idle] *= 50  # … though its weights are the largest
        block.feed_forward.down.weight[:, idle] *= 10
    expected = model(**batch).logits
    by_activation, by_magnitude = (
        pruning.apply(model, [batch], ratio=0.15, granularity="channels", saliency=saliency)
        for saliency in ("activation", "magnitude")
    )
    assert close(by_activation(**batch).logits, expected)
    assert not close(by_magnitude(**batch).logits, expected)


def _never_reached(model, block: int, expert: int) -> None:
    """Send the tokens of an expert to the next one."""
    router = anatomy(model).blocks[block].feed_forward.experts.router
    plain = type(router).forward

    def forward(hidden):
        logits, weight, index = plain(router, hidden)
        return logits, weight, torch.where(index == expert, (index + 1) % 8, index)

    router.forward = forward


def test_channels_of_an_expert_without_tokens_are_ranked_by_weights(tiny, batch):
    """Planted: two channels of an expert that no token reached are by far the largest."""
    model = tiny("qwen3-coder-30b")
    experts = anatomy(model).blocks[1].feed_forward.experts
    large = torch.tensor([20, 29])
    experts.down[3][:, large] *= 100
    expected = experts.down[3][:, large].clone()
    _never_reached(model, 1, 3)
    statistics = pruning.observe(model, [batch]).blocks[1]
    assert statistics.expert_tokens_E[3] == 0
    scores = pruning.saliency_scores(anatomy(model).blocks[1], statistics)["expert_channels"]
    assert set(scores[3].topk(2).indices.tolist()) == {20, 29} and len(scores[3].unique()) == len(scores[3])
    assert scores[3].max() < scores[torch.arange(8) != 3].mean()
    pruned = pruning.apply(model, [batch], ratio=0.3, granularity="channels", compensate=False)
    kept = anatomy(pruned).blocks[1].feed_forward.experts.down[3]
    assert all((kept == column[:, None]).all(0).any() for column in expected.T)


def test_block_influence_finds_the_planted_idle_block(tiny, batch):
    model = tiny("qwen3-coder-30b")
    idle = anatomy(model).blocks[2]
    idle.attention.output.weight.zero_()
    idle.feed_forward.experts.down.zero_()
    expected = model(**batch).logits
    for criterion in ("influence", "divergence"):
        pruned = pruning.apply(model, [batch], ratio=0.25, granularity="depth", depth_criterion=criterion)
        assert close(pruned(**batch).logits, expected)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507", "glm-4.7-flash"])
def test_block_divergences_hold_only_a_few_logits_at_a_time(tiny, batch, monkeypatch, name):
    """Those of 4,096 tokens and a vocabulary of 150,000 take ten gigabytes; padding does not count."""
    model = tiny(name)
    expected = {}
    for index in range(anatomy(model).fixed_blocks, len(anatomy(model).blocks)):
        expected[index] = float(divergence(depth.without_blocks(model, [index]), model, batch))
    rows, yielded, measure = [], [], depth._divergence
    monkeypatch.setattr(depth, "CHUNK_ELEMENTS", 7 * anatomy(model).vocabulary)
    monkeypatch.setattr(depth, "_divergence", lambda *arms: yielded.append(measure(*arms)) or yielded[-1])
    model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output.shape[:-1].numel()))
    influence = torch.arange(len(anatomy(model).blocks)).float()
    chosen = depth.greedy(model, [batch], 1, influence)
    assert max(rows) <= 7 and sum(rows) >= int(batch["attention_mask"].sum())
    assert yielded == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-6)
    assert chosen == [min(expected, key=expected.get)]


def test_a_block_whose_removal_gives_nan_stays(tiny, batch, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    found = iter([float("nan"), 0.5, 0.25, 0.75])
    monkeypatch.setattr(depth, "_divergence", lambda *_: next(found))
    assert depth.greedy(model, [batch], 1, torch.arange(4).float()) == [2]


def test_vision_blocks_with_deepstack_stay(tiny, batch):
    model = tiny("qwen3-vl-2b")
    first = [id(layer) for layer in anatomy(model).decoder.layers][: anatomy(model).fixed_blocks]
    depth.remove_blocks(model, depth.least(torch.tensor([0.0, 0.0, 1.0, 2.0]), 1, anatomy(model).fixed_blocks))
    assert [id(layer) for layer in anatomy(model).decoder.layers][: len(first)] == first


def test_recovery_lowers_the_divergence(tiny, batch):
    model = tiny("qwen3-coder-30b")
    plain = pruning.apply(model, [batch], ratio=0.3)
    recovered = pruning.apply(model, [batch], ratio=0.3, finetune_steps=20, recovery=[batch] * 4)
    assert divergence(recovered, model, batch) < divergence(plain, model, batch)


def test_random_saliency_is_repeatable_and_follows_the_seed(tiny, batch):
    model = tiny("qwen3-coder-30b")
    first, same, other = (pruning.apply(model, [], ratio=0.3, saliency="random", seed=seed) for seed in (1, 1, 2))
    assert io.weights_hash(first) == io.weights_hash(same) != io.weights_hash(other)


def test_random_scores_are_on_the_device_of_their_block(tiny, name):
    """Indices into device tensors must be on that device too; drawn there, they would differ between devices."""
    here = tiny(name)
    there = tiny(name).to("meta")
    for block, elsewhere in zip(anatomy(here).blocks, anatomy(there).blocks):
        drawn, moved = (pruning.saliency_scores(each, None, "random", 3) for each in (block, elsewhere))
        tensors = {part: score for part, score in moved.items() if torch.is_tensor(score)}
        assert tensors and all(score.is_meta for score in tensors.values())
        assert {part: score.shape for part, score in tensors.items()} == {part: drawn[part].shape for part in tensors}


def test_ratio_zero_changes_nothing(tiny, name, batch):
    model = tiny(name)
    assert io.weights_hash(pruning.apply(model, [batch], ratio=0.0)) == io.weights_hash(model)


def test_bad_requests_are_named(tiny, batch):
    model = tiny("qwen3-coder-30b")
    for ratio in (-0.1, 1.0, 0.95):
        with pytest.raises(UserError, match="out of range"):
            pruning.apply(model, [batch], ratio=ratio)
    with pytest.raises(NotApplicable, match="out of reach by heads; at most"):
        pruning.apply(model, [batch], ratio=0.6, granularity="heads")
    with pytest.raises(UserError, match="expected one of"):
        pruning.apply(model, [batch], granularity="rows")
    with pytest.raises(UserError, match="no token"):
        pruning.apply(model, [], ratio=0.3)
    assert copy.deepcopy(pruning.SEARCH_SPACE)["ratio"]["default"] == 0.3


# --- what stays makes up for what left, and other choices -------------------------------------------------------------


@pytest.mark.parametrize("saliency, sums", [("frequency", "expert_tokens_E"), ("ean", "expert_norm_E")])
def test_the_rarest_or_quietest_expert_goes_first(tiny, batch, saliency, sums):
    model = tiny("qwen3-coder-30b")
    statistics = pruning.observe(model, [batch]).blocks
    pruned = pruning.apply(model, [batch], ratio=0.1, saliency=saliency)
    for whole, part, seen in zip(anatomy(model).blocks, anatomy(pruned).blocks, statistics):
        stays = [
            (part.feed_forward.experts.down == expert).all((1, 2)).any() for expert in whole.feed_forward.experts.down
        ]
        score_E = getattr(seen, sums)
        gone = [expert for expert, kept in enumerate(stays) if not kept]
        assert len(gone) == 1 and score_E[gone[0]] == score_E.min()


def test_a_span_of_idle_neighbors_is_removed_together(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    for block in anatomy(model).blocks[1:3]:
        block.attention.output.weight.zero_()
        block.feed_forward.down.weight.zero_()
    assert depth.span(model, [batch], 2) == [1, 2]
    pruned = pruning.apply(model, [batch], ratio=0.5, granularity="depth", depth_criterion="span")
    assert close(pruned(**batch).logits, model(**batch).logits)


def test_blocks_with_more_outliers_keep_more_channels(tiny, batch, tmp_path):
    """A spread of 8 % in steps of eight of 64 channels: it does not amount to a step at every ratio."""
    model = tiny("qwen3-4b-instruct-2507")
    anatomy(model).blocks[2].feed_forward.down.weight[:, 5] *= 1000
    pruned = pruning.apply(model, [batch], ratio=0.25, granularity="channels", budget="owl")
    widths = [block.feed_forward.channels for block in anatomy(pruned).blocks]
    assert max(widths) == widths[2] > min(widths)
    back = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert torch.equal(back(**batch).logits, pruned(**batch).logits)


def test_frequently_chosen_experts_are_not_outliers(tiny, batch):
    """Planted: equal activations per token, in one block from all experts alike, in another mostly from one."""
    model = tiny("qwen3-coder-30b")
    block = anatomy(model).blocks[1]
    seen = pruning.observe(model, [batch]).blocks[1]
    mean_EI = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    scores = []
    for tokens, factor in (([100] * 8, 1), ([793] + [1] * 7, 1), ([100] * 7 + [0], 1), ([100] * 8, 1000)):
        tokens_E = torch.tensor(tokens, dtype=torch.float32)
        of_channels_EI = mean_EI.clone()
        of_channels_EI[:, 0] *= factor
        sums = {"expert_tokens_E": tokens_E, "expert_channel_activation_EI": of_channels_EI * tokens_E[:, None]}
        sums |= {"expert_contribution_E": tokens_E}
        scores.append(pruning.saliency_scores(block, dataclasses.replace(seen, **sums)))
    shares = dict.fromkeys(pruning.GRANULARITIES, 0.0) | {"channels": 0.3}
    even, skewed, unseen, outlying = (share["channels"] for share in pruning._by_block(scores, shares, "owl"))
    assert even == skewed == unseen > outlying


@pytest.mark.parametrize("saliency", ["activation", "magnitude", "random"])
def test_a_damaged_expert_is_named_and_no_verdict_given(tiny, batch, saliency):
    model = tiny("qwen3-coder-30b")
    anatomy(model).blocks[1].feed_forward.experts.down[4, 0, 0] = float("inf")
    with pytest.raises(UserError, match="block 1, expert 4"):
        pruning.apply(model, [batch], ratio=0.2, saliency=saliency)


def test_groups_of_experts_stay_equal(tiny, batch, tmp_path):
    model = tiny("glm-4.7-flash")
    anatomy(model).config.n_group, anatomy(model).config.topk_group = 2, 1
    for block in anatomy(model).blocks:
        if experts := block.feed_forward.experts:
            experts.router.num_group, experts.router.topk_group = 2, 1
    pruned = pruning.apply(model, [batch], ratio=0.25, granularity="experts")
    counts = {block.feed_forward.experts.count for block in anatomy(pruned).blocks if block.feed_forward.experts}
    assert len(counts) == 1 and counts.pop() % 2 == 0
    whole, part = pruned(**batch).logits[:, :10], pruned(batch["input_ids"][:, :10]).logits
    assert close(whole, part), "a later token changes nothing before it"
    back = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert torch.equal(back(**batch).logits, pruned(**batch).logits)


# --- configurations of other kinds ------------------------------------------------------------------------------------


def other(architecture: str, **config):
    """Return a tiny random model of another architecture."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "vocab_size": 96}
    return io.build(shape | config, architecture)


@pytest.mark.parametrize("architecture, ratio", [("llama", 0.16), ("qwen2", 0.1)])
def test_heads_are_removed_where_the_configuration_names_no_head_size(architecture, ratio, batch, tmp_path):
    model = other(architecture)
    pruned = pruning.apply(model, [batch], ratio=ratio, granularity="heads")
    back = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert anatomy(back).blocks[0].attention.head_dim == 8
    assert torch.equal(back(**batch).logits, pruned(**batch).logits)


def test_a_head_count_that_the_configuration_refuses_is_refused_before_observing(batch):
    model = other("llama")
    with pytest.raises(UserError, match=r"6 heads in place of 8: LlamaConfig refuses it .* not a multiple"):
        pruning.apply(model, [], ratio=0.1, granularity="heads")


def test_blocks_keep_their_attention_kind_when_others_are_removed(batch, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    model = other("qwen3", head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    idle = anatomy(model).blocks[0]
    idle.attention.output.weight.zero_()
    idle.feed_forward.down.weight.zero_()
    expected = model(**batch).logits
    pruned = pruning.apply(model, [batch], ratio=0.25, granularity="depth")
    assert anatomy(pruned).config.layer_types == kinds[1:] and anatomy(model).config.layer_types == kinds
    assert close(pruned(**batch).logits, expected)
    back = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert close(back(**batch).logits, expected)


def test_the_step_between_sparse_blocks_survives_the_removal_of_one(batch, tmp_path):
    options = {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    model = other("qwen3_moe", decoder_sparse_step=2, **options)
    assert [block.feed_forward.kind for block in anatomy(model).blocks] == ["dense", "experts"] * 2
    pruned = pruning.apply(model, [batch], ratio=0.2, granularity="depth")
    back = io.load_folder(io.save(pruned, tmp_path), torch.float32)
    assert torch.equal(back(**batch).logits, pruned(**batch).logits)


@pytest.mark.parametrize("granularity", ["auto", "channels"])
def test_the_reach_named_by_a_refusal_is_within_reach(tiny, name, granularity):
    """0.657 was printed as 0.66, which was refused in the same words; "auto" did not say what it stood for."""
    with pytest.raises(NotApplicable, match=r"out of reach by (channels|experts); at most") as refused:
        pruning.plan(tiny(name), 0.99, granularity)
    pruning.plan(tiny(name), float(re.search(r"at most ([\d.]+)", str(refused.value))[1]), granularity)
