"""Answers are paired per item, judged for non-inferiority, and compared with little memory."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from lib.errors import UserError
from lib.measure.metrics.catalogue import METRICS
from lib.measure.quality import answer_comparison, evaluate, noninferiority, score_bounds
from lib.measure.quality.answers import Classified, Retrieved, Rolled
from lib.models.loading import Loaded
from lib.models.parameters import read as read_parameters

LABELS = list("abcdefgh")


def classified(n: int, accuracy: float, seed: int = 0, wrong: int = 0) -> Classified:
    """Answers to n items at about `accuracy`, with `wrong` more of the right ones made wrong."""
    random = np.random.default_rng(seed)
    truth_N = np.arange(n) % len(LABELS)
    chosen_N = np.where(random.random(n) < accuracy, truth_N, (truth_N + 1) % len(LABELS))
    chosen_N[np.flatnonzero(chosen_N == truth_N)[:wrong]] = 0
    wrong_too = np.flatnonzero((chosen_N == truth_N) & (truth_N == 0))
    scores_NL = np.eye(len(LABELS))[chosen_N] + random.normal(size=(n, len(LABELS))) * 0.01
    assert len(wrong_too) or not wrong
    return Classified("topic", LABELS, [str(i) for i in range(n)], truth_N, chosen_N, scores_NL)


def by_name(measurements) -> dict:
    return {measured.metric: measured for measured in measurements}


def test_resampled_scores_match_scikit_learn():
    random = np.random.default_rng(1)
    truth_N, base_N, opt_N = random.integers(0, 4, (3, 60))
    drawn = score_bounds.resampled_scores(truth_N, base_N, opt_N, 4, 20000)
    slow = []
    for _ in range(300):
        pick = random.integers(0, 60, 60)
        options = {"labels": range(4), "average": "macro", "zero_division": 0}
        pair = [f1_score(truth_N[pick], arm[pick], **options) for arm in (base_N, opt_N)]
        slow.append(pair[1] - pair[0])
    assert drawn["f1_macro"].mean() == pytest.approx(np.mean(slow), abs=0.015)
    assert drawn["f1_macro"].std() == pytest.approx(np.std(slow), rel=0.15)
    whole = score_bounds._macro(truth_N, base_N, np.ones((1, 60)), 4)
    options = {"labels": range(4), "average": "macro", "zero_division": 0}
    assert whole["precision_macro"][0] == pytest.approx(precision_score(truth_N, base_N, **options))
    assert whole["recall_macro"][0] == pytest.approx(recall_score(truth_N, base_N, **options))


def test_same_answers_are_maintained_with_enough_items_and_inconclusive_with_few():
    few, many = classified(48, 0.9), classified(400, 0.9)
    other_few, other_many = (replace(arm, scores_NL=arm.scores_NL + 0.01) for arm in (few, many))
    scores = by_name(answer_comparison.compare_classified(few, other_few))
    assert scores["f1_macro"].verdict == scores["accuracy"].verdict == "inconclusive"
    assert "about 149" in scores["accuracy"].reason
    assert by_name(answer_comparison.compare_classified(many, other_many))["f1_macro"].verdict == "maintained"
    assert by_name(answer_comparison.compare_classified(few, few))["accuracy"].verdict == "maintained"


def test_a_lost_score_is_not_maintained_and_a_gained_one_is_better():
    good, bad = classified(800, 0.95), classified(800, 0.80, seed=1)
    lost, won = (
        by_name(answer_comparison.compare_classified(good, bad)),
        by_name(answer_comparison.compare_classified(bad, good)),
    )
    assert lost["f1_macro"].verdict == lost["accuracy"].verdict == "not_maintained"
    assert won["f1_macro"].verdict == "better"
    assert lost["f1_macro"].ci[0] < lost["f1_macro"].ratio < lost["f1_macro"].ci[1] < 1


def test_too_few_items_state_how_many_are_needed():
    good = classified(200, 1.0)
    other = replace(good, chosen_N=good.chosen_N.copy(), scores_NL=good.scores_NL + 1)
    good.chosen_N[:4] = (good.truth_N[:4] + 1) % 8
    other.chosen_N[4:10] = (good.truth_N[4:10] + 1) % 8
    accuracy = by_name(answer_comparison.compare_classified(good, other))["accuracy"]
    assert accuracy.verdict == "inconclusive" and "200 items are too few: about" in accuracy.reason


def test_non_inferiority_keeps_its_error_rate():
    """The true loss is the margin itself: `maintained` may come out at most slightly more than one time in twenty."""
    random, wrong = np.random.default_rng(0), 0
    for trial in range(300):
        truth_N = np.arange(1200) % 8
        base_N = np.where(random.random(1200) < 0.95, truth_N, (truth_N + 1) % 8)
        opt_N = np.where(random.random(1200) < 0.03, (truth_N + 1) % 8, base_N)
        opt_N = np.where((random.random(1200) < 0.17), np.where(base_N != truth_N, truth_N, opt_N), opt_N)
        true_loss = 0.95 * 0.03 * 0.83 + 0.95 * 0.03 * 0.17 - 0.05 * 0.17
        drawn = score_bounds.resampled_scores(truth_N, base_N, opt_N, 8, 500, trial)["accuracy"]
        score = noninferiority.score(
            "accuracy",
            "classify",
            float((base_N == truth_N).mean()),
            float((opt_N == truth_N).mean()),
            drawn,
            n=1200,
            to_wrong=int(((base_N == truth_N) & (opt_N != truth_N)).sum()),
            to_right=int(((base_N != truth_N) & (opt_N == truth_N)).sum()),
            margin=true_loss,
            source="simulation",
        )
        wrong += score.verdict in ("maintained", "better")
    assert wrong <= 27


def test_flips_are_counted_both_ways_though_accuracy_ties():
    base = classified(40, 1.0)
    other = replace(base, chosen_N=base.chosen_N.copy(), scores_NL=base.scores_NL + 1)
    base.chosen_N[:3] = (base.truth_N[:3] + 1) % 8
    other.chosen_N[3:6] = (base.truth_N[3:6] + 1) % 8
    metrics = by_name(answer_comparison.compare_classified(base, other))
    assert metrics["accuracy"].baseline == metrics["accuracy"].optimized
    assert (metrics["flips"].optimized, metrics["flips_to_wrong"].optimized, metrics["flips_to_right"].optimized) == (
        6,
        3,
        3,
    )


def test_a_retrieval_loss_is_detected():
    all_right, none_right = Retrieved(256, np.ones(64, bool)), Retrieved(256, np.zeros(64, bool))
    exact_match = answer_comparison.compare_retrieved(all_right, none_right)
    assert exact_match.verdict == "not_maintained" and exact_match.workload == "generate" and exact_match.optimized == 0


def test_other_wrong_values_are_not_the_same_answers():
    """Of 300 values the first half is right in both arms; previously the others were only checked for being wrong."""
    given_NV = np.arange(600).reshape(300, 2)
    base = Retrieved(256, np.arange(300) < 150, given_NV=given_NV)
    other = replace(base, given_NV=np.where(base.right_N[:, None], given_NV, given_NV + 1))
    same, moved = (answer_comparison.compare_retrieved(base, arm) for arm in (replace(base), other))
    assert same.source.startswith("same answers, 300 items") and same.ci is None
    assert "same answers" not in moved.source and moved.ci is not None
    assert same.verdict == moved.verdict == "maintained"


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.0, "maintained"), (0.005, "maintained"), (0.2, "not_maintained"), (-0.2, "better")]
)
def test_perplexity_uses_its_own_margin(loss, verdict):
    base_N = np.random.default_rng(0).normal(4, 0.3, 32)
    opt_N = base_N + loss + np.random.default_rng(1).normal(0, 0.01, 32)
    perplexity = noninferiority.perplexity(base_N, opt_N, source="32 windows")
    assert perplexity.verdict == verdict and perplexity.ratio == pytest.approx(math.exp(np.mean(opt_N - base_N)))
    assert noninferiority.perplexity(base_N[:4], opt_N[:4], source="4 windows").verdict == "inconclusive"


@torch.no_grad()
def test_text_read_in_chunks_matches_text_read_at_once(tiny, name, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", 96 * 5)
    base, other = tiny(name), tiny(name, seed=3)
    ids_NT = torch.randint(8, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    texts = [evaluate.read(model, ids_NT) for model in (base, other)]
    logits = [model(input_ids=ids_NT).logits.float().log_softmax(-1) for model in (base, other)]
    loss_N = -logits[0][:, :-1].gather(-1, ids_NT[:, 1:, None])[..., 0].mean(1)
    assert texts[0].loss_N == pytest.approx(loss_N.numpy(), rel=1e-4)
    kl_N, agree_N = evaluate.divergence(*texts)
    expected_N = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean(1)
    assert kl_N == pytest.approx(expected_N.numpy(), rel=1e-3)
    assert agree_N == pytest.approx((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean(1).numpy())
    assert evaluate.divergence(texts[0], texts[0])[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="different windows"):
        evaluate.divergence(texts[0], replace(texts[0], ids_NT=ids_NT + 1))


def loaded(tiny, *, random_weights: bool) -> Loaded:
    """A tiny model as `load` would return it, with a proxy model's tokenizer where it has answers."""
    name = "qwen3-4b-instruct-2507"
    model, tokenizer = tiny(name), None
    if not random_weights:
        from lib.models.proxies import tokenizer as tokenizers

        tokenizer = tokenizers.train(2048)
        model.resize_token_embeddings(2048)
        model.requires_grad_(False)
    fields = {"model": model, "tokenizer": tokenizer, "image_processor": None, "parameters": read_parameters(name)}
    place = {"name": name, "scale": "proxy", "device": "cpu", "dtype": torch.float32, "folder": None}
    return Loaded(**fields, **place, random_weights=random_weights, seconds=0.0)


def test_every_question_is_asked_once_and_a_baseline_is_reused(tiny):
    from lib.measure.metrics.settings import read as read_effort

    effort = replace(
        read_effort("quick"), items=8, windows=6, window_tokens=32, retrieval_prompts=4, retrieval_distance=32
    )
    proxy = loaded(tiny, random_weights=False)
    base = evaluate.evaluate(proxy, effort)
    changed = tiny("qwen3-4b-instruct-2507", seed=2)
    changed.resize_token_embeddings(2048)
    metrics = by_name(
        answer_comparison.compare(base, evaluate.evaluate(proxy, effort, model=changed.requires_grad_(False)))
    )
    scores = {"f1_macro", "precision_macro", "recall_macro", "accuracy", "retrieval_exact_match", "top1_agreement"}
    scores |= {"perplexity", "kl_divergence_nats", "flips", "flips_to_wrong", "flips_to_right"}
    assert set(metrics) == scores == set(answer_comparison.WORKLOAD_OF) and all(
        METRICS[name].dimension == "accuracy" for name in metrics
    )
    assert metrics["kl_divergence_nats"].optimized > 0 and metrics["perplexity"].n == 6
    again = by_name(answer_comparison.compare(base, base))
    assert again["kl_divergence_nats"].optimized == pytest.approx(0, abs=1e-5)
    assert again["top1_agreement"].optimized == 1 and again["perplexity"].verdict == "maintained"


def test_random_weights_have_no_quality_and_the_reason_is_given(tiny):
    answers = evaluate.evaluate(loaded(tiny, random_weights=True), "quick")
    metrics = answer_comparison.compare(answers, answers)
    assert all(m.verdict == "unavailable" and "random weights" in m.reason for m in metrics)
    assert [(m.metric, m.workload) for m in metrics] == list(answer_comparison.WORKLOAD_OF.items())


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="different items"):
        answer_comparison.compare_classified(classified(40, 1.0), classified(48, 1.0))


def test_tasks_can_be_selected_and_unknown_ones_are_named():
    from lib.models.tasks.registry import check_tasks

    check_tasks(["topic", "retrieval", "arc_easy", "hellaswag"])
    with pytest.raises(UserError, match=r'unknown task "topics".*Did you mean "topic"'):
        check_tasks(["topics"])


def test_an_unknown_task_is_refused_before_anything_runs():
    from lib.suite.plan import plan

    with pytest.raises(UserError, match=r'unknown task "topics"'):
        plan.plan(plan.Request(optimizations=("structured_pruning",), parameters={"tasks": "topics"}))


def test_losses_that_are_not_numbers_are_invalid_and_not_compared():
    ids = torch.zeros(6, 4, dtype=torch.long)
    sound, broken = (evaluate.Text(ids, np.full(6, loss), torch.zeros(6, 4, 2), None) for loss in (2.0, math.nan))
    for pair in ((sound, broken), (broken, sound)):
        measurements = answer_comparison.compare_text(*pair)
        assert [m.metric for m in measurements] == list(answer_comparison.OF_TEXT)
        assert {m.verdict for m in measurements} == {"invalid"} and "not finite" in measurements[0].reason


def test_two_label_tasks_are_two_workloads(monkeypatch):
    """Metric and workload identify one number: under a shared name the last of two would represent both."""
    tasks = ["topic", "code_origin"]
    monkeypatch.setattr(evaluate, "ask", lambda arm, name, *_: replace(classified(80, 0.9), task=name))
    for other in ("read_text", "retrieval"):
        monkeypatch.setattr(evaluate, other, lambda *_, **__: None)
    loaded = SimpleNamespace(random_weights=False, tasks=tasks)
    answers = evaluate.evaluate(loaded, "quick", acted=lambda: 0.0)
    assert answers.idle == {"classify", "code_origin", "prefill", "generate"}
    measured = answer_comparison.compare(replace(answers, idle=frozenset({"code_origin"})), answers)
    names = [(m.metric, m.workload) for m in measured]
    assert len(names) == len({*names}) == 14 and {workload for _, workload in names} == {"classify", "code_origin"}
    assert {m.verdict for m in measured if m.dimension == "accuracy"} == {"not_exercised", "informative"}


def test_a_perplexity_task_is_excluded_from_right_or_wrong_tasks(monkeypatch):
    """Two profiles were compared on every task of a model: a harness task that reads documents aborted the run."""
    asked = []

    def answer(arm, task, *_):
        asked.append((arm, task))
        return Rolled(task, ["a"], np.ones(1), "word") if task == "lm_eval:wikitext" else classified(8, 0.5)

    monkeypatch.setattr(evaluate.lm_eval, "answers", answer)
    names = ["lm_eval:wikitext", "lm_eval:arc_easy", "retrieval"]
    (both,) = evaluate.classified_by_all(["full", "fast"], names, "search", 8)
    assert len(both) == 2 and all(isinstance(answers, Classified) for answers in both)
    assert asked == [("full", "lm_eval:wikitext"), ("full", "lm_eval:arc_easy"), ("fast", "lm_eval:arc_easy")]
