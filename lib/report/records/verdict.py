"""The verdict of a record: a word per dimension and a sentence, both computed from its measurements.

Each measurement already carries its own verdict (`lib.measure.metrics.measurement`). Here they are combined so that a
gain never hides a loss, and written in plain English with ratio and interval. Knows nothing of files or pages.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement, invalid
from lib.report.text.quantities import figures, interval, share, signed, times
from lib.report.text.wording import label, one_line, words

Dimension = Literal["better", "worse", "equivalent", "mixed", "inconclusive", "invalid", "unavailable"]
Accuracy = Literal["maintained", "not_maintained", "inconclusive", "invalid", "unavailable"]
HEADLINES = {
    "performance": (
        "goodput_requests_per_second",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "batch_decode_tokens_per_second",
        "generate_tokens_per_second",
        "requests_per_second",
        "attention_ms",
        "time_to_first_token_ms",
        "time_per_output_token_ms",
    ),
    "accuracy": ("f1_macro", "retrieval_exact_match", "perplexity", "accuracy"),
    "resources": ("weights_bytes", "peak_memory_bytes", "kv_cache_bytes_per_token", "parameters"),
    "efficiency": ("energy_joules_per_token", "decode_bytes_per_token", "prefill_flops_per_token"),
}
SHOWN = {"performance": 2, "accuracy": 2, "resources": 1, "efficiency": 1}
SAME_TIMES = {
    "time_to_first_token_ms": "prefill_tokens_per_second",
    "time_per_output_token_ms": "decode_tokens_per_second",
}
# How a change is put into words: a rate of requests is higher, a time is shorter, anything else is faster.
COUNTED_PER_SECOND = ("goodput_requests_per_second", "requests_per_second", "goodput_share")
DURATIONS = (
    "time_to_first_token_ms", "time_per_output_token_ms", "attention_ms", "feed_forward_ms", "latency_p50_ms",
    "latency_p95_ms", "latency_p99_ms", "first_call_ms", "load_seconds", "settling_seconds",
    "objective_missed_seconds", "swap_ms",
)  # fmt: skip
PLURAL = ("weights_bytes", "parameters", "active_parameters", "tokens_per_joule", "flips", "flips_to_wrong",
          "flips_to_right", "same_answers", "batch_rows")  # fmt: skip
FIRST_INTERVAL = re.compile(r"\((?=\d[\d.]*–\d[^()]*\))")
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


class Verdict(BaseModel):
    """One word per dimension, and the sentence."""

    model_config = ConfigDict(extra="forbid")
    performance: Dimension = "unavailable"
    accuracy: Accuracy = "unavailable"
    resources: Dimension = "unavailable"
    efficiency: Dimension = "unavailable"
    sentence: str = ""


def judge(
    measurements: Sequence[Measurement],
    status: str = "ok",
    reason: str | None = None,
    requested: Sequence[str] | None = None,
) -> Verdict:
    """Return the verdict of a run; one that failed or does not apply claims nothing and says why.

    `requested` are the dimensions that were to be measured, where not all were: the others are unavailable, and the
    sentence says so.
    """
    if status == "failed":
        return Verdict(sentence=f"Failed, so nothing is claimed: {_clause(reason)}.")
    if status == "not_applicable":
        return Verdict(sentence=f"Not applicable: {_clause(reason)}.")
    by_dimension = {name: [m for m in measurements if m.dimension == name] for name in DIMENSIONS}
    return Verdict(
        performance=_dimension(by_dimension["performance"]),
        accuracy=_accuracy(by_dimension["accuracy"]),
        resources=_dimension(by_dimension["resources"]),
        efficiency=_dimension(by_dimension["efficiency"]),
        sentence=_sentence(by_dimension, requested or DIMENSIONS),
    )


def withhold_if_invalid(measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements; where accuracy is invalid, speed and efficiency are withheld: no gain of a broken
    model.
    """
    broken = next((m for m in measurements if m.dimension == "accuracy" and m.verdict == "invalid"), None)
    if broken is None:
        return measurements
    reason = f"withheld, the output has degenerated: {broken.reason or 'sanity gate'}"
    return [
        invalid(m.metric, m.workload, reason) if m.dimension in ("performance", "efficiency") else m
        for m in measurements
    ]


def _dimension(measurements: Sequence[Measurement]) -> Dimension:
    """Return the verdict of speed, size or efficiency: a gain and a loss are `mixed`; where nothing is gained or
    lost, one open question makes it `inconclusive`."""
    verdicts = {m.verdict for m in measurements} - {"unavailable"}
    if "invalid" in verdicts:
        return "invalid"
    gain, loss = bool(verdicts & {"better"}), bool(verdicts & {"worse", "not_maintained"})
    if gain and loss:
        return "mixed"
    if gain or loss:
        return "better" if gain else "worse"
    if not verdicts:
        return "unavailable"
    judged = verdicts - {"informative"}
    return "equivalent" if judged and judged <= {"equivalent", "maintained"} else "inconclusive"


def _accuracy(measurements: Sequence[Measurement]) -> Accuracy:
    """Return the verdict of quality: maintained only if every judged metric is."""
    verdicts = {m.verdict for m in measurements} - {"unavailable", "informative"}
    if "invalid" in verdicts:
        return "invalid"
    if verdicts & {"not_maintained", "worse"}:
        return "not_maintained"
    if "inconclusive" in verdicts:
        return "inconclusive"
    if verdicts:
        return "maintained"
    return "inconclusive" if any(m.verdict == "informative" for m in measurements) else "unavailable"


def headline(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the measurements that stand for a dimension: the first known ones of `HEADLINES` (or any other,
    where there is none), and up to two losses.
    """
    order = {name: rank for rank, name in enumerate(HEADLINES[dimension])}
    known = [m for m in measurements if m.verdict not in ("unavailable", "invalid")]
    known = [m for m in known if m.ratio or (dimension == "accuracy" and m.optimized is not None)]
    known.sort(key=lambda m: (order.get(m.metric, len(order)), m.verdict == "informative"))
    first = [m for m in known if m.metric in order][: SHOWN[dimension]] or known[:1]
    shown = {m.metric for m in first}
    losses = [m for m in known if m.verdict in ("worse", "not_maintained") and m not in first]
    return first + [m for m in losses if SAME_TIMES.get(m.metric) not in shown][:2]


def _sentence(by_dimension: dict[str, list[Measurement]], requested: Sequence[str]) -> str:
    broken = next((m for m in by_dimension["accuracy"] if m.verdict == "invalid"), None)
    parts = []
    if broken:
        parts.append(
            f"invalid: the optimized model's output has degenerated ({_clause(broken.reason)}), so no gain is shown"
        )
    say: dict[str, Callable[[Measurement], str]] = {
        "performance": _speed, "accuracy": _quality, "resources": _amount, "efficiency": _amount,
    }  # fmt: skip
    for name, phrase in say.items():
        if name not in requested or (broken and name != "resources"):
            continue
        chosen = headline(by_dimension[name], name)
        parts += [phrase(m) + _workload(m, by_dimension[name]) for m in chosen]
        if not chosen:
            parts.append(_nothing(name, by_dimension[name]))
    left_out = [name for name in DIMENSIONS if name not in requested]
    parts += [f"not asked for: {', '.join(left_out)}"] if left_out else []
    text = FIRST_INTERVAL.sub("(95 % interval ", "; ".join(parts), count=1)
    return text[:1].upper() + text[1:] + "."


def _nothing(dimension: str, measurements: Sequence[Measurement]) -> str:
    reason = next((m.reason for m in measurements if m.verdict == "unavailable" and m.reason), "nothing was measured")
    return f"{dimension} is unavailable ({_clause(reason)})"


def _workload(measurement: Measurement, beside: Sequence[Measurement]) -> str:
    """Name the workload where a metric stands for more than one."""
    return f" [{measurement.workload}]" if sum(m.metric == measurement.metric for m in beside) > 1 else ""


def _clause(text: str | None) -> str:
    return one_line(text or "no reason was recorded").rstrip(".")


def subject(measurement: Measurement) -> str:
    """Return what a sentence is about: `prefill` for a rate, the label otherwise."""
    return SUBJECTS.get(measurement.metric, label(measurement.metric))


def gain(measurement: Measurement) -> tuple[float | None, float | None, float | None]:
    """Return ratio and interval turned so that above 1 is better; None where there is no ratio."""
    if not measurement.ratio or measurement.ratio < 0:
        return None, None, None
    low, high = measurement.ci or (None, None)
    if measurement.higher_is_better:
        return measurement.ratio, low, high
    return 1 / measurement.ratio, (1 / high if high else None), (1 / low if low else None)


def _estimate(measurement: Measurement) -> str:
    return ", estimated" if measurement.provenance == "estimated" else ""


def _speed(measurement: Measurement) -> str:
    """Return a change of speed as a clause: by what factor, with its interval, or that it cannot be decided."""
    name, (value, low, high) = subject(measurement), gain(measurement)
    better, worse = _comparatives(measurement)
    noun = f"{name} speed" if better == "faster" else name
    estimate = _estimate(measurement)
    ends = f" ({interval(low, high)}{estimate})" if low and high else f" (no interval{estimate})"
    if measurement.verdict == "better":
        return f"{name} is {times(value)} {better}{ends}"
    if measurement.verdict == "worse":
        turned = f" ({interval(1 / high, 1 / low)}{estimate})" if low and high else ends
        return f"{name} is {times(1 / value if value else None)} {worse}{turned}"
    if measurement.verdict == "equivalent":
        return f"{noun} is equivalent at {times(value)}{ends}"
    if measurement.verdict == "inconclusive":
        least = f", detectable from {share(measurement.mde)}" if measurement.mde else ""
        return f"{noun} is inconclusive at {times(value)}{ends[:-1]}{least})"
    return f"{noun} is at {times(value)}, not judged{ends}"


def _comparatives(measurement: Measurement) -> tuple[str, str]:
    """Return what a better and a worse value of a metric of speed are called."""
    if measurement.metric in COUNTED_PER_SECOND:
        return "higher", "lower"
    return ("shorter", "longer") if measurement.metric in DURATIONS else ("faster", "slower")


def _amount(measurement: Measurement) -> str:
    """Return a change of an amount (bytes, joules, FLOPs) as a clause: by how much it fell or rose."""
    name = subject(measurement)
    if measurement.ratio is None:
        return f"{name} has no ratio"
    change = measurement.ratio - 1
    verb = "are" if measurement.metric in PLURAL else "is"
    less, greater = ("smaller", "larger") if measurement.unit in ("bytes", "parameters") else ("lower", "higher")
    ends = ""
    if measurement.ci:
        low, high = sorted((end - 1) * (1 if change >= 0 else -1) * 100 for end in measurement.ci)
        ends = f"{interval(low, high, '.0f')} %"
    note = ", ".join(part for part in (ends, _estimate(measurement)[2:]) if part)
    note = f" ({note})" if note else ""
    if measurement.verdict == "equivalent" or (change == 0 and measurement.verdict != "inconclusive"):
        return f"{name} {verb} unchanged{note}"
    if measurement.verdict == "inconclusive":
        ends = ", ".join([interval(*measurement.ci)] if measurement.ci else []) + _estimate(measurement)
        return f"{name} {verb} inconclusive at {times(measurement.ratio)}" + (f" ({ends.lstrip(', ')})" if ends else "")
    return f"{name} {verb} {share(abs(change))} {less if change < 0 else greater}{note}"


def _quality(measurement: Measurement) -> str:
    """Return whether quality was maintained as a clause: the difference, its interval or bound, and the margin."""
    verb = "are" if measurement.metric in PLURAL else "is"
    word = {"informative": "not judged", "equivalent": "maintained"}.get(
        measurement.verdict, words(measurement.verdict)
    )
    clause = f"{subject(measurement)} {verb} {word}"
    if measurement.baseline is None or measurement.optimized is None:
        return clause
    in_points = measurement.unit == "share"
    scale = 100 * (measurement.baseline if in_points else 1)
    if in_points:
        change = f"{signed((measurement.optimized - measurement.baseline) * 100)} points"
    else:
        change = f"{signed((measurement.ratio - 1) * 100)} %" if measurement.ratio else figures(measurement.optimized)
    bound, margin = judged_by(measurement)
    if bound is None and measurement.ci and measurement.ratio:
        low, high = ((end - 1) * scale for end in measurement.ci)
        bound = interval(low, high, ".1f")
    return f"{clause} ({', '.join(part for part in (change, bound, margin) if part)})"


def judged_by(measurement: Measurement) -> tuple[str | None, str | None]:
    """Return the one-sided bound and the margin that a score was held to, in words; None for what is not known.

    The margin of the list of metrics is not assumed where the measurement has none: a run may set its own.
    """
    sign = "" if measurement.unit == "share" else " %"
    side = "lower" if measurement.higher_is_better else "upper"
    return (
        None if measurement.bound is None else f"{side} bound {signed(100 * measurement.bound)}{sign}",
        None if measurement.margin is None else f"margin {100 * measurement.margin:g}{sign}",
    )
