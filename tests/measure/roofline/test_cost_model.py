"""Formulas agree with tensors, cache and FLOP counter, and the bound explains why a gain was not realized."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lib.measure.compare import speed
from lib.measure.metrics import measurement
from lib.measure.roofline import ceilings, cost_model, expert_usage
from lib.measure.roofline.ceilings import Ceilings
from lib.measure.roofline.cost_model import Cost
from lib.measure.timing import workloads
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy
from lib.optimizations.adaptive_sparse_attention import method as sparse_attention
from lib.optimizations.common.compression import weight_only
from tests.measure.roofline import counted_flops

MACHINE = Ceilings(1e12, 1e10, "cpu", "float32", 1, "2026-01-01", 2**20)


@torch.no_grad()
def test_matrix_flops_agree_with_the_counter(tiny, name):
    """The counter is right for linear layers (`mm`), not for attention: compare the formula without its attention."""
    model = tiny(name)
    assert cost_model.prefill_flops(model, 16, 2) == counted_flops.prefill(model, 16, 2)


def test_attention_formulas_reduce_to_the_textbook_ones(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    layers, heads, size = 4, 8, 8
    active = cost_model.active_parameters(model)
    assert cost_model.prefill_flops(model, 32) == 2 * active * 32 + 2 * layers * heads * size * 32**2
    assert cost_model.decode_flops(model, 32) == 2 * active + 4 * layers * heads * size * 32


def test_stock_latent_attention_expands_its_cache_at_every_token(tiny):
    model = tiny("glm-4.7-flash")
    expansion = sum(block.attention.module.kv_b_proj.weight.numel() for block in anatomy(model).blocks)
    stock = [cost_model.decode_flops(model, context) for context in (1, 101)]
    attention = sum(
        2 * b.attention.heads * (b.attention.head_dim + b.attention.value_dim) for b in anatomy(model).blocks
    )
    assert stock[1] - stock[0] == 100 * (attention + 2 * expansion)
    absorbed = cost_model.decode_flops(loaded_full("glm-4.7-flash"), 32768, absorbed=True)
    assert cost_model.decode_flops(loaded_full("glm-4.7-flash"), 32768) > 100 * absorbed


def loaded_full(name: str):
    described = parameters.read(name)
    return io.build(described.config("full"), described.architecture, device="meta", dtype=torch.bfloat16)


def test_the_calls_of_one_answer_cost_what_the_answer_costs(tiny):
    """Previously each call was charged the cost of the first one, at the shortest context."""
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT = workloads.random_prompt(model, 2, 16)
    whole, in_turns = (workloads.steps(model, prompt_BT, 12, at_once) for at_once in (None, 2))
    assert (whole.turns, in_turns.turns) == (1, 6)
    of_whole, of_turn = (cost_model.of(model, work) for work in (whole, in_turns))
    assert 6 * of_turn.flops == pytest.approx(of_whole.flops) and 6 * of_turn.bytes == pytest.approx(of_whole.bytes)
    assert of_whole == cost_model.of(model, workloads.decode(model, prompt_BT, 12))


def test_active_parameters_of_the_real_models():
    dense = loaded_full("qwen3-4b-instruct-2507")
    vectors = sum(p.numel() for p in dense.parameters() if p.dim() == 1)
    assert cost_model.active_parameters(dense) == 4_022_468_096 - vectors
    coder = loaded_full("qwen3-coder-30b")
    routed = 48 * 128 * 3 * 2048 * 768
    vectors = sum(p.numel() for p in coder.parameters() if p.dim() == 1)
    assert cost_model.active_parameters(coder) == 30_532_122_624 - vectors - 151936 * 2048 - routed * 120 // 128
    assert cost_model.kv_cache_bytes_per_token(coder) == 2 * 48 * 4 * 128 * 2
    assert cost_model.kv_cache_bytes_per_token(loaded_full("glm-4.7-flash")) == 47 * (512 + 64) * 2


@torch.no_grad()
def test_cache_bytes_match_the_cache(tiny, name):
    model = tiny(name)
    cache = cache_names.of(model(input_ids=workloads.random_prompt(model, 2, 16), use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 16 * cost_model.kv_cache_bytes_per_token(model)


def test_experts_hit_by_formula_and_by_hook(tiny):
    assert [round(expert_usage.expected(128, 8, b)) for b in (1, 4, 16)] == [8, 29, 82]
    model = tiny("qwen3-coder-30b")
    work = workloads.decode(model, workloads.random_prompt(model, 3, 8), 4)
    with expert_usage.counted(model) as usage:
        work()
    counted = usage.mean(tokens=3)
    assert len(counted) == 4 and all(2 <= n <= 6 for n in counted.values())
    assert all(not block.feed_forward.experts.router._forward_hooks for block in anatomy(model).blocks)
    used = cost_model.step_bytes(model, 3, 10, hit=counted)
    everything = cost_model.step_bytes(model, 3, 10, hit=dict.fromkeys(range(4), 8))
    assert used < everything < cost_model.weights_bytes(model) + 3 * 10 * cost_model.kv_cache_bytes_per_token(model)


def test_a_prompt_reads_only_the_experts_that_its_tokens_use(tiny):
    """A router that sends every token to the same experts could beat a bound that counts all of them."""
    model = tiny("qwen3-coder-30b")
    for block in anatomy(model).blocks:
        torch.nn.init.zeros_(block.feed_forward.experts.router.weight)
    work = workloads.prefill(model, workloads.random_prompt(model, 2, 16))
    cost, _ = speed._cost(model, work, None)
    chosen = {block.index: float(block.feed_forward.experts.top_k) for block in anatomy(model).blocks}
    assert cost.bytes == pytest.approx(cost_model.step_bytes(model, 2, 16, tokens=32, hit=chosen))
    assert cost.bytes < cost_model.of(model, work).bytes


def test_bytes_include_format_overhead_and_count_tied_weights_once(tiny):
    dense = torch.zeros(64, 64)
    dense[0, :8] = 1
    sparse = dense.to_sparse_csr()
    assert cost_model.tensor_bytes(sparse) == 8 * 4 + 8 * 8 + 65 * 8
    model = tiny("qwen3-4b-instruct-2507")
    assert cost_model.parameters(model) == sum(p.numel() for p in model.parameters())
    assert cost_model.weights_bytes(model) >= 4 * cost_model.parameters(model)


def test_zeros_are_seen_and_skipped_only_on_request(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    before = cost_model.of(model, workloads.prefill(model, workloads.random_prompt(model, 1, 16)))
    assert cost_model.zero_share(model) == 0
    for block in anatomy(model).blocks:
        block.feed_forward.up.weight[::2] = 0
    work = workloads.prefill(model, workloads.random_prompt(model, 1, 16))
    assert cost_model.zero_share(model) > 0.05
    assert cost_model.of(model, work) == before
    assert cost_model.of(model, work, skip_zeros=True).flops < before.flops


def test_attention_that_decodes_in_the_latents_is_counted_that_way(tiny):
    model = tiny("glm-4.7-flash")
    stock, absorbed = (cost_model.decode_flops(model, 512, absorbed=inside) for inside in (False, True))
    attending = sparse_attention.apply(model, pages=0)  # all pages: as many operations as absorbed decoding
    assert cost_model.decode_flops(attending, 512) == absorbed < stock == cost_model.decode_flops(model, 512)
    rounded = sparse_attention.apply(weight_only.weight_only(model, 8), pages=0)
    assert cost_model.decode_flops(rounded, 512) == stock  # without a dense matrix the cache is expanded


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_save_bytes_but_no_operations(tiny, name, bits):
    model = tiny(name)
    changed = weight_only.weight_only(model, bits)
    assert cost_model.active_parameters(changed) == cost_model.active_parameters(model)
    assert cost_model.parameters(changed) == cost_model.parameters(model)
    assert cost_model.prefill_flops(changed, 16, 2) == cost_model.prefill_flops(model, 16, 2)
    for absorbed in (False, True):
        flops = [cost_model.decode_flops(arm, 100, absorbed=absorbed) for arm in (model, changed)]
        assert flops[0] == flops[1]
    read = [cost_model.step_bytes(arm, 1, 16) for arm in (model, changed)]
    assert read[1] < 0.6 * read[0]
    blocks = [sum(p.nbytes for b in anatomy(arm).blocks for p in b.module.parameters()) for arm in (model, changed)]
    every = [cost_model.step_bytes(arm, 1, 16, hit=dict.fromkeys(range(4), 8)) for arm in (model, changed)]
    vectors = sum(p.nbytes for b in anatomy(model).blocks for p in b.module.parameters() if p.dim() == 1)
    assert every[0] - every[1] == pytest.approx(blocks[0] - blocks[1], abs=vectors)
    assert cost_model.zero_share(changed) == cost_model.zero_share(model) == 0


def test_costs_of_workloads_add_up(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT = workloads.random_prompt(model, 2, 16)
    parts = [
        cost_model.of(model, work)
        for work in (
            workloads.prefill(model, prompt_BT),
            workloads.decode(model, prompt_BT, 4),
            workloads.generate(model, prompt_BT, 5),
        )
    ]
    assert parts[0].flops + parts[1].flops == pytest.approx(parts[2].flops)
    assert parts[0].bytes + parts[1].bytes == pytest.approx(parts[2].bytes)
    steps = sum(2 * cost_model.decode_flops(model, 16 + step) for step in range(1, 5))
    assert parts[1].flops == pytest.approx(steps)


def timed(ratio: float, mde: float = 0.01) -> measurement.Measurement:
    rate = measurement.counted("prefill_tokens_per_second", "prefill", 100, 100 * ratio, "12 blocks", "measured")
    return rate.model_copy(update={"ci": (ratio * 0.99, ratio * 1.01), "mde": mde, "noise_floor": 0.01})


def test_the_bound_predicts_the_gain_and_names_the_unrealized_part():
    twice = (Cost(2e9, 1e6), Cost(1e9, 1e6))
    assert ceilings.bound(twice[0], MACHINE).seconds == 2e-3
    assert ceilings.bound(Cost(1e6, 1e8), MACHINE).limited_by == "traffic"
    realised = ceilings.explain(timed(2.0), twice, (4e-3, 2e-3), MACHINE)
    assert (realised.predicted, realised.realised, realised.reason) == (2.0, 1.0, None)

    def reason(rate, costs, seconds, **hints):
        return ceilings.explain(rate, costs, seconds, MACHINE, **hints).reason

    assert reason(timed(1.0), twice, (4e-3, 4e-3), zero_share=0.5) == "zeros stored dense"
    assert reason(timed(1.0), twice, (4e-3, 4e-3), fallback=True) == "kernel fallback"
    assert reason(timed(1.0), twice, (4e-2, 4e-2)) == "dispatch bound"
    traffic = (Cost(1e6, 2e7), Cost(1e6, 1e7))
    assert reason(timed(1.0), traffic, (4e-3, 4e-3), working_set_bytes=2**19) == "cache resident"
    assert reason(timed(1.0), traffic, (1e-4, 1e-4)) == "cache resident", "faster than memory can be"
    assert reason(timed(1.0), twice, (1e-3, 1e-3)) == "unexplained", "faster than arithmetic can be: no cache does that"
    assert (
        reason(
            timed(0.5),
            (Cost(2e9, 1), Cost(1.99e9, 1)),
            (4e-3, 8e-3),
        )
        == "below MDE"
    )
    latency = measurement.counted("time_to_first_token_ms", "prefill", 4, 2, "12 blocks", "measured")
    assert ceilings.explain(latency, twice, (4e-3, 2e-3), MACHINE).realised == 1.0


def test_ceilings_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(ceilings, "_DISTURBED", {})
    monkeypatch.setattr(ceilings.disturbance, "watch", lambda: lambda: None)
    ticks = itertools.count(0.0, 0.5)  # a clock on which everything between two readings takes half a second
    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    first = ceilings.measure()
    assert first.flops_per_second == 2 * 64**3 / 0.5, "a multiplication and an addition per element of the product"
    assert first.bytes_per_second == 2 * 2**12 / 0.5, "read once and written once"
    assert ceilings.measure() == first
    assert ceilings.measure(dtype=torch.bfloat16).dtype == "bfloat16"
    (tmp_path / "ceilings.json").write_text("{half a file")
    assert ceilings.measure().device == "cpu"


@pytest.mark.parametrize(("copying", "reading", "best"), [(0.5, 0.2, 5.0), (0.2, 0.5, 10.0)])
def test_products_that_only_read_their_weights_do_not_exceed_the_ceiling(monkeypatch, copying, reading, best):
    """A copy moves two bytes per byte, but a CPU also fetches the target's cache lines: reading can be faster."""
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})

    def seconds(call, device):
        copies = call().dim() == 1
        return copying if copies else reading

    monkeypatch.setattr(ceilings, "_best", seconds)
    assert ceilings._traffic("cpu") == pytest.approx(best * 2**12)


def test_ceilings_of_a_disturbed_machine_are_used_by_one_process_only(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(ceilings, "_DISTURBED", {})
    monkeypatch.setattr(ceilings.disturbance, "watch", lambda: lambda: "other processes took the cores")
    first = ceilings.measure()
    assert ceilings.measure() == first and not (tmp_path / "ceilings.json").exists()
