"""Non-inferiority of paired scores: `maintained` only if the one-sided 95 % lower bound of (optimized − baseline) lies
above −margin, `not_maintained` if the upper bound lies below it, else `inconclusive`, with the number of items that
would suffice. `better` if the two-sided interval lies above 0 and the gain passes the margin. Knows no models.

Intervals are paired bootstraps over items. With fewer than five right answers turned wrong, a bootstrap underestimates
how frequent such flips may be (without any its interval is a point); the lower bound is then at least as low as the
exact binomial bound.
"""

import math

import numpy as np

from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.catalogue import metric as metric_named
from lib.measure.metrics.measurement import Measurement

FEW_FLIPS = 5
ONE_SIDED = 0.05
MINIMUM_WINDOWS = 6


def resampled_scores(
    truth_N: np.ndarray, baseline_N: np.ndarray, optimized_N: np.ndarray, labels: int, resamples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return (optimized − baseline) of macro F1, precision, recall and accuracy, [R] each, in R paired resamples of the
    items.

    Items with the same truth and answers are exchangeable, so resampling items is drawing the counts of these kinds of
    items from a multinomial distribution. An undefined precision, recall or F1 of a label counts as 0.
    """
    kinds_K3, counts_K = np.unique(np.stack([truth_N, baseline_N, optimized_N], 1), axis=0, return_counts=True)
    n = len(truth_N)
    draws_RK = np.random.default_rng(seed).multinomial(n, counts_K / n, size=resamples)
    base, opt = (_macro(kinds_K3[:, 0], kinds_K3[:, arm], draws_RK, labels) for arm in (1, 2))
    return {name: opt[name] - base[name] for name in base}


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


def score(
    metric: str,
    workload: str,
    baseline: float,
    optimized: float,
    replicates_R: np.ndarray,
    *,
    n: int,
    to_wrong: int,
    source: str,
    identical: bool = False,
    margin: float | None = None,
) -> Measurement:
    """Return the verdict on a score in [0, 1] from resampled differences.

    `to_wrong`: items whose right answer became wrong. `identical`: the arms' scores differ on no item, so that they are
    one model and no number of items is too small.
    """
    margin = metric_named(metric).margin if margin is None else margin
    assert margin is not None, f"{metric} has no margin"
    difference = optimized - baseline
    low, high = np.quantile(replicates_R, [ONE_SIDED, 1 - ONE_SIDED])
    wide_low, wide_high = np.quantile(replicates_R, [ONE_SIDED / 2, 1 - ONE_SIDED / 2])
    if to_wrong < FEW_FLIPS and not identical:
        unseen = paired_stats.exact_upper_share(to_wrong, n) - to_wrong / n
        low, wide_low = min(low, difference - unseen), min(wide_low, difference - unseen)
    sigma = float(replicates_R.std()) * math.sqrt(n)
    verdict = judge(difference, low, high, wide_low, wide_high, margin)
    how = f"difference {difference:+.4f}, one-sided 95 % lower bound {low:+.4f}, margin {margin:g}"
    return measurement.judged(
        metric,
        workload,
        baseline=baseline,
        optimized=optimized,
        ratio=optimized / baseline if baseline else None,
        ci=tuple((baseline + bound) / (baseline or 1) for bound in (wide_low, wide_high)),
        n=n,
        mde=paired_stats.MDE_FACTOR * sigma / math.sqrt(n),
        margin=margin,
        bound=None if identical else float(low),
        verdict=verdict,
        provenance="measured",
        source=f"{source}; paired bootstrap, {'identical scores' if identical else how}",
        reason=_too_few(n, sigma, difference, margin, "items") if verdict == "inconclusive" else None,
    )


def perplexity(
    baseline_N: np.ndarray,
    optimized_N: np.ndarray,
    *,
    source: str,
    margin: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Measurement:
    """Return the verdict on perplexity from both arms' losses of the same windows, nats per token, [N]; the margin is
    a share.
    """
    margin = metric_named("perplexity").margin if margin is None else margin
    assert margin is not None, "perplexity has no margin"
    # Baseline − optimized: above 0 is a gain, as in `judge`.
    gain_N = np.asarray(baseline_N) - np.asarray(optimized_N)
    gain, n, limit = float(gain_N.mean()), len(gain_N), math.log1p(margin)
    low, high = paired_stats.bootstrap_interval(gain_N, 1 - 2 * ONE_SIDED, resamples, seed)
    wide_low, wide_high = paired_stats.bootstrap_interval(gain_N, 1 - ONE_SIDED, resamples, seed)
    verdict = judge(gain, low, high, wide_low, wide_high, limit) if n >= MINIMUM_WINDOWS else "inconclusive"
    sigma = float(gain_N.std(ddof=1)) if n > 1 else math.inf
    return measurement.judged(
        "perplexity",
        "prefill",
        baseline=math.exp(float(np.mean(baseline_N))),
        optimized=math.exp(float(np.mean(optimized_N))),
        ratio=math.exp(-gain),
        ci=(math.exp(-wide_high), math.exp(-wide_low)),
        n=n,
        mde=paired_stats.minimum_detectable_effect(gain_N) if n > 1 else None,
        margin=margin,
        bound=math.expm1(-low),
        verdict=verdict,
        provenance="measured",
        source=f"{source}; paired bootstrap over windows, upper bound {math.expm1(-low):+.2%}, margin {margin:.0%}",
        reason=_too_few(n, sigma, gain, limit, "windows") if verdict == "inconclusive" else None,
    )


def judge(gain: float, low: float, high: float, wide_low: float, wide_high: float, margin: float) -> str:
    """Return better, maintained, not_maintained or inconclusive for a gain (above 0 is better) with its one-sided
    (`low`, `high`) and two-sided (`wide_low`, `wide_high`) bounds.
    """
    if wide_low > 0 and gain >= margin:
        return "better"
    if low > -margin:
        return "maintained"
    if high < -margin:
        return "not_maintained"
    return "inconclusive"


def _too_few(n: int, sigma: float, gain: float, margin: float, unit: str) -> str:
    """Return the sentence on how many items would suffice, at the observed spread and difference."""
    distance = margin + min(gain, 0.0)
    if sigma == 0:
        # No flip at all: n with 1 − 0.05^(1/n) < margin.
        needed: int | None = math.ceil(math.log(ONE_SIDED) / math.log1p(-margin))
    else:
        needed = paired_stats.items_needed(sigma, abs(distance))
    if needed is None or needed > 1_000_000:
        return f"{n} {unit} cannot tell: the difference seen is at the margin itself"
    direction = "maintained" if distance > 0 else "not maintained"
    needed = max(needed, n + 1)
    return f"{n} {unit} are too few: about {needed} would show it {direction}, were the difference what it seems"
