"""User-supplied architectures equal the original model when changed, saved, loaded, streamed or replayed, or are
refused in one line that says what is supported.
"""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from lib.errors import NotApplicable, UserError
from lib.measure.roofline import cost_model
from lib.models.calibration import blockwise, walk
from lib.models.checkpoints import io, validate
from lib.models.decoding import cache_names
from lib.models.offload import streamer
from lib.models.structure import support, surgery
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import no_op
from lib.models.structure.surgery import synchronise
from lib.optimizations.adaptive_sparse_attention import method as sparse_attention
from lib.optimizations.structured_pruning import depth
from lib.optimizations.structured_pruning import method as pruning
from tests.models import architectures
from tests.models.architectures import MODELS, OTHERS, build

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
EVERY = pytest.mark.parametrize("name", sorted(MODELS))


def _logits(model, ids=None):
    with torch.inference_mode():
        return model(architectures.prompt() if ids is None else ids).logits


def _reloaded(model, folder):
    return io.load_folder(io.save(model, folder / "checkpoint"), dtype=torch.float32)


def _calibration():
    return [{"input_ids": architectures.prompt(seed=seed)} for seed in (5, 6)]


def _without(model, *indices):
    depth.remove_blocks(model, indices)
    return synchronise(model)


@EVERY
def test_the_view_knows_every_matrix_of_a_block(name):
    model = build(name)
    assert support.unsupported(model) is None and name in support.SUPPORTED
    for block in anatomy(model).blocks:
        part = block.feed_forward
        known = {id(parameter) for parameter in block.attention.module.parameters()}
        for linear in (part.gate, part.up, part.down):
            known |= {id(parameter) for parameter in linear.parameters()} if linear is not None else set()
        if part.experts is not None:
            known |= {id(part.experts.gate_up), id(part.experts.down), id(part.experts.router.weight)}
        matrices = [
            (key, parameter)
            for key, parameter in block.module.named_parameters()
            if parameter.ndim > 1 and id(parameter) not in known
        ]
        assert [key for key, _ in matrices if key != "mlp.shared_expert_gate.weight"] == []


@EVERY
def test_a_synchronised_model_is_saved_and_loaded_with_equal_logits(name, tmp_path):
    model = build(name)
    expected = _logits(model)
    assert torch.equal(_logits(synchronise(model)), expected)
    torch.testing.assert_close(_logits(_reloaded(model, tmp_path)), expected, **CLOSE)


@EVERY
@pytest.mark.parametrize("page_cache", ["keep", "copy"])
def test_streamed_weights_give_the_logits_of_the_model(name, page_cache, tmp_path):
    model = build(name)
    folder = io.save(model, tmp_path / "checkpoint")
    streamed = streamer.open_streamed(folder, memory_ratio=0.9, page_cache=page_cache)
    for ids in (architectures.prompt(), architectures.prompt(1, 9, seed=8)):
        torch.testing.assert_close(_logits(streamed, ids), _logits(model, ids), **CLOSE)
    streamer.streamer(streamed).close()


@EVERY
def test_blockwise_replay_reproduces_the_model_outputs(name):
    model, ids = build(name), architectures.prompt()
    (stream,) = blockwise.streams(model, [{"input_ids": ids}], in_float32=False)
    with torch.inference_mode():
        states = stream.inputs[0]
        for block in anatomy(model).blocks:
            states = walk.run(block.module, states, stream.arguments[block.index])
        expected = anatomy(model).decoder(ids).last_hidden_state
        torch.testing.assert_close(anatomy(model).final_norm(states), expected, **CLOSE)


@EVERY
def test_refine_reports_no_error_for_an_unchanged_model(name):
    model = build(name)
    errors = blockwise.refine(copy.deepcopy(model), model, _calibration(), steps=0)
    assert max(max(pair) for pair in errors) < 1e-8


@EVERY
@pytest.mark.parametrize("removed", [(0,), (1,), (0, 3)])
def test_removed_blocks_leave_the_others_unchanged(name, removed, tmp_path):
    model = build(name)
    silenced = copy.deepcopy(model)
    for index in removed:  # bypassed blocks in an otherwise unmodified model
        layer = anatomy(silenced).blocks[index].module
        layer.forward = lambda hidden_states, **_: hidden_states
    expected = _logits(silenced)
    shorter = _without(model, *removed)
    torch.testing.assert_close(_logits(shorter), expected, **CLOSE)
    torch.testing.assert_close(_logits(_reloaded(shorter, tmp_path)), expected, **CLOSE)


@EVERY
def test_decoding_equals_prefill_after_block_removal(name):
    model, ids = _without(build(name), 0), architectures.prompt(1, 20)
    expected, cache = _logits(model, ids), DynamicCache(config=model.config)
    steps = []
    with torch.inference_mode():
        for at in range(ids.shape[1]):
            output = model(ids[:, at : at + 1], use_cache=True, **cache_names.as_kwargs(cache))
            cache = cache_names.of(output)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, **CLOSE)


def test_layer_types_follow_their_blocks():
    model = _without(build("gemma3_text"), 0)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert [block.attention.window for block in anatomy(model).blocks] == [None, 8, None]
    assert _without(model, 1).config.layer_types == ["full_attention", "full_attention"]


def test_attention_removal_is_refused_where_attention_kinds_alternate():
    with pytest.raises(NotApplicable, match="attend differently"):
        no_op.remove(build("gemma2"), 1, "attention")
    no_op.remove(build("qwen2"), 1, "attention")


@EVERY
@pytest.mark.parametrize("granularity", ["heads", "channels", "experts"])
def test_pruned_parts_are_saved_and_loaded_with_equal_logits(name, granularity, tmp_path):
    model = build(name)
    routed = any(block.feed_forward.experts for block in anatomy(model).blocks)
    if granularity == "experts" and not routed:
        pytest.skip("no experts")
    before = _logits(model)
    ratio = 0.2
    if granularity == "heads":  # half of them: some configurations accept only divisors of the hidden size
        linears = [linear for block in anatomy(model).blocks for linear in surgery.head_projections(block.attention)]
        ratio = sum(linear.weight.numel() for linear in linears) / 2 / pruning.decoder_parameters(model)
    pruned = pruning.apply(model, _calibration(), ratio=ratio, granularity=granularity)
    assert pruning.decoder_parameters(pruned) < pruning.decoder_parameters(model)
    assert torch.equal(_logits(model), before), "the caller's model is left alone"
    torch.testing.assert_close(_logits(_reloaded(pruned, tmp_path)), _logits(pruned), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "olmoe", "mixtral"])
def test_any_number_of_heads_is_saved_and_loaded_with_equal_logits(name, tmp_path):
    model = build(name)
    for block in anatomy(model).blocks:
        surgery.keep_groups(block.attention, torch.tensor([0, 2, 3]))
    synchronise(model)
    loaded = _reloaded(model, tmp_path)
    torch.testing.assert_close(_logits(loaded), _logits(model), **CLOSE)
    assert loaded.config.num_attention_heads == model.config.num_attention_heads == 6


def test_no_parameter_requires_gradients_after_head_pruning():
    model = build("qwen2")
    for block in anatomy(model).blocks:
        surgery.keep_groups(block.attention, torch.tensor([0, 2]))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@EVERY
def test_removed_heads_equal_silenced_heads(name):
    """Exception: norms over the full width take their mean over the remaining channels, so they are cut with the
    heads.
    """
    model = build(name)
    kept = torch.tensor([0, 2, 3])
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    for block in anatomy(cut).blocks:
        surgery.keep_groups(block.attention, kept)
    for block in anatomy(silent).blocks:
        attention = block.attention
        if attention.kind == "latent":
            pytest.skip("single heads are cut, the view's own tests hold it")
        columns = attention.output.weight.unflatten(1, (attention.key_value_heads, -1))
        columns[:, 1] = 0
    synchronise(cut)
    if name == "olmoe":
        norms = [block.attention.module.k_norm.weight for block in anatomy(cut).blocks]
        assert {len(norm) for norm in norms} == {3 * 8} and torch.isfinite(_logits(cut)).all()
    else:
        torch.testing.assert_close(_logits(cut), _logits(silent), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gemma2"])
def test_removed_channels_equal_silenced_channels(name):
    model = build(name)
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    kept = torch.arange(anatomy(model).blocks[0].feed_forward.channels)[::2]
    for block, other in zip(anatomy(cut).blocks, anatomy(silent).blocks):
        surgery.keep_channels(block, kept)
        other.feed_forward.down.weight[:, 1::2] = 0
    torch.testing.assert_close(_logits(synchronise(cut)), _logits(silent), **CLOSE)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_expert_groups_stay_equal_and_later_tokens_have_no_effect(ratio):
    model = build("glm4_moe_lite")
    pruned = pruning.apply(model, _calibration(), ratio=ratio, granularity="experts")
    for block in anatomy(pruned).blocks:
        if experts := block.feed_forward.experts:
            assert experts.count % experts.groups == 0 and experts.count // experts.groups >= experts.least_per_group
    ids = architectures.prompt()
    torch.testing.assert_close(_logits(pruned, ids[:, :12]), _logits(pruned, ids)[:, :12], **CLOSE)


def test_unequal_expert_groups_are_refused():
    experts = anatomy(build("glm4_moe_lite")).blocks[1].feed_forward.experts
    with pytest.raises(UserError, match=r"2 groups .* not 4, 2"):
        surgery.keep_experts(experts, torch.tensor([0, 1, 2, 3, 5, 6]))


def test_the_shared_expert_is_found_under_either_name():
    for name in ("qwen2_moe", "glm4_moe_lite"):
        assert anatomy(build(name)).blocks[1].feed_forward.down is not None


@EVERY
@pytest.mark.parametrize("context", [5, 24])
def test_cache_size_matches_the_formula(name, context):
    model = build(name)
    with torch.inference_mode():
        output = model(architectures.prompt(1, context), use_cache=True)
    stored = sum(tensor.nbytes for layer in cache_names.of(output).layers for tensor in (layer.keys, layer.values))
    assert cost_model.kv_cache_bytes(model, context) == stored
    assert cost_model.kv_cache_bytes_per_token(model, context) == stored / context


def test_windows_bound_the_reads_and_compute_of_decoding():
    windowed, full = build("mistral"), build("mistral", sliding_window=None)
    assert cost_model.decode_flops(windowed, 8) == cost_model.decode_flops(full, 8)
    assert cost_model.decode_flops(windowed, 200) == cost_model.decode_flops(windowed, 100)
    assert cost_model.step_bytes(windowed, 1, 200) < cost_model.step_bytes(full, 1, 200)
    assert cost_model.prefill_flops(windowed, 8) == cost_model.prefill_flops(full, 8)
    assert cost_model.prefill_flops(windowed, 200) < cost_model.prefill_flops(full, 200)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_sparse_attention_with_windows_is_reported_as_not_applicable(name):
    assert "sliding window" in sparse_attention.applies_to(build(name))
    with pytest.raises(NotApplicable, match="sliding window"):
        sparse_attention.apply(build(name))


def test_sparse_attention_with_capped_scores_is_reported_as_not_applicable():
    """Neither its kernels nor the stock sdpa behind them support a cap: answers would differ even with every block
    kept.
    """
    model = build("gemma2", layer_types=["full_attention"] * 4, attn_logit_softcapping=0.5)
    assert all(block.attention.window is None for block in anatomy(model).blocks)
    assert "not a plain softmax" in sparse_attention.applies_to(model)
    assert sparse_attention.applies_to(build("qwen2")) is None


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_refusals_of_other_structures_say_in_one_line_what_is_supported(name, tmp_path):
    model = build(name)
    reason = support.unsupported(model)
    assert reason.startswith(f'architecture "{name}" is not supported: ') and "\n" not in reason and "llama" in reason
    model.save_pretrained(tmp_path)
    assert validate.fault(tmp_path) == f"{tmp_path}: {reason}"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("diffllama", r"attention with an unknown weight \(lambda_q1\)"),
        ("doge", r"attention with an unknown weight \(A\)"),
        ("bitnet", r"attention with an unknown weight \(attn_sub_norm.weight\)"),
        ("ernie4_5_moe", r"experts or a router with an unknown tensor \(moe_statics.e_score_correction_bias\)"),
        ("minimax_m2", r"experts or a router with an unknown tensor \(e_score_correction_bias\)"),
        ("deepseek_v2", "latent attention that rotates by none of"),
    ],
)
def test_part_weights_that_no_method_would_cut_are_named(name, part):
    """Each part has every required projection and an additional weight: pruned or replaced, it would be wrong."""
    assert re.search(part, support.unsupported(build(name)))


def test_a_block_matrix_outside_the_known_parts_is_named():
    model = build("llama")
    model.model.layers[1].per_layer_projection = torch.nn.Linear(4, 4)
    assert "block 1: a matrix outside attention" in support.unsupported(model)


def test_experts_with_their_own_gate_are_refused():
    """Stored sparse, quantized or factored, they would compute activation(gate) times up instead of their own
    formula.
    """
    model = build("mixtral")
    for block in anatomy(model).blocks:
        experts = block.feed_forward.experts.module
        experts._apply_gate = lambda both: torch.relu(both.chunk(2, -1)[0]) * (both.chunk(2, -1)[1] + 1)
    assert "experts with an unknown gating function" in support.unsupported(model)


@pytest.mark.parametrize(("name", "own"), [("cohere", {"use_qk_norm": True}), ("stablelm", {})])
def test_head_removal_updates_per_head_norms_and_stored_head_counts(name, own):
    model, kept = build(name, **own), torch.tensor([0, 2, 3])
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    for block, other in zip(anatomy(cut).blocks, anatomy(silent).blocks):
        surgery.keep_groups(block.attention, kept)
        other.attention.output.weight.unflatten(1, (4, -1))[:, 1] = 0
    torch.testing.assert_close(_logits(synchronise(cut)), _logits(silent), **CLOSE)


def test_a_block_listed_as_full_attention_has_no_window():
    """EXAONE 4 gives the modules of all its blocks the same window."""
    model = build("exaone4", **architectures.ALTERNATING)
    assert [block.attention.window for block in anatomy(model).blocks] == [8, None, 8, None]


def test_an_unknown_vision_tower_is_refused(tiny):
    """Gemma 3 with pictures, LLaVA and others have a known text decoder, but no picture task could be run on them."""
    model = tiny("qwen3-vl-2b")
    assert support.unsupported(model) is None
    model.model.vision_tower = model.model._modules.pop("visual")
    assert "no vision tower called visual; supported are" in support.unsupported(model)


@pytest.mark.parametrize(("part", "width"), [("v_proj", 16), ("q_proj", 128), ("o_proj", 48)])
def test_attention_with_unexpected_widths_is_refused(part, width):
    """MiMo's values are narrower than its keys, and Qwen3-Next's queries carry a gate: counted as heads they are
    wrong.
    """
    model = build("qwen2")
    attention = model.model.layers[1].self_attn
    shape = (width, 64) if part == "o_proj" else (64, width)
    setattr(attention, part, torch.nn.Linear(*shape))
    assert "block 1: attention whose values are not as wide as its keys" in support.unsupported(model)


def test_blocks_with_their_own_configurations_are_refused():
    """A single configuration written after a cut would contradict them, and reading it raises in the notebook."""
    model = build("llama")
    model.config.__dict__["_heterogeneity_spec"] = SimpleNamespace(per_layer_attributes=set())
    assert "its blocks have configurations of their own (per_layer_config); supported" in support.unsupported(model)
