"""Only suitable models are timed in fresh processes, and a process loads the same model that was in memory."""

from dataclasses import replace

import pytest
import torch

from lib.measure.compare import replication, saved
from lib.measure.metrics import settings
from lib.measure.timing import child, workloads
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.models.offload import streamer
from lib.models.structure import sharing
from lib.models.structure.anatomy import anatomy
from lib.models.structure.signature import signature
from lib.optimizations.adaptive_sparse_attention import method as sparse_attention
from lib.optimizations.streaming_computation import method as streaming

QUICK = replace(settings.read("quick"), prompt_tokens=16, new_tokens=2, batch=2)
MODEL = "glm-4.7-flash"


@pytest.fixture
def absorbed(tiny):
    """A model with absorbed decoding, and a smaller one."""
    return mla_absorption.absorb(tiny(MODEL)), mla_absorption.absorb(tiny(MODEL, seed=1))


def timed(models, **options):
    prompt_BT = workloads.random_prompt(models[0], 1, QUICK.prompt_tokens)
    names = ("decode", "batch_decode")
    arms = {
        name: tuple(workloads.standard(name, model, prompt_BT, QUICK.new_tokens, QUICK.batch) for model in models)
        for name in names
    }
    for works in arms.values():
        for work in works:
            work()
    return replication.in_processes(models, arms, prompt_BT, QUICK, **options)


def test_models_with_absorbed_decoding_are_timed_in_processes(absorbed):
    pairs, reason = timed(absorbed)
    assert reason is None and set(pairs) == {"decode", "batch_decode"}
    for optimized, control in pairs.values():
        assert len(set(optimized.process)) == len(set(control.process)) >= 2
    assert all(mla_absorption.is_absorbed(model) for model in absorbed), "they are as they were"


def test_streamed_weights_and_another_attention_are_timed_in_processes(tiny, tmp_path):
    base = tiny("qwen3-4b-instruct-2507")
    streamed = streaming.apply(base, memory_ratio=0.7, prefill_chunk=8, folder=tmp_path)
    for changed in (streamed, sparse_attention.apply(base, tau=0.5, block_size=16, stride=8)):
        pairs, reason = timed((base, changed), except_for=("attention",))
        assert reason is None and set(pairs) == {"decode", "batch_decode"}
    streamer.streamer(streamed).close()


@pytest.mark.parametrize(
    ("effort", "blocks", "processes"),
    [("preview", 6, 1), ("quick", 6, 3), ("standard", 12, 6), ("standard", 6, 6), ("thorough", 30, 10)],
)
def test_few_blocks_use_six_processes_except_at_small_efforts(effort, blocks, processes):
    asked = replace(settings.read(effort), blocks=blocks)
    assert asked.blocks // replication.rounds(asked) == processes


def test_a_hook_that_is_not_noted_is_timed_in_one_process(tiny):
    base, hooked = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    hooked.register_forward_hook(lambda *_: None)
    pairs, reason = timed((base, hooked))
    assert not pairs and "files do not hold all of it" in reason


def test_stock_and_absorbed_models_are_each_loaded_as_they_are(absorbed, tiny):
    models = tiny(MODEL), absorbed[1]
    expected = [signature(model) for model in models]
    with saved.saved(*models) as arms:
        assert [arm.transform for arm in arms] == [None, saved.ABSORBING]
        loaded = [child.load(arm) for arm in arms]
        assert [signature(model) for model in loaded] == expected and expected[0] != expected[1]
        assert [mla_absorption.is_absorbed(model) for model in loaded] == [False, True]


def test_other_architectures_are_loaded_as_before(tiny, name):
    arm = saved.transform(mla_absorption.absorb(tiny(name)))
    assert (arm is None) == all(block.attention.kind != "latent" for block in anatomy(tiny(name)).blocks)


@pytest.mark.parametrize("how", ["hook", "forward", "one block"])
def test_models_not_fully_stored_in_files_are_timed_in_this_process(absorbed, how):
    """These have changes beside absorbed decoding, or absorb only some blocks."""
    changed = sharing.sharing(absorbed[0])
    block = anatomy(changed).blocks[1]
    if how == "hook":
        block.module.register_forward_hook(lambda *_: None)
    elif how == "forward":
        block.module.forward = block.module.forward
    else:
        del block.attention.module.forward
    pairs, reason = timed((absorbed[0], changed))
    assert pairs == {} and "files do not hold all of it" in reason


def test_files_of_an_absorbed_model_equal_those_of_the_stock_model(absorbed, tmp_path):
    again = io.load_folder(io.save(absorbed[0], tmp_path / "saved"))
    assert not mla_absorption.is_absorbed(again)
    ids_BT = workloads.random_prompt(again, 1, 16)
    with torch.inference_mode():
        assert torch.equal(again(ids_BT).logits, absorbed[0](ids_BT).logits)


@pytest.mark.parametrize(
    ("call_seconds", "quick", "standard"), [(0.001, 36, 72), (0.19, 28, 28), (0.5, 12, 12), (3.0, 6, 12), (0.0, 36, 72)]
)
def test_calls_in_one_process_get_as_many_rounds_as_fit(call_seconds, quick, standard, monkeypatch):
    monkeypatch.delenv(replication.VARIABLE, raising=False)
    monkeypatch.setattr(replication, "BLOCK_SECONDS", 0.5)
    calls = []
    monkeypatch.setattr(replication.interleaved, "warm_up", lambda arm: calls.append(arm) or call_seconds)
    assert replication.rounds_alone("arm", settings.read("quick")) == quick
    assert replication.rounds_alone("arm", settings.read("standard")) == standard
    monkeypatch.setenv(replication.VARIABLE, "0")
    assert replication.rounds_alone("arm", settings.read("quick")) == settings.read("quick").blocks
    assert calls == ["arm", "arm"], "where cells alone are tested nothing is called for it"


@pytest.mark.parametrize(("call_seconds", "quick", "standard"), [(0.01, 12, 12), (0.3, 6, 3), (0.9, 2, 2), (5.0, 2, 2)])
def test_long_calls_get_as_many_rounds_per_process_as_fit(call_seconds, quick, standard):
    assert replication.least_in_each(call_seconds, settings.read("quick")) == quick
    assert replication.least_in_each(call_seconds, settings.read("standard")) == standard


@pytest.mark.parametrize("call_seconds", [0.001, 0.19, 0.5, 3.0])
def test_a_preview_runs_a_fifth_of_the_rounds_but_enough_for_an_interval(call_seconds, monkeypatch):
    monkeypatch.delenv(replication.VARIABLE, raising=False)
    monkeypatch.setattr(replication, "BLOCK_SECONDS", 0.5)
    monkeypatch.setattr(replication.interleaved, "warm_up", lambda arm: call_seconds)
    preview = settings.read("preview")
    each, alone = replication.least_in_each(call_seconds, preview), replication.rounds_alone("arm", preview)
    assert each == preview.blocks and preview.blocks // replication.rounds(preview) == 1, "all in one process"
    assert alone == preview.blocks
