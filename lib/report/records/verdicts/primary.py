"""Which measurement decides a dimension's verdict (its carrier), and which other losses count.

A template declares one primary (metric, workload) per dimension, before anything is measured. Its verdict is the
dimension's. If it cannot be used (missing, estimated, informative only, not exercised), the first usable metric of
`PREFERRED` replaces it, and the reason is recorded. A derived number is used only where no measured one can be, an
estimated one never.

All other judged measurements are guards: a loss among them counts only if it is beyond margin and floor (its own
verdict says so) and significant after Holm's correction over all guards of the record
(`lib.measure.metrics.significance`). Counted numbers have no spread and need no correction. A gain among the guards
never improves a verdict. Independent of files and of wording.
"""

from collections.abc import Mapping, Sequence

from lib.measure.metrics import significance
from lib.measure.metrics.busy import says_busy
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement

Pair = tuple[str, str]  # metric, workload
PREFERRED = {
    "performance": (
        "goodput_requests_per_second", "prefill_tokens_per_second", "decode_tokens_per_second",
        "batch_decode_tokens_per_second", "generate_tokens_per_second", "requests_per_second", "attention_ms",
        "time_to_first_token_ms", "time_per_output_token_ms",
    ),
    "accuracy": ("perplexity", "f1_macro", "retrieval_exact_match", "accuracy"),
    "resources": ("peak_tensor_bytes", "peak_memory_bytes", "checkpoint_bytes", "weights_bytes",
                  "kv_cache_bytes_per_token", "parameters"),
    "efficiency": ("energy_joules_per_token", "cpu_seconds_per_token", "decode_bytes_per_token",
                   "prefill_flops_per_token"),
}  # fmt: skip
# Each quantity is judged once: the metric on the left restates the one on the right.
TWINS = {
    "time_to_first_token_ms": "prefill_tokens_per_second",
    "time_per_output_token_ms": "decode_tokens_per_second",
    "tokens_per_joule": "energy_joules_per_token",
}
SILENT = ("unavailable", "informative", "not_exercised")
LOSSES = ("worse", "not_maintained")
NOT_MEASURED, ESTIMATE = "it was not measured", "it is only estimated"


def carrier(
    measurements: Sequence[Measurement], dimension: str, declared: Pair | None = None
) -> tuple[Measurement | None, str | None]:
    """Return the measurement that decides a dimension (None if none can), and why it is not the declared one (None: it
    is, or none was declared).
    """
    members = [m for m in measurements if m.dimension == dimension]
    able = [m for m in members if _can_carry(m)]
    able = [m for m in able if m.provenance == "measured"] or able
    chosen = next((m for m in able if (m.metric, m.workload) == declared), None)
    if chosen is not None or declared is None:
        return chosen or _first(able, dimension), None
    same = [m for m in able if m.metric == declared[0]]
    return _first(same or able, dimension), _why_not(members, declared, bool(able))


def _can_carry(measurement: Measurement) -> bool:
    if measurement.verdict in (*SILENT, "invalid") or measurement.provenance == "estimated":
        return False
    return measurement.ratio is not None or (measurement.dimension == "accuracy" and measurement.optimized is not None)


def _first(members: Sequence[Measurement], dimension: str) -> Measurement | None:
    order = {name: rank for rank, name in enumerate(PREFERRED[dimension])}
    return min(members, key=lambda m: order.get(m.metric, len(order)), default=None)


def _why_not(members: Sequence[Measurement], declared: Pair, others: bool) -> str:
    member = next((m for m in members if (m.metric, m.workload) == declared), None)
    if member is None:
        return NOT_MEASURED
    if member.provenance == "estimated":
        return ESTIMATE
    if member.provenance == "derived" and member.verdict not in SILENT and others:
        return "it is derived, and a measured number exists"
    return member.reason or f"its verdict is {member.verdict.replace('_', ' ')}"


def losses(
    measurements: Sequence[Measurement], carriers: Mapping[str, Measurement | None]
) -> list[tuple[Measurement, float | None]]:
    """Return the guards' losses that count, in the order of the dimensions, each with its p after Holm's correction
    over the record (None: a counted number, without spread). A guard withheld because the machine was busy is counted
    as a test with p = 1, so that it makes no other guard significant.
    """
    judged = {m.metric for m in measurements if m.verdict not in SILENT}
    guards = [
        m
        for m in measurements
        if _can_carry(m) and m is not carriers.get(m.dimension) and TWINS.get(m.metric) not in judged
    ]
    tested = [(m, 1.0 if says_busy(m.reason) else p) for m in guards if (p := significance.p_value(m)) is not None]
    corrected = dict(zip((id(m) for m, _ in tested), significance.holm([p for _, p in tested])))
    counted = [(m, corrected.get(id(m))) for m in guards if m.verdict in LOSSES]
    counting = [(m, p) for m, p in counted if (_without_spread(m) if p is None else p < significance.LEVEL)]
    return sorted(counting, key=lambda loss: DIMENSIONS.index(loss[0].dimension))


def _without_spread(measurement: Measurement) -> bool:
    """Return whether a number is free of chance: it was counted, or all its samples were equal."""
    if measurement.n in significance.SINGLE:
        return significance.is_counted(measurement)
    return measurement.ci is not None and measurement.ci[0] == measurement.ci[1]
