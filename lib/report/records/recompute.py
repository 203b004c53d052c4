"""Every verdict once more, from what is stored of it: where the stored and the recomputed word differ, one is wrong.

Uses the rules by which verdicts are reached (`lib.measure`), on the fields of a measurement alone: no samples, no
model.
"""

import math
from collections.abc import Iterable

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import noninferiority

SILENT = ("unavailable", "invalid", "informative", "not_exercised")


def differences(measurements: Iterable[Measurement]) -> list[str]:
    """Return a line for each measurement whose stored verdict is not the one that its fields make."""
    return [line for m in measurements if (line := difference(m))]


def difference(measurement: Measurement) -> str:
    """Return where stored and recomputed verdict differ, or nothing."""
    again = verdict(measurement)
    if again is None or again == measurement.verdict:
        return ""
    name = f"{measurement.metric} [{measurement.workload}]"
    stored, made = (word.replace("_", " ") for word in (measurement.verdict, again))
    return f"{name}: stored as {stored}, its fields make it {made}"


def verdict(measurement: Measurement) -> str | None:
    """Return the verdict that a measurement's fields make; None where they are not those of a judged number."""
    if measurement.verdict in SILENT:
        return None
    if measurement.provenance == "estimated" and measurement.dimension == "efficiency":
        return "informative"
    if measurement.dimension == "accuracy":
        return noninferiority.judge_again(measurement)
    if measurement.ci is None:
        return _counted(measurement)
    return _paired(measurement)


def _counted(measurement: Measurement) -> str | None:
    """Return the verdict on two numbers without spread: the margin alone."""
    baseline, optimized, margin = measurement.baseline, measurement.optimized, measurement.margin
    if baseline is None or optimized is None or margin is None:
        return None
    scale = 1 if METRICS[measurement.metric].margin_kind == "absolute" else abs(baseline)
    change = optimized - baseline
    if abs(change) <= margin * scale:
        return "equivalent"
    return "better" if (change > 0) == measurement.higher_is_better else "worse"


def _paired(measurement: Measurement) -> str | None:
    """Return the verdict on paired samples: interval, margin and noise floor."""
    ratio, ci, margin, floor = measurement.ratio, measurement.ci, measurement.margin, measurement.noise_floor
    if ratio is None or ratio <= 0 or ci is None or ci[0] <= 0 or margin is None or floor is None:
        return None
    if getattr(measurement, "disturbed", None):
        return "inconclusive"
    effect, low, high, threshold = math.log(ratio), math.log(ci[0]), math.log(ci[1]), math.log1p(margin)
    if (low > 0 or high < 0) and abs(effect) > max(threshold, floor):
        return "better" if (effect > 0) == measurement.higher_is_better else "worse"
    return "equivalent" if low > -threshold and high < threshold else "inconclusive"
