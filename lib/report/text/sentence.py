"""The parts of a sentence on a measurement: its subject, its change with interval or bound, and why it is undecided.

The interval's width sets the number of digits. `lib.report.text.brief` makes phrases of these parts. Independent of
records and of the verdicts of dimensions.
"""

import math

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.digits import places, signed, with_ends
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_samples import judge_again
from lib.measure.quality.noninferiority import SAME
from lib.report.text.quantities import figures, times
from lib.report.text.wording import label, one_line

# Comparatives: a request rate is higher, a time is shorter, everything else is faster.
NO_REASON = "no reason was recorded"
COUNTED_PER_SECOND = ("goodput_requests_per_second", "requests_per_second", "goodput_share")
SUBJECTS = {
    "prefill_tokens_per_second": "prefill",
    "decode_tokens_per_second": "decode",
    "batch_decode_tokens_per_second": "batched decode",
    "generate_tokens_per_second": "generation",
    "f1_macro": "F1",
    "retrieval_exact_match": "retrieval",
    "weights_bytes": "weights",
    "energy_joules_per_token": "energy per token",
    "kv_cache_bytes_per_token": "KV cache per token",
    "decode_bytes_per_token": "memory traffic per decoded token",
    "prefill_flops_per_token": "compute per prefill token",
}


def subject(measurement: Measurement) -> str:
    """Return the subject of a sentence on a measurement: `prefill` for a rate, the metric's label otherwise."""
    return SUBJECTS.get(measurement.metric, label(measurement.metric))


def ends(measurement: Measurement) -> tuple[float | None, float | None]:
    """Return the ends of a measurement's interval, as ratios; a score's are clipped to the scores possible, [0, 1]."""
    low, high = measurement.ci or (None, None)
    if low is None or high is None or measurement.dimension != "accuracy" or measurement.unit != "share":
        return low, high
    return max(low, 0.0), min(high, 1 / (measurement.baseline or 1.0))


def gain(measurement: Measurement) -> tuple[float | None, float | None, float | None]:
    """Return ratio and interval, inverted where lower is better: above 1 is better. None where there is no ratio."""
    if not measurement.ratio or measurement.ratio < 0:
        return None, None, None
    low, high = ends(measurement)
    if measurement.higher_is_better:
        return measurement.ratio, low, high
    return 1 / measurement.ratio, (1 / high if high else None), (1 / low if low else None)


def change(measurement: Measurement) -> tuple[float, float | None, float | None, str] | None:
    """Return the change against the baseline, its interval and its unit: points for a share, else percent.

    None where there is nothing to compare.
    """
    base, value = measurement.baseline, measurement.optimized
    low, high = ends(measurement)
    if measurement.dimension == "accuracy" and measurement.unit == "share" and base is not None and value is not None:
        if low is None or high is None:
            return 100 * (value - base), None, None, "points"
        # With a baseline of zero the interval is that of the optimized arm itself.
        low, high = ((end - 1) * base if base else end for end in (low, high))
        return 100 * (value - base), 100 * low, 100 * high, "points"
    if measurement.ratio is None:
        return None
    if low is None or high is None:
        return (measurement.ratio - 1) * 100, None, None, "%"
    return (measurement.ratio - 1) * 100, (low - 1) * 100, (high - 1) * 100, "%"


def same_answers(measurement: Measurement) -> bool:
    """Return whether both arms gave the same answer to every item of a score; False where the optimization never
    acted, because then the agreement shows nothing.
    """
    acted = measurement.verdict != "not_exercised"
    return acted and measurement.dimension == "accuracy" and measurement.source.startswith(SAME)


def why(measurement: Measurement) -> str:
    """Return why a measurement is inconclusive, not judged or missing; empty where it is none of these.

    For an inconclusive effect: the gate it did not pass (interval, floor or margin), unless its own reason says more.
    """
    if measurement.verdict in ("better", "worse", "equivalent", "maintained", "not_maintained"):
        return ""
    if measurement.verdict in ("unavailable", "invalid", "not_exercised"):
        return clipped(measurement.reason)
    if measurement.verdict == "informative" and measurement.reason:
        return clipped(measurement.reason)
    if measurement.provenance == "estimated":
        return "it is only estimated"
    if measurement.verdict == "informative":
        if METRICS[measurement.metric].margin is None:
            return "it is informative only"
        return "its spread was not computed" if (measurement.n or 0) > 1 else "it was read once"
    ruling = None if measurement.disturbed else judge_again(measurement)
    if ruling is not None and ruling.verdict == "inconclusive":
        return clipped(ruling.reason)
    return clipped(measurement.reason)  # a score, or an outside cause: a busy machine, correction over the set


def clipped(text: str | None) -> str:
    """Return a reason on one line, without its full stop."""
    return one_line(text or NO_REASON).rstrip(".")


def ratio(value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """Return a ratio as `1.31×`, and its interval, both with as many digits as the interval's width supports."""
    if value is None:
        return times(None), ""
    text, ends = with_ends(value, low, high)
    return (times(value) if text is None else f"{text}×"), ends


def comparatives(measurement: Measurement) -> tuple[str, str]:
    """Return the comparatives for a better and a worse value of a speed metric, such as `faster` and `slower`."""
    if measurement.metric in COUNTED_PER_SECOND:
        return "higher", "lower"
    return ("shorter", "longer") if measurement.unit in ("ms", "s") else ("faster", "slower")


def score(measurement: Measurement) -> tuple[str, list[str]]:
    """Return the change of a score as text, and the basis of its verdict: bound and margin, or interval and margin."""
    known = change(measurement)
    if known is None:
        return (figures(measurement.optimized) if measurement.optimized is not None else "", [])
    value, low, high, unit = known
    if measurement.bound is None and low is not None and high is not None:
        text, ends = with_ends(value, low, high, 0, signs=True)
        return f"{text} {unit}", [f"{ends} {unit}", *_margin(measurement)]
    half = abs(value - 100 * measurement.bound) if measurement.bound is not None else 0.0
    digits = min(places(value - half, value + half), 2) if half else 1
    text = f"{signed(value, f'.{digits}f')} {unit}"
    return text, [*_bound(measurement, digits), *_margin(measurement)]


def _bound(measurement: Measurement, digits: int) -> list[str]:
    """Return the one-sided bound in words, rounded away from the change."""
    if measurement.bound is None:
        return []
    sign = "" if measurement.unit == "share" else " %"
    side = "lower" if measurement.higher_is_better else "upper"
    scale = 10.0**digits
    turn = math.floor if side == "lower" else math.ceil
    nudge = 1e-6 if side == "lower" else -1e-6
    outer = turn(100 * measurement.bound * scale + nudge) / scale
    return [f"{side} bound {signed(outer, f'.{digits}f')}{sign}"]


def _margin(measurement: Measurement) -> list[str]:
    """Return the measurement's own margin in words: a run may set one that differs from the catalogue's."""
    sign = "" if measurement.unit == "share" else " %"
    return [] if measurement.margin is None else [f"margin {100 * measurement.margin:g}{sign}"]
