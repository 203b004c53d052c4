"""What the search asks a candidate: text first, and nothing else where text excludes it."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.measure.metrics import settings
from lib.measure.quality import evaluate
from lib.measure.quality.answers import Classified
from lib.models import loading
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.search import search_quality

MODEL = "qwen3-4b-instruct-2507"


@pytest.fixture(scope="module")
def quality():
    loaded = loading.load(MODEL, "proxy")
    return search_quality.prepare(loaded, settings.read("quick"), 0, items=8, values=2)


def _noisy(model, share: float):
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in anatomy(changed).blocks:
            for parameter in block.module.parameters():
                parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return changed


def test_candidates_excluded_by_text_are_asked_nothing_else(quality, monkeypatch):
    broken = _noisy(quality.loaded.model, 1.0)

    def refuse(*_, **__):
        raise AssertionError("asked although text excludes it")

    monkeypatch.setattr(evaluate, "evaluate", refuse)
    lost = quality.of(broken)
    assert lost.lost is None and lost.bound > 0.03 and not lost.within()
    assert "perplexity grows" in lost.why_not() and "score" not in lost.why_not()


def test_candidates_admitted_by_text_are_asked_everything_and_read_it_once(quality, monkeypatch):
    reads, read = [], evaluate.read
    monkeypatch.setattr(evaluate, "read", lambda *arguments: reads.append(1) or read(*arguments))
    lost = quality.of(quality.loaded.model)
    assert len(reads) == 1
    assert lost == search_quality.NOTHING_LOST or (lost.lost == 0 and abs(lost.perplexity) < 1e-6)
    whole = evaluate.evaluate(quality.loaded, quality.size, split="search", seed=quality.seed)
    assert [answers.task for answers in whole.classified] == [answers.task for answers in quality.baseline.classified]
    assert np.array_equal(whole.text.loss_N, quality.baseline.text.loss_N)


def test_a_larger_perplexity_margin_continues_with_questions(quality, monkeypatch):
    slightly = _noisy(quality.loaded.model, 0.2)
    growth = quality.of(slightly).perplexity
    assert growth > 0.03
    assert quality.of(slightly, perplexity_margin=100.0).lost is not None


def test_a_candidate_without_perplexity_is_within_no_margin(quality, monkeypatch):
    text = quality.baseline.text
    broken = replace(text, loss_N=np.full_like(text.loss_N, np.nan))
    monkeypatch.setattr(evaluate, "read_text", lambda *_: broken)
    lost = quality.of(quality.loaded.model, perplexity_margin=100.0)
    assert not lost.within(1.0, 100.0) and lost.why_not() == "perplexity is not a number"


def test_a_real_model_is_asked_one_task_and_few_values(monkeypatch):
    task_lists, values = [], []

    def ask(loaded, size, **options):
        task_lists.append(options["tasks"])
        values.append(size.retrieval_prompts)

    monkeypatch.setattr(evaluate, "evaluate", ask)
    for scale in ("full", "proxy"):
        loaded = SimpleNamespace(scale=scale, tasks=["topic", "code_origin"], model=None)
        search_quality.prepare(loaded, settings.read("quick"), 0)
    assert task_lists == [["topic"], ["topic", "code_origin"]]
    assert values == [search_quality.VALUES_AT_REAL_SIZE, search_quality.VALUES]


@pytest.mark.parametrize(
    ("effort", "sizes"), [("preview", (8, 6, 4)), ("quick", (96, 16, 64)), ("standard", (96, 16, 64))]
)
def test_only_a_preview_asks_too_few_items_to_show_one_loss(effort, sizes, monkeypatch):
    monkeypatch.setattr(search_quality, "_answers", lambda *arguments: None)
    loaded = SimpleNamespace(scale="proxy", model=None)
    size = search_quality.prepare(loaded, settings.read(effort), 0).size
    assert (size.items, size.windows, size.retrieval_prompts) == sizes


def public(right: int, n: int = 96) -> Classified:
    """Return answers to a public task of four choices, `right` of them correct."""
    chosen_N = (np.arange(n) >= right).astype(int)
    truth_N, scores_NL = np.zeros(n, dtype=int), np.eye(4)[chosen_N] - 5
    ids = [f"arc_easy-{place}" for place in range(n)]
    return Classified("arc_easy", list("0123"), ids, truth_N, chosen_N, scores_NL, metric="accuracy", chance=0.25)


@pytest.mark.parametrize(("before", "after", "lost"), [(72, 60, 0.125), (72, 72, 0.0), (24, 12, 0.0)])
def test_public_task_losses_count_unless_the_baseline_guesses(quality, monkeypatch, before, after, lost):
    """Previously a real model answered such a task for minutes, but the answers were ignored: it has no F1."""
    answers = replace(quality.baseline, classified=[public(before)], retrieved=None)
    asked = replace(quality, baseline=answers)
    monkeypatch.setattr(evaluate, "read_text", lambda *_: answers.text)
    monkeypatch.setattr(search_quality, "_answers", lambda *_: replace(answers, classified=[public(after)]))
    seen = asked.of(quality.loaded.model)
    assert seen.lost == pytest.approx(lost) and seen.within() == (lost <= 0.02)
