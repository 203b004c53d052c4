"""What a record's measurements amount to: a verdict per dimension and one honest sentence, both computed.

Judges nothing anew: each measurement already carries its verdict (`lib.measure.metrics.measurement`). Here they are put
together so that a gain never hides a loss, and said in plain English with ratio and interval. Knows nothing of files
or pages.
"""

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
    asked: Sequence[str] | None = None,
) -> Verdict:
    """Return the verdict of a run; one that failed or does not apply claims nothing and says why.

    `asked` are the dimensions that were to be measured, where not all were: the others are unavailable, and the
    sentence says so.
    """
    if status == "failed":
        return Verdict(sentence=f"Failed, so nothing is claimed: {_clause(reason)}.")
    if status == "not_applicable":
        return Verdict(sentence=f"Not applicable: {_clause(reason)}.")
    found = {name: [m for m in measurements if m.dimension == name] for name in DIMENSIONS}
    return Verdict(
        performance=_dimension(found["performance"]),
        accuracy=_accuracy(found["accuracy"]),
        resources=_dimension(found["resources"]),
        efficiency=_dimension(found["efficiency"]),
        sentence=_sentence(found, asked or DIMENSIONS),
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
    """Return the verdict of speed, size or efficiency: one loss beside one gain is `mixed`, an open question beside
    nothing but equality is `inconclusive`."""
    said = {m.verdict for m in measurements} - {"unavailable"}
    if "invalid" in said:
        return "invalid"
    gain, loss = bool(said & {"better"}), bool(said & {"worse", "not_maintained"})
    if gain and loss:
        return "mixed"
    if gain or loss:
        return "better" if gain else "worse"
    if not said:
        return "unavailable"
    judged = said - {"informative"}
    return "equivalent" if judged and judged <= {"equivalent", "maintained"} else "inconclusive"


def _accuracy(measurements: Sequence[Measurement]) -> Accuracy:
    """Return the verdict of quality: maintained only if every judged metric is."""
    said = {m.verdict for m in measurements} - {"unavailable", "informative"}
    if "invalid" in said:
        return "invalid"
    if said & {"not_maintained", "worse"}:
        return "not_maintained"
    if "inconclusive" in said:
        return "inconclusive"
    if said:
        return "maintained"
    return "inconclusive" if any(m.verdict == "informative" for m in measurements) else "unavailable"


def headline(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the measurements that stand for a dimension: the first known ones of `HEADLINES`, where there is none any
    other, and beside them up to two losses.
    """
    order = {name: rank for rank, name in enumerate(HEADLINES[dimension])}
    known = [m for m in measurements if m.verdict not in ("unavailable", "invalid")]
    known = [m for m in known if m.ratio or (dimension == "accuracy" and m.optimized is not None)]
    known.sort(key=lambda m: (order.get(m.metric, len(order)), m.verdict == "informative"))
    first = [m for m in known if m.metric in order][: SHOWN[dimension]] or known[:1]
    shown = {m.metric for m in first}
    losses = [m for m in known if m.verdict in ("worse", "not_maintained") and m not in first]
    return first + [m for m in losses if SAME_TIMES.get(m.metric) not in shown][:2]


def _sentence(found: dict[str, list[Measurement]], asked: Sequence[str]) -> str:
    broken = next((m for m in found["accuracy"] if m.verdict == "invalid"), None)
    parts = []
    if broken:
        parts.append(
            f"invalid: the optimized model's output has degenerated ({_clause(broken.reason)}), so no gain is shown"
        )
    say: dict[str, Callable[[Measurement], str]] = {
        "performance": _speed, "accuracy": _quality, "resources": _amount, "efficiency": _amount,
    }  # fmt: skip
    for name, phrase in say.items():
        if name not in asked or (broken and name != "resources"):
            continue
        chosen = headline(found[name], name)
        parts += [phrase(m) + _workload(m, found[name]) for m in chosen]
        if not chosen:
            parts.append(_nothing(name, found[name]))
    left_out = [name for name in DIMENSIONS if name not in asked]
    parts += [f"not asked for: {', '.join(left_out)}"] if left_out else []
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _nothing(dimension: str, measurements: Sequence[Measurement]) -> str:
    reason = next((m.reason for m in measurements if m.verdict == "unavailable" and m.reason), "nothing was measured")
    return f"{dimension} unavailable ({_clause(reason)})"


def _workload(found: Measurement, beside: Sequence[Measurement]) -> str:
    """Name the workload where a metric stands for more than one."""
    return f" [{found.workload}]" if sum(m.metric == found.metric for m in beside) > 1 else ""


def _clause(text: str | None) -> str:
    return one_line(text or "no reason was recorded").rstrip(".")


def subject(found: Measurement) -> str:
    """Return what a sentence is about: `prefill` for a rate, the label otherwise."""
    return SUBJECTS.get(found.metric, label(found.metric))


def gain(found: Measurement) -> tuple[float | None, float | None, float | None]:
    """Return ratio and interval turned so that above 1 is better; None where there is no ratio."""
    if not found.ratio or found.ratio < 0:
        return None, None, None
    low, high = found.ci or (None, None)
    if found.higher_is_better:
        return found.ratio, low, high
    return 1 / found.ratio, (1 / high if high else None), (1 / low if low else None)


def _estimate(found: Measurement) -> str:
    return ", estimated" if found.provenance == "estimated" else ""


def _speed(found: Measurement) -> str:
    name, (value, low, high) = subject(found), gain(found)
    ends = f" ({interval(low, high)}{_estimate(found)})" if low and high else f" (no interval{_estimate(found)})"
    if found.verdict == "better":
        return f"{name} {times(value)} faster{ends}"
    if found.verdict == "worse":
        slower = f" ({interval(1 / high, 1 / low)}{_estimate(found)})" if low and high else ends
        return f"{name} {times(1 / value)} slower{slower}"
    if found.verdict == "equivalent":
        return f"{name} speed equivalent at {times(value)}{ends}"
    if found.verdict == "inconclusive":
        least = f", detectable from {share(found.mde)}" if found.mde else ""
        return f"{name} speed inconclusive at {times(value)}{ends[:-1]}{least})"
    return f"{name} speed {times(value)}, not judged{ends}"


def _amount(found: Measurement) -> str:
    """Say by how much an amount (bytes, joules, FLOPs) fell or rose."""
    name, change = subject(found), found.ratio - 1
    less, more = ("smaller", "larger") if found.unit in ("bytes", "parameters") else ("lower", "higher")
    ends = ""
    if found.ci:
        low, high = sorted((end - 1) * (1 if change >= 0 else -1) * 100 for end in found.ci)
        ends = f"{interval(low, high, '.0f')} %"
    note = ", ".join(part for part in (ends, _estimate(found)[2:]) if part)
    note = f" ({note})" if note else ""
    if found.verdict == "equivalent":
        return f"{name} unchanged{note}"
    if found.verdict == "inconclusive":
        return f"{name} inconclusive at {times(found.ratio)}{note}"
    if change == 0:
        return f"{name} unchanged{note}"
    return f"{name} {share(abs(change))} {less if change < 0 else more}{note}"


def _quality(found: Measurement) -> str:
    """Say whether quality was maintained, with the difference, its interval or bound, and the margin it was held to."""
    word = {"informative": "not judged", "equivalent": "maintained"}.get(found.verdict, words(found.verdict))
    if found.baseline is None or found.optimized is None:
        return f"{subject(found)} {word}"
    in_points = found.unit == "share"
    scale = 100 * (found.baseline if in_points else 1)
    if in_points:
        change = f"{signed((found.optimized - found.baseline) * 100)} points"
    else:
        change = f"{signed((found.ratio - 1) * 100)} %" if found.ratio else figures(found.optimized)
    bound, margin = judged_by(found)
    if bound is None and found.ci and found.ratio:
        low, high = ((end - 1) * scale for end in found.ci)
        bound = interval(low, high, ".1f")
    return f"{subject(found)} {word} ({', '.join(part for part in (change, bound, margin) if part)})"


def judged_by(found: Measurement) -> tuple[str | None, str | None]:
    """Return the one-sided bound and the margin that a score was held to, in words; None for what is not known.

    A margin may be set for one run, so that of the list of metrics is not assumed where the measurement has none.
    """
    sign = "" if found.unit == "share" else " %"
    side = "lower" if found.higher_is_better else "upper"
    return (
        None if found.bound is None else f"{side} bound {signed(100 * found.bound)}{sign}",
        None if found.margin is None else f"margin {100 * found.margin:g}{sign}",
    )
