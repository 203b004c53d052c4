"""Compares the answers of two arms: every accuracy metric, paired per item, with verdicts of non-inferiority.

Works on given answers, which `lib.measure.quality.evaluate` collects. The verdicts are those of
`lib.measure.quality.noninferiority`. Knows nothing about particular optimizations.

Shapes: N items or windows, L labels.
"""

from typing import Any

import numpy as np

from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import benchmarks, evaluate, noninferiority, score_bounds
from lib.measure.quality.answers import Answers, Classified, Retrieved, Text

SCORES = ("f1_macro", "precision_macro", "recall_macro")
OF_TEXT = ("perplexity", "kl_divergence_nats", "top1_agreement")
NOT_FINITE = "its losses on held-out text are not finite (NaN or infinite)"
WORKLOAD_OF = {  # the metrics of `compare`
    **dict.fromkeys((*SCORES, "accuracy", "flips", "flips_to_wrong", "flips_to_right"), "classify"),
    "retrieval_exact_match": "generate",
    **dict.fromkeys(OF_TEXT, "prefill"),
}


def compare(
    baseline: Answers,
    optimized: Answers,
    *,
    margin: float | None = None,
    perplexity_margin: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Measurement]:
    """Return every accuracy metric of two arms: scores, flips, exact match, perplexity, divergence, agreement.

    The first labelled task has the workload "classify"; further ones and public tasks use their own names, so that
    every pair of metric and workload is unique. `margin` replaces the margin of the scores (a difference),
    `perplexity_margin` that of the perplexity (a share).
    """
    if reason := baseline.reason or optimized.reason:
        return [measurement.unavailable(name, workload, reason) for name, workload in WORKLOAD_OF.items()]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    measurements: list[Measurement] = []
    for base, opt in zip(baseline.classified, optimized.classified, strict=True):
        used = {m.workload for m in measurements}
        of_task = compare_classified(base, opt, margin=margin, **options)
        measurements += [m.model_copy(update={"workload": base.task}) if m.workload in used else m for m in of_task]
    for base_losses, opt_losses in zip(baseline.rolled, optimized.rolled, strict=True):
        measurements.append(benchmarks.compare_rolled(base_losses, opt_losses, margin=perplexity_margin, **options))
    if baseline.retrieved and optimized.retrieved:
        measurements.append(compare_retrieved(baseline.retrieved, optimized.retrieved, margin=margin, **options))
    if baseline.text and optimized.text:
        measurements += compare_text(baseline.text, optimized.text, margin=perplexity_margin, **options)
    return [not_exercised(m) if m.workload in optimized.idle else m for m in measurements]


def not_exercised(m: Measurement) -> Measurement:
    """Return a judged measurement with the verdict not_exercised: the optimization never acted on these prompts."""
    if m.verdict in ("informative", "invalid"):
        return m
    reason = f"the optimization never acted on these prompts ({m.workload}), so their answers say nothing about it"
    update = {"verdict": "not_exercised", "reason": reason, "ci": None, "mde": None, "bound": None, "margin": None}
    return m.model_copy(update=update)


def compare_classified(
    baseline: Classified, optimized: Classified, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return macro F1, precision, recall, accuracy and the flips of one task. Where the baseline is no better than
    guessing, a maintained score is not judged. Raises ValueError unless both arms answered the same items.
    """
    if baseline.metric:  # of a public task
        return benchmarks.compare(baseline, optimized, margin=margin, resamples=resamples, seed=seed)
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms answered different items")
    truth_N, labels = baseline.truth_N, len(baseline.labels)
    replicates = score_bounds.resampled_scores(
        truth_N, baseline.chosen_N, optimized.chosen_N, labels, resamples, seed, baseline.source_N
    )
    same = bool((baseline.chosen_N == optimized.chosen_N).all())
    counts = score_bounds.class_counts(truth_N, baseline.chosen_N, labels)
    identical = bool(np.abs(baseline.scores_NL - optimized.scores_NL).max() < 1e-4)
    to_wrong = int((baseline.right_N & ~optimized.right_N).sum())
    to_right = int((~baseline.right_N & optimized.right_N).sum())
    n = len(baseline.ids)
    scores = [
        noninferiority.score(
            name,
            "classify",
            _score(name, baseline),
            _score(name, optimized),
            replicates[name],
            n=n,
            to_wrong=to_wrong,
            to_right=to_right,
            counts=None if name == "accuracy" else counts,
            same=same,
            identical=identical,
            margin=margin,
            source_N=baseline.source_N,
            source=f"{baseline.task}, {n} items of the same prompts, label by log-likelihood, scikit-learn"
            + _before(baseline),
        )
        for name in replicates
    ]
    chance = float(np.bincount(truth_N, minlength=labels).max()) / n  # by always answering the most frequent label
    if not identical and (reason := benchmarks.at_chance(baseline.right_N, chance)):
        scores = [measurement.unjudged(m, reason) if m.verdict == "maintained" else m for m in scores]
    source = f"{baseline.task}, {n} items: {to_wrong} right answers became wrong, {to_right} wrong ones right"
    flips = {"flips": to_wrong + to_right, "flips_to_wrong": to_wrong, "flips_to_right": to_right}
    return scores + [
        measurement.informative(name, "classify", 0, count, source, ratio=None, n=n) for name, count in flips.items()
    ]


def _before(baseline: Classified | Retrieved) -> str:
    """Return a phrase that dates the baseline's answers if they are older than this run, else an empty string."""
    if baseline.answered is None:
        return ""
    return f"; the baseline's answers of {baseline.answered} (same weights, code, data and machine)"


def _score(name: str, arm: Classified) -> float:
    from sklearn import metrics  # imported late: takes half a second, and is needed only for answers

    if name == "accuracy":
        return float(metrics.accuracy_score(arm.truth_N, arm.chosen_N))
    score = dict(zip(SCORES, (metrics.f1_score, metrics.precision_score, metrics.recall_score)))[name]
    labels = np.arange(len(arm.labels))
    return float(score(arm.truth_N, arm.chosen_N, labels=labels, average="macro", zero_division=0))


def compare_retrieved(
    baseline: Retrieved, optimized: Retrieved, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> Measurement:
    """Return the exact match of generated values, judged by non-inferiority."""
    n = len(baseline.right_N)
    base_N, opt_N = baseline.right_N.astype(int), optimized.right_N.astype(int)
    truth_N = np.ones(n, dtype=int)
    replicates = score_bounds.resampled_scores(truth_N, base_N, opt_N, 2, resamples, seed, baseline.source_N)
    return noninferiority.score(
        "retrieval_exact_match",
        "generate",
        float(baseline.right_N.mean()),
        float(optimized.right_N.mean()),
        replicates["accuracy"],
        n=n,
        to_wrong=int((baseline.right_N & ~optimized.right_N).sum()),
        to_right=int((~baseline.right_N & optimized.right_N).sum()),
        same=baseline.same_as(optimized),
        margin=margin,
        source_N=baseline.source_N,
        source=f"{n} generated values over {baseline.distance} tokens, greedy, exact match" + _before(baseline),
    )


def compare_text(
    baseline: Text, optimized: Text, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return perplexity (judged by margin), KL divergence from the baseline and agreement of the most likely token; all
    are invalid if an arm's losses are not finite.
    """
    if not (np.isfinite(baseline.loss_N).all() and np.isfinite(optimized.loss_N).all()):
        return [measurement.invalid(name, "prefill", NOT_FINITE, "losses of held-out text") for name in OF_TEXT]
    kl_N, agree_N = evaluate.divergence(baseline, optimized)
    windows, tokens = baseline.ids_NT.shape
    source = f"{windows} {baseline.name} windows of {tokens} tokens"
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "source_N": baseline.source_N}
    perplexity = noninferiority.perplexity(baseline.loss_N, optimized.loss_N, margin=margin, source=source, **options)
    documents = noninferiority.documents(baseline.source_N, windows)

    def mean(metric: str, equal_arms: float, values_N: np.ndarray, what: str, **fields: Any) -> Measurement:
        low, high = noninferiority.mean_interval(values_N, paired_stats.CONFIDENCE, **options)
        ci = max(low, 0.0), high if equal_arms == 0 else min(high, equal_arms)  # clipped to the metric's range
        value = float(values_N.mean())
        return measurement.informative(
            metric, "prefill", equal_arms, value, f"{source}, {what}", ci=ci, n=windows, documents=documents, **fields
        )

    kl = mean("kl_divergence_nats", 0.0, kl_N, "KL(baseline ‖ optimized) over the whole vocabulary", ratio=None)
    agreement = mean("top1_agreement", 1.0, agree_N, "share of positions with the same most likely token")
    return [perplexity, kl, agreement]
