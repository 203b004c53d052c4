"""Speculative decoding against plain greedy decoding, with good drafts, bad drafts and changing lengths."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from lib.errors import UserError
from lib.models.decoding import cache_names
from lib.optimizations.feedback_mechanisms.speculation import speculative


@torch.inference_mode()
def plain(model, prompt_T, new_tokens):
    ids_1T, cache, tokens = prompt_T[None], DynamicCache(), []
    for _ in range(new_tokens):
        ids_1T = (
            model(input_ids=ids_1T, **cache_names.as_kwargs(cache), use_cache=True).logits[:, -1].argmax(-1)[:, None]
        )
        tokens.append(ids_1T[0, 0])
    return torch.stack(tokens)


@pytest.fixture
def prompt_T():
    return torch.randint(8, 96, (19,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("drafter", ["same", "another"])
def test_speculation_returns_the_models_own_answer_whatever_the_draft(tiny, name, prompt_T, drafter):
    model = tiny(name)
    draft = model if drafter == "same" else tiny(name, seed=9)
    lengths = iter([3, 0, 0, 5, 1, 0, 4, 2] * 10)
    tokens_N, rounds = speculative.generate(model, draft, prompt_T, 24, lambda rounds: next(lengths))
    assert torch.equal(tokens_N, plain(model, prompt_T, 24))
    assert sum(done.accepted + 1 for done in rounds) == 23
    if drafter == "same":
        assert all(done.accepted == done.drafted for done in rounds)
    else:
        assert any(done.accepted < done.drafted for done in rounds)


def test_drafting_with_the_model_itself_needs_few_rounds(tiny, prompt_T):
    model = tiny("qwen3-4b-instruct-2507")
    _, rounds = speculative.generate(model, model, prompt_T, 21, lambda rounds: 4)
    assert len(rounds) == 4


def test_a_draft_reads_nothing_before_its_first_token_is_requested(tiny, prompt_T):
    model, draft = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=9)
    read = []
    draft.register_forward_pre_hook(lambda _m, _a, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True)
    _, plain_rounds = speculative.generate(model, draft, prompt_T, 10, lambda rounds: 0)
    assert read == [] and all(done.catch_up_seconds == done.drafted == 0 for done in plain_rounds)
    lengths = iter([0, 0, 2, 0, 0])
    _, rounds = speculative.generate(model, draft, prompt_T, 6, lambda rounds: next(lengths, 0))
    # The prompt and two tokens at once (catching up), then two tokens one by one.
    assert read == [len(prompt_T) + 2, 1, 1]
    assert [done.catch_up_seconds > 0 for done in rounds[:3]] == [False, False, True]


@pytest.mark.parametrize("longest", [1, 3])
def test_ngrams_draft_earlier_continuations_and_keep_the_models_answer(tiny, name, prompt_T, longest):
    model = tiny(name)
    twice_T = torch.cat([prompt_T, prompt_T])
    tokens_N, rounds = speculative.generate(model, speculative.Ngram(longest), twice_T, 24, lambda rounds: 4)
    assert torch.equal(tokens_N, plain(model, twice_T, 24))
    assert all(done.catch_up_seconds == 0 and done.drafted <= 4 for done in rounds)


def test_ngrams_use_the_longest_latest_match_or_draft_nothing():
    propose = speculative.Ngram(2).propose
    ids = torch.tensor
    assert propose(ids([1, 2, 3, 9, 1, 2, 4, 5, 1, 2]), 3)[0].tolist() == [4, 5, 1]
    assert propose(ids([7, 5, 6, 8, 5]), 2)[0].tolist() == [6, 8]
    assert propose(ids([1, 2, 3]), 2)[0].tolist() == []
    assert propose(ids([4]), 2)[0].tolist() == []
    with pytest.raises(UserError, match="n-gram of 0 tokens"):
        speculative.Ngram(0)


def test_a_laws_decision_time_counts_in_its_round(tiny, prompt_T):
    """Otherwise a slow law would look as fast as a quick one."""
    model = tiny("qwen3-4b-instruct-2507")

    def slow(rounds):
        time.sleep(0.05)
        return 0

    _, rounds = speculative.generate(model, model, prompt_T, 4, slow)
    assert len(rounds) == 3 and all(done.seconds > done.law_seconds >= 0.05 for done in rounds)


def test_both_halves_of_a_round_wait_for_the_device(tiny, prompt_T, monkeypatch):
    """Device calls return at once: without waiting, drafting would seem to take no time and checking all of it."""
    model, now, queued = tiny("qwen3-4b-instruct-2507"), [0.0], []
    read = speculative._read

    def started(reader, ids_T, cache, keep=1):
        queued.append(len(ids_T))  # a second per token, once something waits for it
        return read(reader, ids_T, cache, keep)

    def wait(ids_T):
        now[0] += sum(queued)
        queued.clear()

    monkeypatch.setattr(speculative, "_read", started)
    monkeypatch.setattr(speculative, "_synchronize", wait)
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, (first, *_) = speculative.generate(model, copy.deepcopy(model), prompt_T, 8, lambda rounds: 2)
    assert first.catch_up_seconds == len(prompt_T) and first.draft_seconds == 2.0
    assert now[0] >= 2 * len(prompt_T) + 2


def test_a_draft_with_another_vocabulary_is_refused(tiny, prompt_T):
    model = tiny("qwen3-4b-instruct-2507")
    draft = copy.deepcopy(model)
    draft.config.vocab_size = 80
    with pytest.raises(UserError, match="vocabulary of 80 tokens, the model one of 96"):
        speculative.generate(model, draft, prompt_T, 4, lambda rounds: 2)
