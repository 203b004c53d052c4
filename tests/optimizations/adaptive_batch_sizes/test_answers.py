"""Answers computed together with other requests: every request is served, however small the cache or the text."""

from types import SimpleNamespace

import pytest
import torch

from lib.measure.serving.protocol import Limits
from lib.optimizations.adaptive_batch_sizes import answers, rivals


@pytest.mark.parametrize("share", [0.1, 0.9, 1.5, None])
def test_retrieval_prompts_are_not_refused_by_the_bound_of_other_requests(tiny, monkeypatch, share):
    """Previously prompts longer than any request of the setup were refused and then counted as wrong answers."""
    loaded = SimpleNamespace(model=tiny("qwen3-4b-instruct-2507"), tokenizer=None, device="cpu", parameters=None)
    effort = SimpleNamespace(retrieval_distance=40, retrieval_prompts=70)
    # A one-window text, as in a short corpus: the ids of the last requests lie beyond its end.
    monkeypatch.setattr(answers.tasks, "text_windows", lambda *_: torch.randint(8, 96, (1, 128)))
    per_token, longest = 4 * 2 * 4 * 8 * 4, 300
    limits = Limits(8, None if share is None else share * longest * per_token, per_token)
    retrieved, served = answers.retrieved_among_chats(loaded, effort, rivals.FixedSize(8), limits, 1000.0)
    assert served.refused == [] and all(outcome.finished is not None for outcome in served.outcomes)
    assert len(served.outcomes) == 2 * 70 and len(retrieved.right_N) == 70
    assert max(step.batch for step in served.steps) >= answers.TOGETHER


def test_items_of_one_document_are_resampled_together(monkeypatch):
    """Previously the interval treated each item as its own document, and batch size one still sent all at once."""
    label, asked = answers.tasks.class_labels("topic")[0], []
    items = [answers.tasks.Item(str(n), "topic", "", label, source=f"page {n // 3}") for n in range(12)]
    labels = len(answers.tasks.class_labels("topic"))

    def scores(loaded, task, group, batch):
        asked.append((len(group), batch))
        return torch.zeros(len(group), labels)

    monkeypatch.setattr(answers.tasks, "items", lambda *_: items)
    monkeypatch.setattr(answers.tasks, "label_scores", scores)
    loaded, effort = SimpleNamespace(tasks=["topic", "retrieval"]), SimpleNamespace(items=12)
    for batch in (1, 4):
        (answered,) = answers.classified(loaded, effort, batch)
        assert answered.source_N.tolist() == [n // 3 for n in range(12)] and answered.scores_NL.shape == (12, labels)
    assert asked == [(1, 1)] * 12 + [(12, 4)]


@pytest.mark.parametrize("batching", ["iteration", "request"])
def test_answers_are_served_with_the_batching_of_the_run(tiny, monkeypatch, batching):
    asked, serve = [], answers.serve

    def noted(*arguments, **options):
        asked.append(options["batching"])
        return serve(*arguments, **options)

    monkeypatch.setattr(answers, "serve", noted)
    monkeypatch.setattr(answers.tasks, "text_windows", lambda *_: torch.randint(8, 96, (1, 128)))
    model = tiny("qwen3-4b-instruct-2507")
    target_BV = torch.randint(8, 96, (4, 4))
    prompts = torch.randint(8, 96, (4, 40)), target_BV
    monkeypatch.setattr(answers.tasks, "retrieval_prompts", lambda *_: prompts)
    loaded = SimpleNamespace(model=model, tokenizer=None, device="cpu", parameters=None)
    effort = SimpleNamespace(retrieval_distance=40, retrieval_prompts=4)
    limits = Limits(8, None, 1024.0)
    retrieved, _ = answers.retrieved_among_chats(loaded, effort, rivals.FixedSize(8), limits, 1000.0, batching)
    assert asked == [batching] and retrieved.given_NV.shape == target_BV.shape
