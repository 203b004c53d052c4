"""The absorbed baseline of latent attention: the same weights and answers, also after any optimization, and models
without latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.models.checkpoints import io
from lib.models.decoding import batch_cache, cache_names, mla_absorption
from lib.models.offload import streamer
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored
from lib.models.structure.replacements import sparse as stored_sparse
from lib.models.structure.replacements.quantized import QuantizedLinear
from lib.models.structure.sharing import sharing
from lib.optimizations.adaptive_sparse_attention import method as sparse
from lib.optimizations.common import absorbed_baseline
from lib.optimizations.common.compression.weight_only import left_dense, weight_only
from lib.optimizations.feedback_mechanisms.speculation import speculative
from lib.optimizations.sparse_neural_networks import method as sparsity
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.tensor_decomposition import method as decomposition

PROMPT = torch.randint(8, 96, (1, 20), generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


@dataclass
class _Loaded:
    model: nn.Module
    original: Callable[[], nn.Module | None] | None = None


def _tokens(model) -> torch.Tensor:
    work = workloads.generate(model, PROMPT, 6)
    work()
    return work.output_BN


def test_the_baseline_decodes_absorbed_with_the_same_weights_and_answers(tiny):
    model = tiny("glm-4.7-flash")
    loaded = absorbed_baseline.of(_Loaded(model))
    assert mla_absorption.is_absorbed(loaded.model) and not mla_absorption.is_absorbed(model)
    assert next(loaded.model.parameters()) is next(model.parameters()), "weights were copied"
    assert torch.equal(_tokens(loaded.model), _tokens(model))
    assert loaded.original() is loaded.model, "it is the unchanged model now"


def test_optimized_baselines_decode_absorbed_as_well(tiny, batch):
    model = absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash"))
    pruned = pruning.apply(model, [batch], ratio=0.2)
    assert mla_absorption.is_absorbed(pruned)
    assert torch.equal(_tokens(pruned), _tokens(mla_absorption.expand(pruned)))


def _grouped_columns(model: nn.Module) -> nn.Module:
    """Return a copy whose expansions keep half of the columns of every group of eight rows."""
    changed = sharing(model)
    weights = {f"{name}.weight": m.weight for name, m in changed.named_modules() if name.endswith("kv_b_proj")}
    kept_OI = (torch.arange(8)[None] + torch.arange(8)[:, None].repeat_interleave(8, 0)) % 2 == 0
    return stored_sparse.store(
        changed, {name: stored_sparse.compress(weight.data, kept_OI, "columns", 8) for name, weight in weights.items()}
    )


def _factored_expansion(model: nn.Module) -> nn.Module:
    """Return a copy whose expansions are factored at rank 3."""
    changed = sharing(model)
    for name in [name for name, _ in changed.named_modules() if name.endswith("kv_b_proj")]:
        left, values, right = torch.linalg.svd(changed.get_submodule(name).weight, full_matrices=False)
        factored.factor_linear(changed, name, (left * values)[:, :3], right[:3])
    return changed


def _sparse_factors(model: nn.Module) -> nn.Module:
    """Return a copy whose expansions have factors of which every second element is stored."""
    changed = _factored_expansion(model)
    names = [name for name, _ in changed.named_modules() if name.endswith("kv_b_proj")]
    weights = {f"{name}.{at}.weight": getattr(changed.get_submodule(name), at).weight.data
               for name in names for at in ("inner", "outer")}  # fmt: skip
    kept = {name: (torch.arange(weight.numel()) % 2 == 0).view_as(weight) for name, weight in weights.items()}
    return stored_sparse.store(
        changed, {name: stored_sparse.compress(weight, kept[name]) for name, weight in weights.items()}
    )


CHANGES: dict[str, Callable] = {
    "nothing": lambda model, text: model,
    "experts pruned": lambda model, text: pruning.apply(model, text, ratio=0.2),
    "channels pruned": lambda model, text: pruning.apply(model, text, ratio=0.2, granularity="channels"),
    "heads pruned": lambda model, text: pruning.apply(model, text, ratio=0.05, granularity="heads", compensate=True),
    "blocks pruned": lambda model, text: pruning.apply(model, text, ratio=0.25, granularity="depth"),
    "distilled": lambda model, text: pruning.apply(model, text, ratio=0.2, finetune_steps=1),
    "factored": lambda model, text: decomposition.apply(model, text, compression=0.5, method="plain", budget="uniform"),
    "factored expansion": lambda model, text: _factored_expansion(model),
    "refined factors": lambda model, text: decomposition.apply(model, text, compression=0.5, refine_steps=1),
    "sparse": lambda model, text: sparsity.apply(model, text, method="wanda", sparsity=0.5, parts="all"),
    "grouped columns": lambda model, text: _grouped_columns(model),
    "sparse factors": lambda model, text: _sparse_factors(model),
}


def _int8_throughout(model: nn.Module) -> nn.Module:
    """Return a copy whose expansions are in int8 too."""
    return mla_absorption.absorb(weight_only(mla_absorption.expand(sharing(model)), 8))


PACKED: dict[str, Callable] = {
    "int8": lambda model, text: weight_only(model, 8),
    "int4": lambda model, text: weight_only(model, 4),
    "factors in int8": lambda model, text: _int8_throughout(_factored_expansion(model)),
    "int8 throughout": lambda model, text: _int8_throughout(model),
}


@torch.inference_mode()
def _decoded(model: nn.Module) -> torch.Tensor:
    """Return the logits of a prompt, then of three single tokens and a pair, [T, V]."""
    output, logits = model(PROMPT, use_cache=True), []
    for new in (1, 1, 1, 2):
        logits.append(output.logits[0])
        output = model(PROMPT[:, :new], **cache_names.as_kwargs(cache_names.of(output)), use_cache=True)
    return torch.cat([*logits, output.logits[0]])


@pytest.mark.parametrize("change", [*CHANGES, *PACKED])
def test_optimized_models_give_the_same_answers_absorbed_and_stock(tiny, batch, change):
    """Reference: the stock path, which expands the whole cache in whatever form the matrix is stored."""
    changed = (CHANGES | PACKED)[change](absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash")), [batch])
    stock = mla_absorption.expand(sharing(changed))
    assert mla_absorption.is_absorbed(changed) and not mla_absorption.is_absorbed(stock)
    expected, expanded = _decoded(stock), []
    for block in anatomy(changed).blocks:
        block.attention.module.kv_b_proj.register_forward_hook(lambda _, args, out: expanded.append(out.shape[-2]))
    torch.testing.assert_close(_decoded(changed), expected, **CLOSE)
    assert set(expanded) == {PROMPT.shape[1]}, "only the prompt is expanded"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_yardstick_expands_with_a_dense_matrix_as_engines_do(tiny, batch, bits):
    """Stored in few bits, the matrix would be restored for each token; engines restore it once."""
    stock = tiny("glm-4.7-flash")
    absorbed = absorbed_baseline.absorbed_baseline(stock)
    for calibration in (None, [batch]) if bits == 4 else (None,):
        small = weight_only(absorbed, bits, calibration=calibration)
        for block, before in zip(anatomy(small).blocks, anatomy(absorbed).blocks):
            assert block.attention.module.kv_b_proj.weight is before.attention.module.kv_b_proj.weight
            assert isinstance(block.attention.module.o_proj, QuantizedLinear)
    assert left_dense(absorbed) == left_dense(absorbed, "attention") == len(anatomy(stock).blocks)
    assert left_dense(absorbed, "feed_forward") == left_dense(stock) == 0
    quantized = anatomy(weight_only(stock, bits)).blocks[0].attention.module.kv_b_proj
    assert isinstance(quantized, QuantizedLinear)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_yardstick_of_a_factored_checkpoint_uses_dense_factors(tiny, bits):
    """Previously both factors were restored for each token, and int4 of an odd rank could not be built."""
    absorbed = _factored_expansion(absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash")))
    for block, before in zip(anatomy(weight_only(absorbed, bits)).blocks, anatomy(absorbed).blocks):
        ours, theirs = (each.attention.module.kv_b_proj for each in (block, before))
        assert ours.inner.weight is theirs.inner.weight and ours.outer.weight is theirs.outer.weight
        assert isinstance(block.attention.module.o_proj, QuantizedLinear)
    assert left_dense(absorbed) == 2 * len(anatomy(absorbed).blocks)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "nothing"])
def test_optimized_models_are_saved_as_plain_checkpoints(tiny, batch, change, tmp_path):
    changed = CHANGES[change](absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash")), [batch])
    again = io.load_folder(io.save(changed, tmp_path / "saved"), dtype=torch.float32)
    assert not mla_absorption.is_absorbed(again) and io.weights_hash(again) == io.weights_hash(changed)
    torch.testing.assert_close(_decoded(again), _decoded(changed), **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(again(**batch).logits, changed(**batch).logits, **CLOSE)


@pytest.mark.parametrize("change", ["nothing", "factored expansion", "experts pruned"])
def test_formulas_count_decoding_as_executed(tiny, batch, change):
    changed = CHANGES[change](absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash")), [batch])
    stock = mla_absorption.expand(sharing(changed))
    for model, absorbed in ((changed, True), (stock, False)):
        assert cost_model.decode_flops(model, 100) == cost_model.decode_flops(model, 100, absorbed=absorbed)
        work = workloads.decode(model, PROMPT, 2)
        assert cost_model.of(model, work) == cost_model.of(model, work, absorbed=absorbed)
    assert cost_model.decode_flops(changed, 100) < cost_model.decode_flops(stock, 100)


def test_factors_are_absorbed_one_after_the_other(tiny, batch):
    """By hand: 2·K·R for every head on both sides instead of once, and no expansion."""
    model = CHANGES["factored expansion"](absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash")), [batch])
    views = [block.attention for block in anatomy(model).blocks]
    inner = [view.module.kv_b_proj.inner.weight.numel() for view in views]
    attended = sum(2 * view.heads * (2 * view.latent_dim + view.rope_dim) * 50 for view in views)
    again = sum(2 * numbers * (2 * view.heads - 1) for numbers, view in zip(inner, views))
    assert cost_model.decode_flops(model, 50) == 2 * cost_model.active_parameters(model) + attended + again


def test_joining_and_leaving_rows_get_the_answers_of_stock_decoding(tiny):
    model = tiny("glm-4.7-flash")
    answered = []
    for arm in (model, absorbed_baseline.absorbed_baseline(model)):
        rows = batch_cache.prefill(arm, [PROMPT[0, :14], PROMPT[0, 3:]])
        tokens = [batch_cache.step(arm, rows).clone() for _ in range(2)]
        rows = batch_cache.join(
            rows, batch_cache.read_on(arm, batch_cache.prefill(arm, [PROMPT[0, :6]]), PROMPT[0, 6:9])
        )
        tokens.append(batch_cache.step(arm, rows).clone())
        rows = batch_cache.keep(rows, [0, 2])
        tokens += [batch_cache.step(arm, rows).clone() for _ in range(2)]
        answered.append(torch.cat(tokens))
    assert torch.equal(*answered)


def test_drafted_answers_match_the_greedy_ones(tiny, batch):
    model = absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash"))
    draft = pruning.apply(model, [batch], ratio=0.25, granularity="depth")
    plain, _ = speculative.generate(model, draft, PROMPT[0], 12, lambda rounds: 0)
    drafted, rounds = speculative.generate(model, draft, PROMPT[0], 12, lambda rounds: 3)
    assert torch.equal(plain, drafted) and sum(drafting.drafted for drafting in rounds) > 0


def test_streamed_weights_are_absorbed_in_place(tiny, tmp_path):
    model = tiny("glm-4.7-flash")
    streamed = streamer.open_streamed(io.save(model, tmp_path / "model"), memory_ratio=0.7)
    loaded = absorbed_baseline.of(_Loaded(streamed))
    assert loaded.model is streamed and mla_absorption.is_absorbed(streamed)
    torch.testing.assert_close(_decoded(streamed), _decoded(model), **CLOSE)
    streamer.streamer(streamed).close()


def test_sparse_attention_keeps_its_own_decoding_in_either_order(tiny):
    """Pages are already read in the latent space: absorbing before or after must not bypass them."""
    model = tiny("glm-4.7-flash")
    options = {"block_size": 16, "stride": 4, "page_size": 4, "pages": 1, "dense_blocks": 0, "tau": 1.0}
    before = sparse.apply(absorbed_baseline.absorbed_baseline(model), **options)
    after = mla_absorption.absorb(sparse.apply(model, **options))
    assert torch.equal(_tokens(before), _tokens(after)) and not mla_absorption.is_absorbed(after)
    assert sparse.density(before)["tokens"] < 0.5
    assert mla_absorption.is_absorbed(sparse.revert(before)) and not mla_absorption.is_absorbed(sparse.revert(after))


@pytest.mark.parametrize("plain", ["qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"])
def test_models_without_latents_have_nothing_to_absorb(tiny, plain):
    loaded = _Loaded(tiny(plain))
    assert absorbed_baseline.of(loaded) is loaded
    assert absorbed_baseline.absorbed_baseline(loaded.model) is loaded.model
