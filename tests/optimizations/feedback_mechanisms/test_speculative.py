"""Speculative decoding against plain greedy decoding, with good drafts, bad drafts and lengths that change."""

import copy

import pytest
import torch
from transformers import DynamicCache

from lib.errors import UserError
from lib.optimizations.feedback_mechanisms import speculative


@torch.inference_mode()
def plain(model, prompt_T, new_tokens):
    ids_1T, cache, tokens = prompt_T[None], DynamicCache(), []
    for _ in range(new_tokens):
        ids_1T = model(input_ids=ids_1T, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)[:, None]
        tokens.append(ids_1T[0, 0])
    return torch.stack(tokens)


@pytest.fixture
def prompt_T():
    return torch.randint(8, 96, (19,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("drafter", ["same", "another"])
def test_the_answer_is_the_models_own_whatever_the_draft(tiny, name, prompt_T, drafter):
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


def test_a_draft_that_is_the_model_needs_few_rounds(tiny, prompt_T):
    model = tiny("qwen3-4b-instruct-2507")
    _, rounds = speculative.generate(model, model, prompt_T, 21, lambda rounds: 4)
    assert len(rounds) == 4


def test_another_vocabulary_is_refused(tiny, prompt_T):
    model = tiny("qwen3-4b-instruct-2507")
    draft = copy.deepcopy(model)
    draft.config.vocab_size = 80
    with pytest.raises(UserError, match="vocabulary of 80 tokens, the model one of 96"):
        speculative.generate(model, draft, prompt_T, 4, lambda rounds: 2)
