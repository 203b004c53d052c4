"""How far the true difference of two paired scores may lie from the observed one: paired resamples of shares and macro
means, and exact limits where few answers or none flipped. Knows nothing about margins or verdicts.

Shapes: N items, K kinds of items, R resamples, L labels, S sources, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import beta

from lib.measure.metrics import paired_stats

FEW_FLIPS = 5  # with fewer flips of a kind, a bootstrap underestimates how frequent they may be


def resampled_scores(
    truth_N: np.ndarray,
    baseline_N: np.ndarray,
    optimized_N: np.ndarray,
    labels: int,
    resamples: int,
    seed: int = 0,
    source_N: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return (optimized − baseline) of macro F1, precision, recall and accuracy, [R] each, in R paired resamples of the
    items, or of their sources.

    Items with the same truth and answers are exchangeable, so items are resampled by drawing the counts of these kinds
    of items from a multinomial distribution. `source_N` numbers the source of each item; with a single source
    nothing is known, and any difference may be the true one. An undefined precision, recall or F1 of a label is 0.
    """
    kinds_K3, kind_N, counts_K = np.unique(
        np.stack([truth_N, baseline_N, optimized_N], 1), axis=0, return_inverse=True, return_counts=True
    )
    chance, n = np.random.default_rng(seed), len(truth_N)
    sources = n if source_N is None else len(np.unique(source_N))
    if sources < 2:
        return {name: np.array([-1.0, 1.0]) for name in ("f1_macro", "precision_macro", "recall_macro", "accuracy")}
    if source_N is None or sources == n:
        draws_RK: np.ndarray = chance.multinomial(n, counts_K / n, size=resamples)
    else:
        _, source_N = np.unique(source_N, return_inverse=True)
        held_SK = np.zeros((sources, len(kinds_K3)))
        np.add.at(held_SK, (source_N.ravel(), kind_N.ravel()), 1)
        draws_RK = chance.multinomial(sources, np.full(sources, 1 / sources), size=resamples) @ held_SK
    base, opt = (_macro(kinds_K3[:, 0], kinds_K3[:, arm], draws_RK, labels) for arm in (1, 2))
    widened = paired_stats.small_sample(sources)
    drawn = {name: opt[name] - base[name] for name in base}
    return {name: values.mean() + (values - values.mean()) * widened for name, values in drawn.items()}


def _macro(truth_K: np.ndarray, chosen_K: np.ndarray, draws_RK: np.ndarray, labels: int) -> dict[str, np.ndarray]:
    true_KL, chosen_KL = np.eye(labels)[truth_K], np.eye(labels)[chosen_K]
    hits_RL, support_RL, chosen_RL = draws_RK @ (true_KL * chosen_KL), draws_RK @ true_KL, draws_RK @ chosen_KL

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0).mean(1)

    return {
        "f1_macro": share(2 * hits_RL, support_RL + chosen_RL),
        "precision_macro": share(hits_RL, chosen_RL),
        "recall_macro": share(hits_RL, support_RL),
        "accuracy": hits_RL.sum(1) / draws_RK.sum(1),
    }


def class_counts(truth_N: np.ndarray, chosen_N: np.ndarray, labels: int) -> list[int]:
    """Return, for each class that occurs, the number of items that its score rests on: the smaller of the number of
    items of the class and the number that received its label. One more flip costs the class about 1 / that number.
    """
    true_L, chosen_L = (np.bincount(values_N, minlength=labels) for values_N in (truth_N, chosen_N))
    return [int(min(true, chosen or true)) for true, chosen in zip(true_L, chosen_L) if true]


def unseen_loss(counts: Sequence[int], level: float) -> float:
    """Return the largest loss of a mean over classes that is still possible at `level` if none of the `counts` items of
    each class flipped.

    This is the largest mean of q_c under ∏(1 − q_c)^n_c ≥ level: 1 − q_c is proportional to n_c where that is below 1.
    With one class it is Clopper and Pearson's bound of a share never observed, 1 − level^(1/n).
    """
    n_C = np.asarray(counts, dtype=float)
    low, high = 0.0, 1.0 / n_C.min()
    for _ in range(80):
        middle = (low + high) / 2
        within = float((n_C * np.log(np.minimum(1.0, middle * n_C))).sum()) >= math.log(level)
        low, high = (low, middle) if within else (middle, high)
    return float((1 - np.minimum(1.0, high * n_C)).mean())


def allowance(to_wrong: int, to_right: int, n: int, level: float, rarity: float) -> tuple[float, float]:
    """Return how far below and above the observed difference the true one may lie: the exact limits of both flip shares
    at one-sided `level`, combined by square-and-add. `rarity` widens the limits of kinds with few flips.
    """

    def gaps(count: int) -> tuple[float, float]:
        low = float(beta.ppf(level, count, n - count + 1)) if count else 0.0
        high = float(beta.ppf(1 - level, count + 1, n - count)) if count < n else 1.0
        scale = rarity if count < FEW_FLIPS else 1.0
        return scale * (count / n - low), scale * (high - count / n)

    (wrong_low, wrong_high), (right_low, right_high) = gaps(to_wrong), gaps(to_right)
    return math.hypot(right_low, wrong_high), math.hypot(right_high, wrong_low)
