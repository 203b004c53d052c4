"""Notes of a model on changes that no checkpoint holds; another process can rebuild it from them."""

import json
from dataclasses import asdict

import pytest

from lib.measure.compare import saved
from lib.measure.timing import child, workloads
from lib.measure.timing.children import Arm
from lib.models.decoding import chunked
from lib.models.offload import streamer
from lib.models.structure import beyond_files
from lib.models.structure.sharing import sharing
from lib.models.structure.signature import signature
from lib.optimizations.adaptive_sparse_attention import method as sparse_attention
from lib.optimizations.streaming_computation import method as streaming

MODEL = "qwen3-4b-instruct-2507"


def chunks(model, tmp_path):
    return chunked.chunk_prefill(model, 8)


def sparse(model, tmp_path):
    return sparse_attention.apply(model, tau=0.5, block_size=16, stride=8, pages=2, page_size=4)


def sparse_in_chunks(model, tmp_path):
    return sparse(chunks(model, tmp_path), tmp_path)


def streamed(model, tmp_path):
    return streaming.apply(model, memory_ratio=0.7, prefill_chunk=8, folder=tmp_path / "streamed")


def streamed_then_chunked(model, tmp_path):
    return chunked.chunk_prefill(streaming.apply(model, memory_ratio=0.7, folder=tmp_path), 4)


def tokens(model):
    work = workloads.generate(model, workloads.random_prompt(model, 1, 24), 4)
    work()
    return work.output_BN


@pytest.mark.parametrize("change", [chunks, sparse, sparse_in_chunks, streamed, streamed_then_chunked])
def test_a_changed_model_is_rebuilt_from_its_files(change, tiny, tmp_path):
    changed = change(tiny(MODEL), tmp_path)
    expected, answer = signature(changed), tokens(changed)
    with saved.saved(tiny(MODEL), changed) as (_, arm):
        again = child.load(Arm(**json.loads(json.dumps(asdict(arm)))))  # as a job is sent to a process
    assert signature(again) == expected and expected != signature(tiny(MODEL))
    assert tokens(again).equal(answer) and tokens(changed).equal(answer)
    assert beyond_files.steps(again) == beyond_files.steps(changed)
    for model in (again, changed):
        if stream := streamer.streamer(model):
            stream.close()


def test_undone_changes_are_forgotten(tiny):
    model = chunked.chunk_prefill(chunked.chunk_prefill(tiny(MODEL), 8), 16)
    assert beyond_files.steps(model) == [(chunked.CHUNKING, {"tokens": 16})]
    assert beyond_files.steps(sharing(model)) == beyond_files.steps(model)
    assert beyond_files.steps(chunked.whole_prefill(model)) == []
    attending = sparse_attention.apply(model, tau=0.5)
    assert beyond_files.steps(model) == [] and len(beyond_files.steps(attending)) == 1
    assert beyond_files.steps(sparse_attention.apply(attending, tau=0.6))[0][1]["tau"] == 0.6
    assert beyond_files.steps(sparse_attention.revert(attending)) == []


def test_a_note_on_a_copy_does_not_affect_the_original(tiny):
    model = chunked.chunk_prefill(tiny(MODEL), 8)
    chunked.whole_prefill(sharing(model))
    assert beyond_files.steps(model) == [(chunked.CHUNKING, {"tokens": 8})]
