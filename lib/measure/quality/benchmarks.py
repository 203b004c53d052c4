"""Answers public benchmarks and compares the answers of two arms.

A choice is scored by the log-likelihood of its text after the question, as in lm-evaluation-harness: `accuracy` takes
the likeliest choice, `accuracy_norm` the likeliest per character. A passage with a single continuation is right if
greedy decoding would produce it. Items from files (`lib.models.tasks.benchmarks`) and from the harness
(`lib.measure.quality.lm_eval`) both give a `Classified`. Only the metric that is usually reported is judged, and none
if the baseline is at chance, since it has nothing to lose.

Shapes: N items, L choices (the largest number of any item).
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

NO_CHOICE = -1e9  # log-likelihood that pads items with fewer choices
AT_CHANCE = 0.05  # a baseline is judged only if guessing does as well with at most this probability


def answers(loaded: Loaded, name: str, split: str, limit: int) -> Classified:
    """Return the answers to at most `limit` items of a benchmark's split; its name alone determines which items."""
    questions = benchmarks.questions(name)
    items = [questions[index] for index in splits.chosen(name, len(questions), split, limit)]
    question: dict[str, object] = {"benchmark": name, "items": [[item.context, *item.continuations] for item in items]}
    scores, day = answer_cache.known_or(loaded, question, lambda: scored(loaded, items))
    about = f"{name} ({benchmarks.BENCHMARKS[name].data})"
    metric, chance = benchmarks.BENCHMARKS[name].metric, benchmarks.BENCHMARKS[name].chance
    ids = [item.id for item in items]
    if scores["scores_NL"].shape[1] == 1:  # one continuation: right if greedy decoding gives it
        right_N = scores["greedy_NL"][:, 0].astype(int)
        fields: dict[str, Any] = {"metric": metric, "chance": chance, "about": about, "answered": day}
        return Classified(name, ["other", "given"], ids, np.ones_like(right_N), right_N, scores["scores_NL"], **fields)
    lengths_NL = choice_lengths([[text.removeprefix(" ") for text in item.continuations] for item in items])
    right = np.array([item.right for item in items])
    return chosen(name, ids, right, scores["scores_NL"], lengths_NL, metric, chance=chance, about=about, answered=day)


def scored(loaded: Loaded, items: Sequence[Question]) -> dict[str, np.ndarray]:
    """Return `scores_NL`, the log-likelihoods of all continuations (padded with NO_CHOICE), and `greedy_NL`, whether
    greedy decoding would produce them.
    """
    pairs = [encoding.pair(loaded.tokenizer, item.context, text) for item in items for text in item.continuations]
    likelihoods = iter(continuations.loglikelihoods(loaded.model, pairs))
    most = max(len(item.continuations) for item in items)
    scores_NL, greedy_NL = np.full((len(items), most), NO_CHOICE), np.zeros((len(items), most), dtype=bool)
    for row, item in enumerate(items):
        for column in range(len(item.continuations)):
            scores_NL[row, column], greedy_NL[row, column] = next(likelihoods)
    return {"scores_NL": scores_NL, "greedy_NL": greedy_NL}


def choice_lengths(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the number of characters of every choice [N, L], padded with 1. `texts` have no leading space."""
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
    """Return answers by the likeliest choice or by the likeliest per character: those of `metric`, which is judged; the
    other metric's correctness is in `others`.
    """
    by = {"accuracy": scores_NL.argmax(1), "accuracy_norm": (scores_NL / lengths_NL).argmax(1)}
    others = {name: chosen_N == truth_N for name, chosen_N in by.items() if name != metric}
    labels = [str(choice) for choice in range(scores_NL.shape[1])]
    return Classified(task, labels, ids, truth_N, by[metric], scores_NL, metric=metric, others=others, **fields)


def compare(
    baseline: Classified, optimized: Classified, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return the scores and flips of a public task, whose name is the workload.

    Raises ValueError unless both arms answered the same items.
    """
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms answered different items")
    n, base_N, opt_N = len(baseline.ids), baseline.right_N.astype(int), optimized.right_N.astype(int)
    to_wrong, to_right = int((base_N > opt_N).sum()), int((base_N < opt_N).sum())
    identical = bool(baseline.scores_NL.any() and np.abs(baseline.scores_NL - optimized.scores_NL).max() < 1e-4)
    day = f"; the baseline's answers of {baseline.answered}" if baseline.answered else ""
    source = f"{baseline.about or baseline.task}, {n} items, asked as lm-evaluation-harness does{day}"
    replicates = score_bounds.resampled_scores(np.ones(n, dtype=int), base_N, opt_N, 2, resamples, seed)["accuracy"]
    judged = noninferiority.score(
        baseline.metric,
        baseline.task,
        float(base_N.mean()),
        float(opt_N.mean()),
        replicates,
        n=n,
        to_wrong=to_wrong,
        to_right=to_right,
        same=baseline.same_answers(optimized),  # a wrong choice may become another wrong one
        identical=identical,
        margin=margin,
        source=source,
    )
    if reason := at_chance(base_N, baseline.chance):
        judged = measurement.unjudged(judged, reason)
    others = [
        measurement.informative(
            name, baseline.task, float(right_N.mean()), float(optimized.others[name].mean()), source, n=n
        )
        for name, right_N in baseline.others.items()
        if name in optimized.others
    ]
    counts = {"flips": to_wrong + to_right, "flips_to_wrong": to_wrong, "flips_to_right": to_right}
    source = f"{source}: {to_wrong} right answers became wrong, {to_right} wrong ones right"
    flips = [
        measurement.informative(name, baseline.task, 0, count, source, ratio=None, n=n)
        for name, count in counts.items()
    ]
    return [judged, *others, *flips]


def at_chance(right_N: np.ndarray, chance: float | None) -> str | None:
    """Return why a baseline's answers are not judged: guessing would do as well (its binomial tail exceeds AT_CHANCE).
    None where guessing would not, or `chance` is None.
    """
    if chance is None:
        return None
    hits, n = int(right_N.sum()), len(right_N)
    if binom.sf(hits - 1, n, chance) <= AT_CHANCE:
        return None
    guessing = f"no better than guessing ({percent(chance)}): there is nothing to lose"
    return f"the baseline is right on {hits} of {n}, {guessing}"


def compare_rolled(
    baseline: Rolled, optimized: Rolled, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> Measurement:
    """Return the perplexity of a task's documents. Raises ValueError unless both arms read the same documents."""
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms read different documents")
    source = f"{baseline.about or baseline.task}, {len(baseline.ids)} documents, per {baseline.unit}"
    options: dict[str, Any] = {"margin": margin, "resamples": resamples, "seed": seed, "unit": "documents"}
    judged = noninferiority.perplexity(baseline.loss_N, optimized.loss_N, source=source, **options)
    return judged.model_copy(update={"workload": baseline.task})
