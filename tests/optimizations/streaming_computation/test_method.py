"""All variants together on tiny models: the same answers, the caller's model untouched, and back again."""

import copy
import itertools
import time

import pytest
import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.measure.trackers import memory, memory_child
from lib.models.checkpoints import io
from lib.models.checkpoints.weight_file import WeightFile
from lib.models.decoding import mla_absorption
from lib.models.offload import streamer
from lib.optimizations.common import absorbed_baseline
from lib.optimizations.sparse_neural_networks import method as sparse_neural_networks
from lib.optimizations.streaming_computation import method as streaming
from lib.optimizations.streaming_computation import read_bound
from lib.optimizations.structured_pruning import method as structured_pruning
from lib.optimizations.tensor_decomposition import method as tensor_decomposition

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def ids_of(length: int = 40) -> torch.Tensor:
    return torch.randint(8, 96, (2, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_it_answers_like_the_original_model(tiny, name, ratio):
    model = tiny(name)
    before = io.weights_hash(model)
    streamed = streaming.apply(model, memory_ratio=ratio, prefill_chunk=7)
    torch.testing.assert_close(streamed(ids_of()).logits, model(ids_of()).logits, **CLOSE)
    work = [workloads.generate(arm, ids_of(), 8) for arm in (model, streamed)]
    for call in work:
        call()
    assert torch.equal(work[0].output_BN, work[1].output_BN)
    assert io.weights_hash(model) == before and "forward" not in model.__dict__
    assert mla_absorption.is_absorbed(streamed) == absorbed_baseline.has_latents(model)
    assert (
        cost_model.weights_bytes(streamed) <= max(ratio, 1.0 * (ratio == 1.0)) * cost_model.weights_bytes(model) * 1.001
    )
    back = streaming.revert(streamed)
    assert io.weights_hash(back) == before
    torch.testing.assert_close(back(ids_of()).logits, model(ids_of()).logits, **CLOSE)


def test_the_folder_is_deleted_with_the_model(tiny):
    streamed = streaming.apply(tiny("qwen3-4b-instruct-2507"), memory_ratio=0.6)
    folder = streamer.streamer(streamed).file.folder
    assert folder.is_dir()
    streamer.streamer(streamed).close()
    streamed.temporary_folder.cleanup()
    assert not folder.exists()


def test_a_streaming_model_is_refused(tiny):
    streamed = streaming.apply(tiny("qwen3-4b-instruct-2507"), memory_ratio=0.6)
    assert streaming.applies_to(streamed)
    with pytest.raises(UserError, match="stream from a file"):
        streaming.apply(streamed)
    with pytest.raises(UserError, match="cannot be copied"):
        copy.deepcopy(streamed)


@pytest.mark.parametrize("module", [structured_pruning, tensor_decomposition, sparse_neural_networks])
def test_a_streaming_model_cannot_be_changed_and_says_so(tiny, name, module):
    streamed = streaming.apply(tiny(name), memory_ratio=0.6)
    with pytest.raises(UserError, match="cannot be copied or changed"):
        module.apply(streamed, [{"input_ids": ids_of()}])


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_ratio": 0.0},
        {"memory_ratio": 1.5},
        {"prefill_chunk": 0},
        {"page_cache": "cold"},
        {"memory_ratio": 0.06},
    ],
)
def test_wrong_knobs_are_named_in_one_line(tiny, wrong):
    with pytest.raises(UserError) as error:
        streaming.apply(tiny("qwen3-4b-instruct-2507"), **wrong)
    assert "\n" not in str(error.value) and ("expected" in str(error.value) or "smallest possible" in str(error.value))


def test_a_child_process_opens_it_without_loading_it(tiny, tmp_path):
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "checkpoint")
    opener = "lib.optimizations.streaming_computation.method:open_folder"
    arm = {"folder": str(folder), "prompt_tokens": 32, "new_tokens": 2}
    (peak,) = memory.peaks(memory.Arm(opener=opener, arguments={"memory_ratio": 0.6, "prefill_chunk": 8}, **arm))
    assert peak.reason is None and peak.tensor_bytes is None and peak.median("peak_bytes") > 0
    with pytest.raises(UserError, match="smallest possible"):
        memory_child.read(memory.Arm(opener=opener, arguments={"memory_ratio": 0.01}, **arm))


def test_reads_are_counted_and_replayed_without_the_model(tiny, name, monkeypatch):
    streamed = streaming.apply(tiny(name), memory_ratio=0.5)
    stream = streamer.streamer(streamed)
    work = workloads.decode(streamed, ids_of(12), 4)
    ticks = itertools.count(0.0, 2.0)  # a clock on which everything between two readings takes 2 s
    monkeypatch.setattr(read_bound, "perf_counter", lambda: next(ticks))
    reads = read_bound.reads(streamed, work)
    assert (reads.tokens, reads.seconds, reads.bandwidth) == (8, 2.0, reads.bytes / 2)
    assert reads.bytes >= 3 * sum(
        stream.units[unit][0].place.nbytes for unit in stream.plan.streamed if unit[:5] == "block"
    )
    (counted,) = read_bound.measurements({"decode": reads})
    assert counted.optimized == reads.bytes / 8 and counted.verdict == "worse"
    work()
    assert work.output_BN.shape == (2, 4)


def test_an_earlier_calls_readahead_is_not_counted_again(tiny, tmp_path, monkeypatch):
    """Planted: reads are slow, so that the last one of a call is still running when the call is over."""
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "saved")
    streamed = streaming.open_folder(folder, memory_ratio=0.5, page_cache="copy")
    stream, fill = streamer.streamer(streamed), WeightFile._fill
    monkeypatch.setattr(WeightFile, "_fill", lambda *arguments: (time.sleep(0.01), fill(*arguments)))

    def work() -> None:
        streamed(ids_of(6))

    work()
    stream.settle()
    before = stream.file.bytes_read
    work()
    stream.settle()
    of_a_call = stream.file.bytes_read - before
    assert read_bound.reads(streamed, work, repeats=1).bytes == of_a_call > 0
    stream.close()
