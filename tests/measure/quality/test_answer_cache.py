"""Only a baseline's answers are cached: a model that differs in any way is evaluated again."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.measure.metrics import measurement
from lib.measure.quality import answer_cache, answer_comparison, evaluate
from lib.models import loading, parameters
from lib.models.offload import streamer
from lib.models.structure.anatomy import anatomy
from lib.optimizations.adaptive_sparse_attention import method
from lib.optimizations.common import absorbed_baseline

QUESTION = {"task": "topic", "ids": ["a", "b"]}


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return loading.load("qwen3-4b-instruct-2507")


def was_asked(loaded, question=QUESTION) -> bool:
    """Return whether the model was evaluated, not looked up."""
    calls = []

    def ask():
        calls.append(1)
        return {"scores_NL": np.ones((2, 3))}

    answers, day = answer_cache.known_or(loaded, question, ask)
    assert (answers["scores_NL"] == 1).all() and bool(calls) == (day is None)
    return bool(calls)


def test_the_same_model_is_evaluated_once(loaded):
    assert was_asked(loaded) and not was_asked(loaded)
    assert not was_asked(loading.load("qwen3-4b-instruct-2507"))
    assert was_asked(loaded, QUESTION | {"ids": ["a"]})


def test_an_optimized_model_is_evaluated_and_not_cached(loaded):
    was_asked(loaded)
    for model in (method.apply(loaded.model), copy.deepcopy(loaded.model)):
        arm = replace(loaded, model=model)
        assert was_asked(arm) and was_asked(arm)


def test_an_absorbed_baseline_is_evaluated_once_and_cached_apart_from_stock(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    stock = loading.load("glm-4.7-flash")
    assert was_asked(stock)
    absorbed = absorbed_baseline.of(stock)
    assert was_asked(absorbed) and not was_asked(absorbed)
    assert not was_asked(absorbed_baseline.of(loading.load("glm-4.7-flash"))) and not was_asked(stock)
    arm = replace(absorbed, model=copy.deepcopy(absorbed.model))
    assert was_asked(arm) and was_asked(arm), "what is made of it is not the baseline"


@pytest.mark.parametrize("how", ["weight", "forward", "hook", "attention", "data", "code", "threads"])
def test_a_model_changed_in_place_is_evaluated(loaded, how, monkeypatch):
    was_asked(loaded)
    block = anatomy(loaded.model).blocks[1]
    if how == "weight":
        block.attention.output.weight[0, 0] += 1e-3
    elif how == "forward":
        block.module.forward = block.module.forward
    elif how == "hook":
        block.module.register_forward_hook(lambda *_: None)
    elif how == "attention":
        loaded.model.set_attn_implementation("eager")
    elif how == "data":
        monkeypatch.setattr(answer_cache.corpus, "data_hash", lambda: "another")
    elif how == "code":
        monkeypatch.setattr(answer_cache, "_code", lambda: "another")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert was_asked(loaded)


def test_fewer_experts_per_token_count_as_a_different_model(tmp_path, monkeypatch):
    """A checkpoint that is rewritten under its name may differ in nothing else."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    loaded = loading.load("qwen3-coder-30b")
    assert was_asked(loaded) and not was_asked(loaded)
    anatomy(loaded.model).blocks[1].feed_forward.experts.router.top_k -= 1
    assert was_asked(loaded)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not an archive", None])
def test_a_damaged_cache_file_is_ignored(loaded, tmp_path, damage):
    was_asked(loaded)
    (stored,) = (tmp_path / "answers").glob("*.npz")
    stored.write_bytes(stored.read_bytes()[:-30] if damage is None else damage)
    assert was_asked(loaded) and not was_asked(loaded)


def test_an_unwritable_folder_is_not_an_error(loaded, tmp_path):
    (tmp_path / "answers").write_text("a file where the folder should be")
    assert was_asked(loaded) and was_asked(loaded)


def test_cached_answers_equal_the_original_ones_and_are_marked(loaded):
    first = evaluate.classify(loaded, "topic", "search", 12)
    again = evaluate.classify(loaded, "topic", "search", 12)
    assert first.answered is None and again.answered and first.ids == again.ids
    assert (first.scores_NL == again.scores_NL).all() and (first.right_N == again.right_N).all()
    values = [evaluate.retrieval(loaded, 64, 4) for _ in range(2)]
    assert (values[0].right_N == values[1].right_N).all() and values[1].answered
    compared = [
        answer_comparison.compare_retrieved(values[1], values[0]),
        *answer_comparison.compare_classified(again, first),
    ]
    assert all(again.answered in measured.source for measured in compared if not measured.metric.startswith("flips"))
    assert measurement.lint(compared) == []


def test_a_streamed_model_is_evaluated_even_if_all_its_units_are_in_memory(tmp_path, monkeypatch):
    """Previously only the hooks of streamed units told it apart; with experts alone streamed, hashing was refused."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    total = streamer.smallest(parameters.PARAMETERS / "proxies" / "qwen3-coder-30b")[1]
    monkeypatch.setattr(loading.placement, "allowance_bytes", lambda *_, **__: total)
    loaded = loading.load("qwen3-coder-30b")
    assert not streamer.streamer(loaded.model).plan.streamed
    assert was_asked(loaded) and was_asked(loaded)
