"""The return on applying a stack: seconds and joules spent once, against those saved per token."""

from collections.abc import Sequence

import numpy as np

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement, Provenance
from lib.optimizations.pre_vs_post_optimization.method import AppliedStack

RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "batch_decode_tokens_per_second")


def returns(applied: AppliedStack, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the cost of applying, in seconds and joules, and the number of tokens after which each saving breaks even.

    A saving counts only if the verdict on the rate (or the energy per token) is better; otherwise the number is
    unavailable, with the reason.
    """
    informative = measurement.informative
    rows = [
        informative("apply_seconds", "apply", 0.0, applied.seconds, "perf_counter, once", ratio=None),
        informative("apply_joules", "apply", 0.0, applied.joules, applied.source, applied.provenance, ratio=None),
    ]
    for rate in measurements:
        joules = rate.metric == "energy_joules_per_token"
        timed, estimated = rate.metric in RATES, rate.provenance == "estimated"
        if not joules and not timed:
            continue
        name = f"{rate.workload}, by {'energy' if joules else 'time'}"
        if rate.verdict != "better" or not rate.baseline or not rate.ratio:
            reason = f"no gain was shown ({'it is only estimated' if estimated else rate.verdict})"
            rows.append(measurement.unavailable("break_even_tokens", name, reason))
            continue
        spent = applied.joules if joules else applied.seconds
        # From the judged ratio, which differs slightly from the ratio of the two medians.
        saved = rate.baseline * (1 - rate.ratio) if joules else (1 - 1 / rate.ratio) / rate.baseline
        source = f"{'joules' if joules else 'seconds'} of applying over those saved per token, {rate.workload}"
        provenance: Provenance = "estimated" if joules and applied.provenance == "estimated" else "derived"
        reason = "the baseline needs none"
        rows.append(informative("break_even_tokens", name, None, spent / saved, source, provenance, reason=reason))
    return rows


def account(applied: AppliedStack, rate: Measurement, points: int = 24) -> list[dict]:
    """Return the total time by token count, as rows `strength` (thousands of tokens), `value` (seconds) and `arm`.

    The optimized arm starts at the seconds of applying and saves by the judged ratio, as in `returns`, so the lines
    cross at the break-even. The range ends at twice the break-even or, without a gain, where applying is a tenth of the
    baseline's time.
    """
    assert rate.baseline and rate.ratio, "the rate has no numbers"
    before, after = 1 / rate.baseline, 1 / (rate.baseline * rate.ratio)
    end = 2 * applied.seconds / (before - after) if after < before else 10 * applied.seconds / before
    rows = []
    for tokens in np.linspace(0, end, points):
        rows.append({"strength": tokens / 1000, "value": before * tokens, "arm": "before"})
        rows.append(
            {"strength": tokens / 1000, "value": applied.seconds + after * tokens, "arm": "after, with applying"}
        )
    return rows


def in_words(rows: Sequence[Measurement]) -> str:
    """Return a clause on the number of prompt tokens after which the stack pays in time, or why that is not shown."""
    prefill = (m for m in rows if m.metric == "break_even_tokens" and m.workload.startswith("prefill"))
    point = next(prefill, None)
    if point is None:
        return "the break-even is unknown: no rate was measured"
    return (
        f"pays from about {_two_figures(point.optimized)} tokens"
        if point.optimized
        else f"is not shown to pay: {point.reason}"
    )


def _two_figures(value: float) -> str:
    """Return a number with two significant figures: the saving per token is known to about a tenth."""
    return f"{float(f'{value:.2g}'):,.0f}"
