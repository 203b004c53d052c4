"""Non-inferiority of paired scores. A score is `maintained` only if the one-sided 95 % lower bound of (optimized −
baseline) lies above −margin. By the two-sided 95 % interval it is `not_maintained` if the whole interval lies below
−margin, and `better` if the whole interval lies above 0 and the gain reaches the margin. Otherwise it is
`inconclusive`, with the number of items that would suffice. Knows nothing about models.

Intervals are paired bootstraps over items, or over sources where items share one (windows of one document); the items
of a source are then drawn together. Losses of text are skewed, and a few windows may contain none of the large losses:
their interval is at least as wide as Hall's (`paired_stats.skewed_interval`).

Where few answers flipped, a bootstrap underestimates how frequent such flips may be, in either direction (with no flips
its interval is a point). Below five flips of a kind, the interval is at least as wide as the exact limits of both
shares, combined as in Newcombe (1998, Interval estimation for the difference between independent proportions). Exact
limits take items as independent, even items of one document: flips that did not occur cannot show how they would
cluster. A flip in a rare class weighs more in a macro mean than in a share: the limits of a macro mean are widened by
what an unseen flip can cost, given each class's own count (`score_bounds.unseen_loss`).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.catalogue import metric as metric_named
from lib.measure.metrics.digits import signed
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import score_bounds

ONE_SIDED = 0.05
MINIMUM_WINDOWS = 6
LARGEST_LOSS = 100.0  # nats; uniform guessing has about a dozen
LARGEST_CHANGE = 700.0  # nats, of an end of an interval: e to the power of 710 overflows
MDE_FACTOR = 2.80  # (1.96 + 0.84): two-sided 5 % level, 80 % power
NORMAL = 1.96
SAME = "same answers"  # begins the source of a score whose answers do not differ


def score(
    metric: str,
    workload: str,
    baseline: float,
    optimized: float,
    replicates_R: np.ndarray,
    *,
    n: int,
    to_wrong: int,
    to_right: int,
    source: str,
    counts: Sequence[int] | None = None,
    same: bool = False,
    identical: bool = False,
    margin: float | None = None,
    source_N: np.ndarray | None = None,
) -> Measurement:
    """Return the measurement of a score in [0, 1], judged by the resampled differences `replicates_R`.

    `to_wrong` counts right answers that became wrong, `to_right` wrong answers that became right. `counts` holds, for a
    macro mean, how many items each class's score rests on (`score_bounds.class_counts`); None for a share. `same`: both
    arms gave the same answers. `identical`: the label scores of the arms differ on no item, so that they are the same
    model and any number of items suffices. `source_N` is as in `score_bounds.resampled_scores`. A maintained score is
    not judged where there is nothing to lose (`_unless_nothing_to_lose`).
    """
    margin = metric_named(metric).margin if margin is None else margin
    assert margin is not None, f"{metric} has no margin"
    rarity = score_bounds.unseen_loss(counts, ONE_SIDED) / score_bounds.unseen_loss([n], ONE_SIDED) if counts else 1.0
    common: dict[str, Any] = {
        "baseline": baseline,
        "optimized": optimized,
        "ratio": optimized / baseline if baseline else None,
    }
    common |= {"n": n, "margin": margin, "provenance": "measured", "documents": documents(source_N, n)}
    if identical:
        description = f"{SAME}, {n} items, and the same scores; {source}"
        return measurement.judged(metric, workload, **common, verdict="maintained", source=description)
    difference = optimized - baseline
    if same:
        return _unless_nothing_to_lose(_same(metric, workload, common, rarity, f"{SAME}, {n} items; {source}"))
    low = float(np.quantile(replicates_R, ONE_SIDED))
    wide_low, wide_high = (float(end) for end in np.quantile(replicates_R, [ONE_SIDED / 2, 1 - ONE_SIDED / 2]))
    how = "paired bootstrap"
    if min(to_wrong, to_right) < score_bounds.FEW_FLIPS:
        how += f" and exact limits of few flips, {_independent(common['documents'])}"
        below, _ = score_bounds.allowance(to_wrong, to_right, n, ONE_SIDED, rarity)
        wide_below, wide_above = score_bounds.allowance(to_wrong, to_right, n, ONE_SIDED / 2, rarity)
        low = min(low, difference - below)
        wide_low, wide_high = min(wide_low, difference - wide_below), max(wide_high, difference + wide_above)
    half = max(difference - wide_low, wide_high - difference)
    verdict = judge(difference, low, wide_low, wide_high, margin)
    how += f", difference {difference:+.4f}, one-sided 95 % lower bound {low:+.4f}, margin {margin:g}"
    judged = measurement.judged(
        metric,
        workload,
        **common,
        ci=tuple((baseline + bound) / (baseline or 1) for bound in (wide_low, wide_high)),
        mde=detectable(half, margin),
        bound=low,
        verdict=verdict,
        source=f"{source}; {how}",
        reason=_too_few(n, half / NORMAL * math.sqrt(n), difference, margin, "items")
        if verdict == "inconclusive"
        else None,
    )
    return _unless_nothing_to_lose(judged)


def _unless_nothing_to_lose(judged: Measurement) -> Measurement:
    """Return the measurement, as informative if it is maintained only because the baseline's whole score is within the
    margin.
    """
    base, margin = judged.baseline or 0.0, judged.margin or 0.0
    if judged.verdict != "maintained" or base > margin:
        return judged
    reason = f"the baseline scores {base:.3g}, no more than the margin of {margin:g}: there is nothing to lose"
    return measurement.unjudged(judged, reason)


def _same(metric: str, workload: str, common: dict[str, Any], rarity: float, source: str) -> Measurement:
    """Return the measurement of two arms that gave the same answers: without an interval, judged by the exact bound of
    an unseen loss."""
    n, margin = common["n"], common["margin"]
    bound = -rarity * score_bounds.unseen_loss([n], ONE_SIDED)
    maintained = bound > -margin
    needed = math.ceil(rarity * math.log(ONE_SIDED) / math.log1p(-margin))
    return measurement.judged(
        metric,
        workload,
        **common,
        mde=detectable(rarity * score_bounds.unseen_loss([n], ONE_SIDED / 2), margin),
        bound=bound,
        verdict="maintained" if maintained else "inconclusive",
        source=f"{source}; exact one-sided 95 % bound of an unseen loss {bound:+.4f}, "
        f"{_independent(common['documents'])}, margin {margin:g}",
        reason=None
        if maintained
        else f"{n} items are too few: about {_about(max(needed, n + 1))} would show it maintained "
        "at the observed difference",
    )


def detectable(half: float, margin: float) -> float:
    """Return the loss that would be called `not_maintained` four times out of five: the interval's upper end must lie
    below −margin. `half` is the half-width of the two-sided 95 % interval.
    """
    return margin + half * MDE_FACTOR / NORMAL


def perplexity(
    baseline_N: np.ndarray,
    optimized_N: np.ndarray,
    *,
    source: str,
    margin: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
    source_N: np.ndarray | None = None,
    unit: str = "windows",
) -> Measurement:
    """Return the measurement of perplexity, judged by both arms' losses on the same windows, [N] in nats per token;
    `margin` is a share. `source_N` numbers the document of each window: windows of one document are resampled together.
    `unit` names what was read, if not windows. Invalid if a mean loss is not finite or exceeds LARGEST_LOSS.
    """
    largest = float(np.max([np.mean(baseline_N), np.mean(optimized_N)]))
    if not largest <= LARGEST_LOSS:  # true for NaN as well
        reason = f"a loss of {largest:.3g} nats: the output has degenerated, and no perplexity can be stated"
        return measurement.invalid("perplexity", "prefill", reason, source)
    margin = metric_named("perplexity").margin if margin is None else margin
    assert margin is not None, "perplexity has no margin"
    # Baseline − optimized: above 0 is a gain, as in `judge`.
    gain_N = np.asarray(baseline_N) - np.asarray(optimized_N)
    gain, n, limit = float(gain_N.mean()), len(gain_N), math.log1p(margin)
    low, _ = _loss_interval(gain_N, 1 - 2 * ONE_SIDED, resamples, seed, source_N)
    wide_low, wide_high = _loss_interval(gain_N, 1 - ONE_SIDED, resamples, seed, source_N)
    shared = documents(source_N, n)
    units, unit = (n, unit) if shared is None else (shared, "documents")
    bounds = f"upper bound {signed(100 * math.expm1(-low), '.2f')} %, margin {100 * margin:g} %"
    verdict = judge(gain, low, wide_low, wide_high, limit) if units >= MINIMUM_WINDOWS else "inconclusive"
    half = max(gain - wide_low, wide_high - gain)
    shown = units >= MINIMUM_WINDOWS and math.isfinite(half)  # an interval over fewer units is not worth showing
    return measurement.judged(
        "perplexity",
        "prefill",
        baseline=math.exp(float(np.mean(baseline_N))),
        optimized=math.exp(float(np.mean(optimized_N))),
        ratio=math.exp(-gain),
        ci=(math.exp(-wide_high), math.exp(-wide_low)) if shown and half > 0 else None,
        n=n,
        documents=shared,
        mde=detectable(half, limit) if shown else None,
        margin=margin,
        bound=math.expm1(-low) if shown else None,
        verdict=verdict,
        provenance="measured",
        source=f"{source}; paired bootstrap and Hall's interval over {units} {unit}, {bounds}" if shown else source,
        reason=_too_few(units, half / NORMAL * math.sqrt(units), gain, limit, unit)
        if verdict == "inconclusive"
        else None,
    )


def _independent(shared: int | None) -> str:
    """Return the assumption of exact bounds in words; it is not certain for items that share documents."""
    return "items taken as independent" + (f" although they come from {shared} documents" if shared else "")


def documents(source_N: np.ndarray | None, n: int) -> int | None:
    """Return how many documents `n` items or windows come from; None if every one has its own document."""
    count = n if source_N is None else len(np.unique(source_N))
    return count if count < n else None


def mean_interval(
    values_N: np.ndarray, confidence: float, resamples: int, seed: int, source_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of `values_N`; over sources if `source_N` is given."""
    return paired_stats.bootstrap_interval(values_N, confidence, resamples, seed, source_N)


def _loss_interval(
    values_N: np.ndarray, confidence: float, resamples: int, seed: int, source_N: np.ndarray | None
) -> tuple[float, float]:
    """Return the interval of a mean of losses, which are skewed: it covers the bootstrap's and Hall's interval."""
    drawn = mean_interval(values_N, confidence, resamples, seed, source_N)
    skewed = paired_stats.skewed_interval(values_N, confidence, source_N)
    low, high = min(drawn[0], skewed[0]), max(drawn[1], skewed[1])
    return (low, high) if math.isinf(low) else (max(low, -LARGEST_CHANGE), min(high, LARGEST_CHANGE))


def judge(gain: float, low: float, wide_low: float, wide_high: float, margin: float) -> str:
    """Return better, maintained, not_maintained or inconclusive for a gain (above 0 is better) with its one-sided lower
    bound `low` and its two-sided interval (`wide_low`, `wide_high`).
    """
    # Differences of shares have rounding errors, and a gain of exactly the margin counts.
    gain, low, wide_low, wide_high, margin = (round(value, 12) for value in (gain, low, wide_low, wide_high, margin))
    if wide_low > 0 and gain >= margin:
        return "better"
    if low > -margin:
        return "maintained"
    if wide_high < -margin:
        return "not_maintained"
    return "inconclusive"


def judge_again(stored: Measurement) -> str | None:
    """Return the verdict on a stored score, recomputed from its fields; None where they do not suffice."""
    judged = ("better", "maintained", "not_maintained", "inconclusive")
    if stored.dimension != "accuracy" or stored.verdict not in judged:
        return None
    if stored.margin is None or stored.bound is None or stored.baseline is None or stored.optimized is None:
        return None
    relative = stored.metric == "perplexity"
    margin = math.log1p(stored.margin) if relative else stored.margin
    low = -math.log1p(stored.bound) if relative else stored.bound
    if stored.ci is None:  # the same answers, or the same losses: no interval
        return "maintained" if low > -margin else "inconclusive"
    if relative:
        gain, wide_low, wide_high = (
            -math.log(end) for end in (stored.optimized / stored.baseline, stored.ci[1], stored.ci[0])
        )
    else:
        # Without a baseline above zero the interval is of `optimized` itself.
        scale = stored.baseline or 1.0
        gain, wide_low, wide_high = (
            end - stored.baseline for end in (stored.optimized, *(end * scale for end in stored.ci))
        )
    return judge(gain, low, wide_low, wide_high, margin)


def too_few_at(stored: Measurement, margin: float) -> str:
    """Return why a stored score in [0, 1] is inconclusive at another `margin`, with the number of items that would
    suffice. Without that number where the fields do not determine it (same answers, or a baseline of zero).
    """
    if stored.n is None:
        return "too few items to tell"
    if stored.ci is None or not stored.baseline or stored.optimized is None:
        return f"{stored.n} items are too few to tell"
    difference = stored.optimized - stored.baseline
    wide_low, wide_high = ((end - 1) * stored.baseline for end in stored.ci)
    half = max(difference - wide_low, wide_high - difference)
    return _too_few(stored.n, half / NORMAL * math.sqrt(stored.n), difference, margin, "items")


def _too_few(n: int, sigma: float, gain: float, margin: float, unit: str) -> str:
    """Return a sentence stating how many items would suffice four times out of five, at the observed spread and
    difference. Showing a loss beyond the margin takes the two-sided interval, and so more items than the one-sided
    bound.
    """
    distance = margin + min(gain, 0.0)
    factor = paired_stats.NON_INFERIORITY_FACTOR if distance > 0 else MDE_FACTOR
    needed = paired_stats.items_needed(sigma, abs(distance), factor) if math.isfinite(sigma) else MINIMUM_WINDOWS
    if needed is None or needed > 1_000_000:
        return f"{n} {unit} cannot decide: the observed difference lies at the margin"
    direction = "maintained" if distance > 0 else "not maintained"
    needed = max(needed, n + 1, MINIMUM_WINDOWS)
    return f"{n} {unit} are too few: about {_about(needed)} would show it {direction} at the observed difference"


def _about(count: int) -> str:
    """Return a count as text; from 1,000 upwards two digits, rounded up so that it suffices: 302,292 → "310,000"."""
    step = 10 ** (len(str(count)) - 2) if count >= 1000 else 1
    return f"{-(-count // step) * step:,}"
