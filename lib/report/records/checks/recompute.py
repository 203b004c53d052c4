"""Recomputes every verdict from a measurement's stored fields: if it differs from the stored one, one of them is wrong.

Applies the rules of `lib.measure` to the fields of a measurement alone: no samples, no model.
"""

from collections.abc import Iterable

from lib.measure.metrics.busy import says_busy, withhold_if_busy
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_samples import judge_again
from lib.measure.quality import noninferiority

SILENT = ("unavailable", "invalid", "informative", "not_exercised")


def differences(measurements: Iterable[Measurement], partial: bool = False) -> list[str]:
    """Return a line for each measurement of a record whose stored verdict does not follow from its fields.

    A `partial` record holds only some dimensions: the evidence of a busy machine may be in a missing one.
    """
    members = list(measurements)
    judged = [m.model_copy(update={"verdict": verdict(m) or m.verdict}) for m in members]
    expected = zip(members, withhold_if_busy(judged))
    return [
        line
        for stored, again in expected
        if (line := _line(stored, again.verdict)) and not (partial and _withheld_elsewhere(stored))
    ]


def _withheld_elsewhere(measurement: Measurement) -> bool:
    return measurement.verdict == "inconclusive" and says_busy(measurement.reason)


def _line(measurement: Measurement, again: str) -> str:
    if again == measurement.verdict:
        return ""
    name = f"{measurement.metric} [{measurement.workload}]"
    stored, computed = (word.replace("_", " ") for word in (measurement.verdict, again))
    return f"{name}: stored as {stored}, but its fields give {computed}"


def verdict(measurement: Measurement) -> str | None:
    """Return the verdict that follows from a measurement's fields; None where the number is not judged."""
    if measurement.verdict in SILENT:
        return None
    if measurement.provenance == "estimated" and measurement.dimension == "efficiency":
        return "informative"
    if measurement.dimension == "accuracy":
        return noninferiority.judge_again(measurement)
    if measurement.ci is None:  # a noisy number is not judged without an interval, a counted one by its margin
        return "informative" if measurement.noise_floor is not None else _counted(measurement)
    ruling = judge_again(measurement)
    return None if ruling is None else ruling.verdict


def _counted(measurement: Measurement) -> str | None:
    """Return the verdict on two numbers without spread, by the margin alone; None where one of the three is missing."""
    baseline, optimized, margin = measurement.baseline, measurement.optimized, measurement.margin
    if baseline is None or optimized is None or margin is None:
        return None
    scale = 1 if METRICS[measurement.metric].margin_kind == "absolute" else abs(baseline)
    change = optimized - baseline
    if abs(change) <= margin * scale:
        return "equivalent"
    return "better" if (change > 0) == measurement.higher_is_better else "worse"
