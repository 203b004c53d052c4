"""Laws are compared answer by answer, and none is timed before another more often than after it."""

from itertools import combinations

import pytest
import torch

from lib.optimizations.feedback_mechanisms.speculation import drafting


@pytest.mark.parametrize("count", [6, 24])
def test_of_any_two_laws_each_answers_first_equally_often(count, monkeypatch):
    """With an order that moves on by one, plain decoding came before the last of five laws in one answer of five."""
    answered: list[tuple[int, str]] = []

    def generate(model, drafter, prompt_T, new_tokens, law):
        answered.append((int(prompt_T[0]), drafter))
        return torch.zeros(new_tokens), []

    monkeypatch.setattr(drafting.speculative, "generate", generate)
    laws = {name: (name, None) for name in "abcde"}
    prompts = [torch.tensor([number]) for number in range(count)]
    drafted = drafting.compare(None, prompts, laws, 3)
    warm, timed = answered[: len(laws)], answered[len(laws) :]
    assert {name for _, name in warm} == set(laws) and len(timed) == count * len(laws)
    assert all(len(drafted[name].output) == count for name in laws)
    places = {name: [number for number, (_, other) in enumerate(timed) if other == name] for name in laws}
    for one, other in combinations(laws, 2):
        assert 2 * sum(first < second for first, second in zip(places[one], places[other])) == count
