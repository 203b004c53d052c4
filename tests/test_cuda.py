"""GPU features, each compared with the CPU or a slow reference; skipped without a GPU."""

import copy
import itertools

import pytest
import torch

from lib.measure.compare import footprint, saved
from lib.measure.roofline import ceilings
from lib.measure.timing import disturbance, interleaved, workloads
from lib.measure.trackers import energy, memory
from lib.measure.trackers.cpu import use
from lib.models import loading
from lib.models.checkpoints import io, placement
from lib.models.decoding import mla_absorption
from lib.models.offload import streamer
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention import method as adaptive_sparse_attention
from lib.optimizations.sparse_neural_networks import method as sparse_neural_networks
from lib.optimizations.streaming_computation import method as streaming_computation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
PROMPT = torch.randint(8, 96, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def exact():
    """Use full float32 products, so that answers can be compared with those of the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_answers_and_hash_match_the_cpu(tiny, name):
    model = tiny(name)
    changed = copy.deepcopy(model).to("cuda")
    with torch.inference_mode():
        torch.testing.assert_close(changed(PROMPT.cuda()).logits.cpu(), model(PROMPT).logits, **CLOSE)
    assert io.weights_hash(changed) == io.weights_hash(model)


def test_a_workload_waits_for_the_gpu_and_times_its_steps_by_events(tiny, name):
    model = tiny(name).to("cuda")
    work = workloads.decode(model, PROMPT, 6)
    assert work.synchronize is not None
    pairs = interleaved.paired(work, workloads.decode(model, PROMPT, 6), blocks=6)
    assert min(pairs.baseline_seconds) > 0 and work.output_BN.shape == (2, 6)
    calls = 1 + 6  # a warm-up and the blocks
    steps = len(work.step_seconds) // calls
    assert steps in (5, 6) and min(work.step_seconds) > 0
    assert sum(work.step_seconds[-steps:]) < pairs.baseline_seconds[-1] * 1.5 + 0.01


@pytest.mark.parametrize("block", [16, 24, 64, 128])
@pytest.mark.parametrize("queries", ["all", "the last"])
def test_flex_attention_equals_a_dense_mask(block, queries):
    random = torch.Generator().manual_seed(0)
    tokens, count = 8 * block - 5, 8 * block - 5 if queries == "all" else 3 * block - 5
    query, key, value = (
        torch.randn(heads, length, 32, generator=random).cuda()
        for heads, length in ((4, count), (2, tokens), (2, tokens))
    )
    chosen = blocks.choose(blocks.scores(query, key, 0.3, block, 8), 0.5)
    assert chosen.sum() < len(chosen) * blocks.causal_blocks(*chosen.shape[1:]).sum()
    mask = chosen.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :count, :tokens]
    mask = mask & torch.ones(count, tokens, dtype=torch.bool, device="cuda").tril(tokens - count)
    logits = query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.3
    expected = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 0)
    torch.testing.assert_close(blocks.attend(query, key, value, chosen, 0.3, block), expected, atol=2e-2, rtol=2e-2)


def test_sparse_attention_that_keeps_everything_changes_nothing(tiny, name):
    model = tiny(name).to("cuda")
    prompt = torch.randint(8, 96, (1, 150), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        full = model(prompt).logits
        changed = adaptive_sparse_attention.apply(model, tau=1.0, block_size=16, stride=4)
        torch.testing.assert_close(changed(prompt).logits, full, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("ratio", ["smallest", 0.7])
def test_streamed_and_resident_weights_give_the_same_answers(tiny, name, ratio, tmp_path):
    model = tiny(name).to("cuda")
    folder = io.save(model, tmp_path / "checkpoint")
    size = {"allowance_bytes": streamer.smallest(folder)[0]} if ratio == "smallest" else {"memory_ratio": ratio}
    changed = streamer.open_streamed(folder, device="cuda", **size)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(changed(PROMPT.cuda()).logits, model(PROMPT.cuda()).logits, **CLOSE)
    streamer.streamer(changed).close()
    assert io.weights_hash(streaming_computation.revert(changed)) == io.weights_hash(model)


def test_absorbed_attention_gives_the_same_answers(tiny):
    model = tiny("glm-4.7-flash").to("cuda")
    changed = mla_absorption.absorb(copy.deepcopy(model))
    with torch.inference_mode():
        torch.testing.assert_close(changed(PROMPT.cuda()).logits, model(PROMPT.cuda()).logits, **CLOSE)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1"])
def test_sparse_execution_equals_masked_weights(pattern):
    model = loading.load("qwen3-4b-instruct-2507", device="cuda").model
    pruned = sparse_neural_networks.prune(model, [], sparsity=0.5, method="magnitude", pattern=pattern)
    changed = sparse_neural_networks.executed(pruned)
    with torch.inference_mode():
        expected, actual = pruned.model(PROMPT.cuda()).logits.float(), changed(PROMPT.cuda()).logits.float()
    assert (actual - expected).norm() < 0.03 * expected.norm()
    if pattern == "unstructured":  # bfloat16 values with 32-bit columns: 6 bytes a weight, not 8
        for weight in sparse_neural_networks.stored(changed).values():
            assert weight.values().dtype == torch.bfloat16 and weight.col_indices().dtype == torch.int32


def test_the_allocator_in_this_process_agrees_with_a_child():
    name = "qwen3-4b-instruct-2507"
    loaded = loading.load(name, device="cuda")
    arm = memory.Arm(load={"name": name}, dtype="bfloat16", device="cuda", new_tokens=4)
    (child,) = memory.peaks(arm)
    assert child.reason is None and child.scope.endswith("CUDA allocator")
    weight = sum(entry.nbytes for entry in loaded.model.parameters())
    occupied = torch.ones(2**24, device="cuda")
    work = workloads.generate(loaded.model, workloads.random_prompt(loaded.model, 1, arm.prompt_tokens), 4)
    work()
    in_process = memory.allocated(work, loaded.model, "no room")
    here, there = (read.median("above_start_bytes") for read in (in_process, child))
    assert here >= weight and occupied.numel()
    # A child's first product also allocates the libraries' workspace, which already existed here.
    assert abs(here - there) < 2**26


def test_peaks_are_read_in_place_if_another_copy_does_not_fit(tiny, monkeypatch):
    models = [tiny("qwen3-4b-instruct-2507").to("cuda") for _ in range(2)]
    assert saved.lack_of_room(*models) is None
    monkeypatch.setattr(placement, "free_bytes", lambda device: 100)
    result = {entry.metric: entry for entry in footprint.footprint(*models, "quick")}
    assert (
        result["peak_memory_bytes"].provenance == "measured" and "CUDA allocator" in result["peak_memory_bytes"].source
    )
    assert result["checkpoint_bytes"].reason.startswith("no room on the device for another copy")


def test_energy_and_utilization_come_from_the_gpu(tiny):
    model = tiny("qwen3-4b-instruct-2507").to("cuda")
    work = workloads.prefill(model, PROMPT)
    counter = energy.counter("cuda")
    assert (counter.kind, counter.provenance) == ("nvml", "measured") and counter.window_seconds >= 2
    assert disturbance.gpu_handle() is not None and 0 <= use(work, 0.5).gpu <= 1


def test_ceilings_are_those_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    result = ceilings.measure("cuda", torch.bfloat16)
    assert result.device == "cuda" and result.cache_bytes > 2**20
    assert result.flops_per_second > 1e12 and result.bytes_per_second > 1e11


def test_stream_marks_are_in_order():
    tensor = torch.ones(2**20, device="cuda")
    marks = [workloads._mark(tensor)]
    for _ in range(3):
        tensor.mul_(1.0)
        marks.append(workloads._mark(tensor))
    torch.cuda.synchronize()
    assert all(earlier.elapsed_time(later) >= 0 for earlier, later in itertools.pairwise(marks))
