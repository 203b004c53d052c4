"""Answers to public benchmarks, and how they differ between two arms.

A choice is scored by the log-likelihood of its text after the question, as lm-evaluation-harness does it: `accuracy`
takes the likeliest choice, `accuracy_norm` the likeliest per character. A passage with one continuation is right where
greedy decoding would give it. Items of the files (`lib.models.tasks.benchmarks`) and of the harness
(`lib.measure.quality.lm_eval`) end in the same `Classified`. Only the metric that is usually reported is judged, and
none where the baseline is at chance: it has nothing to lose.

Shapes: N items, L choices, as many as the item with the most has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

from lib.measure.metrics import measurement
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import answer_cache, noninferiority, score_bounds
from lib.measure.quality.answers import Classified, Rolled
from lib.models.decoding import continuations
from lib.models.loading import Loaded
from lib.models.tasks import benchmarks, encoding, splits
from lib.models.tasks.benchmarks import Question

NO_CHOICE = -1e9  # the log-likelihood of a choice that an item does not have
AT_CHANCE = 0.05  # largest probability with which guessing would do as well as a baseline that is to be judged


def answers(loaded: Loaded, name: str, split: str, limit: int) -> Classified:
    """Return the answers to at most `limit` items of a benchmark's split, chosen by its name alone."""
    questions = benchmarks.questions(name)
    items = [questions[index] for index in splits.chosen(name, len(questions), split, limit)]
    question: dict[str, object] = {"benchmark": name, "items": [[item.context, *item.continuations] for item in items]}
    scores, day = answer_cache.known_or(loaded, question, lambda: scored(loaded, items))
    about = f"{name} ({benchmarks.BENCHMARKS[name].data})"
    metric, chance = benchmarks.BENCHMARKS[name].metric, benchmarks.BENCHMARKS[name].chance
    ids = [item.id for item in items]
    if scores["scores_NL"].shape[1] == 1:  # one continuation: greedy or not
        right_N = scores["greedy_NL"][:, 0].astype(int)
        fields: dict[str, Any] = {"metric": metric, "chance": chance, "about": about, "answered": day}
        return Classified(name, ["other", "given"], ids, np.ones_like(right_N), right_N, scores["scores_NL"], **fields)
    lengths_NL = choice_lengths([[text.removeprefix(" ") for text in item.continuations] for item in items])
    right = np.array([item.right for item in items])
    return chosen(name, ids, right, scores["scores_NL"], lengths_NL, metric, chance=chance, about=about, answered=day)


def scored(loaded: Loaded, items: Sequence[Question]) -> dict[str, np.ndarray]:
    """Return the log-likelihoods of all continuations [N, L], NO_CHOICE where there is none, and which are greedy."""
    pairs = [encoding.pair(loaded.tokenizer, item.context, text) for item in items for text in item.continuations]
    likelihoods = iter(continuations.loglikelihoods(loaded.model, pairs))
    most = max(len(item.continuations) for item in items)
    scores_NL, greedy_NL = np.full((len(items), most), NO_CHOICE), np.zeros((len(items), most), dtype=bool)
    for row, item in enumerate(items):
        for column in range(len(item.continuations)):
            scores_NL[row, column], greedy_NL[row, column] = next(likelihoods)
    return {"scores_NL": scores_NL, "greedy_NL": greedy_NL}


def choice_lengths(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the characters of every choice [N, L], 1 where there is none; the space before a choice does not count."""
    lengths_NL = np.ones((len(texts), max(map(len, texts))))
    for row, choices in enumerate(texts):
        lengths_NL[row, : len(choices)] = [max(1, len(choice)) for choice in choices]
    return lengths_NL


def chosen(
    task: str,
    ids: list[str],
    truth_N: np.ndarray,
    scores_NL: np.ndarray,
    lengths_NL: np.ndarray,
    metric: str,
    **fields: Any,
) -> Classified:
    """Return the answers of choices by the likeliest and by the likeliest per character; `metric` is the judged one."""
    by = {"accuracy": scores_NL.argmax(1), "accuracy_norm": (scores_NL / lengths_NL).argmax(1)}
    others = {name: chosen_N == truth_N for name, chosen_N in by.items() if name != metric}
    labels = [str(choice) for choice in range(scores_NL.shape[1])]
    return Classified(task, labels, ids, truth_N, by[metric], scores_NL, metric=metric, others=others, **fields)


def compare(
    baseline: Classified, optimized: Classified, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return the scores of a public task and its flips; the task names the workload.

    Raises ValueError unless both arms answered the same items.
    """
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms answered different items")
    n, old_N, new_N = len(baseline.ids), baseline.right_N.astype(int), optimized.right_N.astype(int)
    to_wrong, to_right = int((old_N > new_N).sum()), int((old_N < new_N).sum())
    identical = bool(baseline.scores_NL.any() and np.abs(baseline.scores_NL - optimized.scores_NL).max() < 1e-4)
    day = f"; the baseline's answers of {baseline.answered}" if baseline.answered else ""
    source = f"{baseline.about or baseline.task}, {n} items, asked as lm-evaluation-harness does{day}"
    replicates = score_bounds.resampled_scores(np.ones(n, dtype=int), old_N, new_N, 2, resamples, seed)["accuracy"]
    judged = noninferiority.score(
        baseline.metric,
        baseline.task,
        float(old_N.mean()),
        float(new_N.mean()),
        replicates,
        n=n,
        to_wrong=to_wrong,
        to_right=to_right,
        same=bool((baseline.chosen_N == optimized.chosen_N).all()),  # a wrong choice may give way to another one
        identical=identical,
        margin=margin,
        source=source,
    )
    if reason := at_chance(old_N, baseline.chance):
        judged = measurement.unjudged(judged, reason)
    others = [
        measurement.informative(
            name, baseline.task, float(right_N.mean()), float(optimized.others[name].mean()), source, n=n
        )
        for name, right_N in baseline.others.items()
        if name in optimized.others
    ]
    counts = {"flips": to_wrong + to_right, "flips_to_wrong": to_wrong, "flips_to_right": to_right}
    how = f"{source}: {to_wrong} right answers became wrong, {to_right} wrong ones right"
    flips = [
        measurement.informative(name, baseline.task, 0, count, how, ratio=None, n=n) for name, count in counts.items()
    ]
    return [judged, *others, *flips]


def at_chance(right_N: np.ndarray, chance: float | None) -> str | None:
    """Return why these answers cannot be lost: guessing would do as well (binomial tail above AT_CHANCE); else None."""
    if chance is None:
        return None
    hits, n = int(right_N.sum()), len(right_N)
    if binom.sf(hits - 1, n, chance) <= AT_CHANCE:
        return None
    guessing = f"guessing ({percent(chance)}) does too: nothing to lose or to keep"
    return f"the baseline is right on {hits} of {n}, which {guessing}"


def compare_rolled(
    baseline: Rolled, optimized: Rolled, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> Measurement:
    """Return the perplexity of a task's documents. Raises ValueError unless both arms read the same ones."""
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms read different documents")
    source = f"{baseline.about or baseline.task}, {len(baseline.ids)} documents, per {baseline.unit}"
    options: dict[str, Any] = {"margin": margin, "resamples": resamples, "seed": seed, "unit": "documents"}
    judged = noninferiority.perplexity(baseline.loss_N, optimized.loss_N, source=source, **options)
    return judged.model_copy(update={"workload": baseline.task})
