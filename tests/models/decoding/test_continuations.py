"""Sharing prompt prefixes changes no score: each equals that of the whole sequence read alone."""

import random

import pytest
import torch

from lib.models.decoding import continuations
from lib.optimizations.adaptive_sparse_attention import method as sparse_attention


def alone(model, context, continuation) -> tuple[float, bool]:
    """Return the answer from one pass over the whole sequence."""
    logits_TV = model(torch.tensor([[*context, *continuation]])).logits[0].float().log_softmax(-1)
    rows = logits_TV[len(context) - 1 : -1]
    score = rows.gather(-1, torch.tensor(continuation)[:, None]).sum().item()
    return score, rows.argmax(-1).tolist() == list(continuation)


def drawn(contexts: int, shared: int = 0, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return pairs whose contexts differ in length, with continuations of one to five tokens."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(8, 96) for _ in range(count)]

    common = tokens(shared)
    groups = [common + tokens(draw.randrange(3, 30)) for _ in range(contexts)]
    return [(context, tokens(length)) for context in groups for length in (1, 2, 5, 1)]


@pytest.mark.parametrize("shared", [0, 40])
def test_every_score_equals_that_of_the_sequence_read_alone(tiny, name, shared):
    model = tiny(name)
    pairs = drawn(6, shared)
    answers = continuations.loglikelihoods(model, pairs, tokens_at_once=256)
    expected = [alone(model, *pair) for pair in pairs]
    assert [score for score, _ in answers] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_called_greedy(tiny):
    model, context = tiny("qwen3-4b-instruct-2507"), [9, 17, 33, 21]
    tokens = context[:]
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    right, wrong = tokens[4:], [*tokens[4:7], (tokens[7] + 1) % 96]
    answers = continuations.loglikelihoods(model, [(context, right), (context, wrong)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_shared_prefix_is_read_once(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    pairs = drawn(5, shared=50)
    continuations.loglikelihoods(model, pairs)
    contexts = {tuple(context) for context, _ in pairs}
    longer = [continuation for _, continuation in pairs if len(continuation) > 1]
    assert seen[0] == 50
    assert sum(seen) <= 50 + sum(len(context) - 50 for context in contexts) + 4 * len(longer)


def test_texts_of_different_lengths_are_not_padded_to_the_longest(tiny):
    """As in a benchmark with two long answers to a short question: fewer tokens than with separate sequences."""
    model, draw = tiny("qwen3-4b-instruct-2507"), random.Random(0)
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    contexts = [[draw.randrange(8, 96) for _ in range(draw.randrange(6, 40))] for _ in range(60)]
    pairs = [(context, [9] * draw.randrange(2, 70)) for context in contexts for _ in range(2)]
    continuations.loglikelihoods(model, pairs)
    needed = sum(map(len, contexts)) + sum(len(continuation) - 1 for _, continuation in pairs)
    alone = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    assert needed <= sum(seen) <= needed + len(seen) * continuations.PADDING["cpu"] and sum(seen) < alone
    assert len(seen) < len(pairs) / 2


def test_parts_hold_few_rows_and_little_padding():
    lengths = [1, 1, 2, 3, 3, 8, 9, 30, 31, 31]
    parts = list(continuations._alike(lengths, int, lambda longest: 90 // longest, 4))
    assert sorted(length for part in parts for length in part) == lengths and parts[0] == [31, 31]
    for part in parts:
        assert len(part) * part[0] <= 90 and len(part) * part[0] - sum(part) <= 4
    assert [len(part) for part in continuations._alike([5, 5, 6, 6], int, lambda _: 9, 0)] == [2, 2]
    assert len(list(continuations._alike([7, 7], int, lambda _: 0, 9))) == 2  # at least one


def test_a_context_that_is_too_long_is_truncated_on_the_left(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    model.config.max_position_embeddings = 20
    context, continuation = [8 + n % 80 for n in range(40)], [11, 12, 13]
    (answer,) = continuations.loglikelihoods(model, [(context, continuation)])
    assert answer[0] == pytest.approx(alone(model, context[-18:], continuation)[0], abs=1e-4)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_empty_input_is_refused(tiny, pair):
    with pytest.raises(ValueError, match="at least one token"):
        continuations.loglikelihoods(tiny("qwen3-4b-instruct-2507"), [pair])


def test_an_arm_with_its_own_cache_is_scored(tiny, name):
    """With everything kept, sparse attention is full attention: its paged cache must give the same scores."""
    model, pairs = tiny(name), drawn(4, 20)
    if reason := sparse_attention.applies_to(model):
        pytest.skip(reason)
    arm = sparse_attention.apply(model, tau=1.0, block_size=16, stride=4, pages=0)
    expected = continuations.loglikelihoods(model, pairs)
    scores = [score for score, _ in continuations.loglikelihoods(arm, pairs)]
    assert scores == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_a_continuation_as_long_as_a_document_is_scored_in_pieces(tiny, name, monkeypatch):
    model = tiny(name)
    pairs = [([9, 17], [8 + n % 80 for n in range(150)]), ([9, 33], [8 + n * 7 % 80 for n in range(120)])]
    expected = [alone(model, *pair) for pair in pairs]
    rows = 40
    monkeypatch.setattr(continuations, "LOGITS_AT_ONCE", rows * model.lm_head.weight.shape[0])
    held = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: held.append(logits[..., 0].numel()))
    answers = continuations.loglikelihoods(model, pairs)
    hook.remove()
    assert max(held) <= rows
    assert [score for score, _ in answers] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
