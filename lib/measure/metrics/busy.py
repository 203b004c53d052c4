"""Withholds verdicts on a busy machine. Nothing timed in a run is judged if foreign load disturbed more blocks than
could be repeated, or if a model differed from its own copy by more than a tenth in tokens per second.
"""

from collections.abc import Iterable

from lib.measure.metrics.decision import BUSY, BUSY_FLOOR, NOISY
from lib.measure.metrics.measurement import Measurement

JUDGED = ("better", "worse", "equivalent")
ON_DISK = ("page cache included", "disk")  # how names of workloads that wait for a disk end


def withhold_if_busy(measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements; if any shows a busy machine, all timed ones are inconclusive."""
    evidence = _shown_by(measurements)
    if evidence is None:
        return measurements
    # A noise floor belongs to one workload: the other workloads' measurements show floors of their own, so name it.
    elsewhere = evidence.reason if evidence.disturbed else f"{evidence.workload}: {evidence.reason}"
    return [
        m.model_copy(update={"verdict": "inconclusive", "reason": evidence.reason if m is evidence else elsewhere})
        if _timed(m) and m.verdict in JUDGED
        else m
        for m in measurements
    ]


def why_busy(measurements: Iterable[Measurement]) -> str | None:
    """Return why nothing timed is judged, or None where the machine was quiet enough."""
    evidence = _shown_by(measurements)
    return None if evidence is None else evidence.reason


def _shown_by(measurements: Iterable[Measurement]) -> Measurement | None:
    """Return the first measurement whose reason shows that the machine was too busy; None where there is none."""
    return next((m for m in measurements if m.reason and (m.disturbed or _unsteady(m))), None)


def says_busy(reason: str | None) -> bool:
    """Whether a measurement's `reason` states that the machine was busy (see `why_busy`)."""
    return reason is not None and (reason.startswith(BUSY) or NOISY in reason)


def _unsteady(measurement: Measurement) -> bool:
    """Whether two equal arms differed by too much in tokens per second. Single kernels are exempt because they are
    short, and workloads that wait for a disk because its rate drifts by itself; their own floor still withholds their
    own verdict.
    """
    if measurement.workload.endswith(ON_DISK):
        return False
    if measurement.provenance != "measured" or not measurement.metric.endswith("tokens_per_second"):
        return False
    return measurement.noise_floor is not None and measurement.noise_floor > BUSY_FLOOR


def _timed(measurement: Measurement) -> bool:
    """Whether the measurement rests on timing: it has a noise floor, and concerns performance or efficiency."""
    return measurement.noise_floor is not None and measurement.dimension in ("performance", "efficiency")
