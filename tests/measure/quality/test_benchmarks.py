"""Public tasks of two arms: scores as in the harness, the same items, and no verdict if the baseline guesses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.measure.metrics.catalogue import METRICS
from lib.measure.quality import answer_comparison, benchmarks, evaluate, noninferiority
from lib.measure.quality.answers import Classified, Rolled
from lib.models import loading
from lib.models.tasks import benchmarks as files
from lib.models.tasks import encoding
from lib.models.tasks.benchmarks import Question
from tests.measure.quality.test_evaluate import by_name

NAME = "qwen3-4b-instruct-2507"


def items(count: int = 40) -> tuple[Question, ...]:
    """Return questions of two to four choices of different lengths."""
    choices = (" a module", " json", " the standard library of the language", " os")
    return tuple(
        Question(f"arc_easy-{n}", f"Question: what is number {n}?\nAnswer:", choices[: 2 + n % 3], n % 2)
        for n in range(count)
    )


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return loading.load(NAME)


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.setattr(files, "questions", lambda _: items())
    return items()


def answered(right: float, n: int = 400, chance: float | None = 0.25, seed: int = 0) -> Classified:
    random = np.random.default_rng(seed)
    truth_N = random.integers(0, 4, n)
    chosen_N = np.where(random.random(n) < right, truth_N, (truth_N + 1) % 4)
    scores_NL = np.eye(4)[chosen_N] - 5
    others = {"accuracy": chosen_N == truth_N}
    fields = {"metric": "accuracy_norm", "others": others, "chance": chance, "about": "arc (test)"}
    return Classified("arc_easy", list("0123"), [str(i) for i in range(n)], truth_N, chosen_N, scores_NL, **fields)


@torch.no_grad()
def test_choice_scores_match_a_manual_computation(loaded, questions):
    answers = evaluate.classify(loaded, "arc_easy", "final", 12)
    assert len(answers.ids) == 12 and answers.metric == "accuracy" and set(answers.others) == {"accuracy_norm"}
    by_id = {item.id: item for item in questions}
    for identity, scores, truth, chosen, norm in zip(
        answers.ids, answers.scores_NL, answers.truth_N, answers.chosen_N, answers.others["accuracy_norm"]
    ):
        item = by_id[identity]
        expected = []
        for text in item.continuations:
            context, continuation = encoding.pair(loaded.tokenizer, item.context, text)
            logits_TV = loaded.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            rows = logits_TV[len(context) - 1 : -1].gather(-1, torch.tensor(continuation)[:, None])
            expected.append(rows.sum().item())
        assert scores[: len(expected)] == pytest.approx(expected, abs=1e-4) and truth == item.right
        assert (scores[len(expected) :] < -1e8).all() and chosen == np.argmax(expected)
        per_character = [score / len(text[1:]) for score, text in zip(expected, item.continuations)]
        assert norm == (np.argmax(per_character) == item.right)


def test_baseline_answers_are_cached_unless_a_prompt_changes(loaded, questions):
    first = evaluate.classify(loaded, "arc_easy", "final", 12)
    again = evaluate.classify(loaded, "arc_easy", "final", 12)
    assert first.answered is None and again.answered and (first.scores_NL == again.scores_NL).all()
    other = evaluate.classify(loaded, "arc_easy", "search", 99)
    assert not set(other.ids) & set(first.ids)
    loaded.tokenizer.chat_template = "{{ messages }}"
    assert evaluate.classify(loaded, "arc_easy", "final", 12).answered is None


def test_a_passage_is_right_if_it_would_be_generated(loaded, monkeypatch):
    ids = loaded.tokenizer("import json and then import").input_ids
    with torch.no_grad():
        greedy = loaded.tokenizer.decode(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
    passages = [
        Question(f"lambada-{n}", "import json and then import", (text,), 0)
        for n, text in enumerate([greedy, " xyz"] * 5)
    ]
    monkeypatch.setattr(files, "questions", lambda _: tuple(passages))
    answers = evaluate.classify(loaded, "lambada", "final", 99)
    assert answers.right_N.tolist() == [int(identity.split("-")[1]) % 2 == 0 for identity in answers.ids]


def test_the_usual_score_is_judged_and_the_task_names_the_workload():
    good, bad = answered(0.7, 2000), answered(0.6, 2000, seed=1)
    compared = by_name(answer_comparison.compare_classified(good, bad))
    assert set(compared) == {"accuracy_norm", "accuracy", "flips", "flips_to_wrong", "flips_to_right"} <= set(METRICS)
    assert {m.workload for m in compared.values()} == {"arc_easy"} and "arc (test), 2000 items" in compared[
        "flips"
    ].source
    assert compared["accuracy_norm"].verdict == "not_maintained" and compared["accuracy"].verdict == "informative"
    same = by_name(answer_comparison.compare_classified(good, good))
    assert same["accuracy_norm"].verdict == "maintained" and same["flips"].optimized == 0


def test_a_different_wrong_choice_is_not_the_same_answer():
    """Previously answers were called the same because no right one became wrong and no wrong one right."""
    good = answered(0.7)
    chosen_N = np.where(good.right_N, good.chosen_N, (good.truth_N + 2) % 4)
    moved = replace(good, chosen_N=chosen_N, scores_NL=np.eye(4)[chosen_N] - 5)
    compared = by_name(answer_comparison.compare_classified(good, moved))
    score = compared["accuracy_norm"]
    assert compared["flips"].optimized == 0 and score.verdict == "maintained" and score.ci is not None
    assert "same answers" not in score.source and noninferiority.judge_again(score) == "maintained"
    scored = replace(good, scores_NL=good.scores_NL + 0.1)
    same = by_name(answer_comparison.compare_classified(good, scored))["accuracy_norm"]
    assert same.source.startswith("same answers, 400 items") and same.ci is None


def test_a_baseline_at_chance_level_gives_no_verdict():
    guess, worse = answered(0.25), answered(0.2, seed=2)
    score = by_name(answer_comparison.compare_classified(guess, worse))["accuracy_norm"]
    assert score.verdict == "informative" and "no better than guessing (25 %)" in score.reason
    assert score.mde is None, "what is not judged detects nothing"
    assert (
        by_name(answer_comparison.compare_classified(replace(guess, chance=None), worse))["accuracy_norm"].verdict
        != "informative"
    )
    assert benchmarks.at_chance(answered(0.4).right_N, 0.25) is None


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="different items"):
        answer_comparison.compare_classified(answered(0.5, 40), answered(0.5, 48))


def test_documents_are_compared_by_perplexity():
    base = Rolled("lm_eval:wikitext", [str(n) for n in range(30)], np.random.default_rng(0).normal(3, 0.3, 30), "word")
    worse = replace(base, loss_N=base.loss_N + 0.2)
    judged = benchmarks.compare_rolled(base, worse)
    assert "over 30 documents, " in judged.source, "which are no windows"
    assert (
        judged.metric == "perplexity" and judged.workload == "lm_eval:wikitext" and judged.verdict == "not_maintained"
    )
    with pytest.raises(ValueError, match="different documents"):
        benchmarks.compare_rolled(base, replace(base, ids=["other"]))
