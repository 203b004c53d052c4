"""Withholds verdicts on a busy machine: where foreign load was seen in more blocks than could be repeated, or a model
differed from its own copy by more than a tenth in tokens per second, nothing timed in that run is judged.
"""

from collections.abc import Iterable

from lib.measure.metrics.decision import BUSY, BUSY_FLOOR, NOISY
from lib.measure.metrics.measurement import Measurement

JUDGED = ("better", "worse", "equivalent")
ON_DISK = ("page cache included", "disk")  # ends of the names of workloads that wait for a disk


def withhold_if_busy(measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements; where one of them was disturbed beyond repair, all that were timed are inconclusive."""
    shown = _shown_by(measurements)
    if shown is None:
        return measurements
    # A noise floor is of one workload: beside the number of another it would contradict the floor that stands there.
    elsewhere = shown.reason if shown.disturbed else f"{shown.workload}: {shown.reason}"
    return [
        m.model_copy(update={"verdict": "inconclusive", "reason": shown.reason if m is shown else elsewhere})
        if _timed(m) and m.verdict in JUDGED
        else m
        for m in measurements
    ]


def why_busy(measurements: Iterable[Measurement]) -> str | None:
    """Return why nothing timed is judged, or None where the machine was quiet enough."""
    shown = _shown_by(measurements)
    return None if shown is None else shown.reason


def _shown_by(measurements: Iterable[Measurement]) -> Measurement | None:
    """Return the measurement which shows that the machine was too busy, with the reason; None where none does."""
    return next((m for m in measurements if m.reason and (m.disturbed or _unsteady(m))), None)


def says_busy(reason: str | None) -> bool:
    """Whether a reason is one of `why_busy`, whichever measurement of the run it was found in."""
    return reason is not None and (reason.startswith(BUSY) or NOISY in reason)


def _unsteady(measurement: Measurement) -> bool:
    """Whether two equal arms differed by too much in a rate of tokens; single kernels may, for being short, and what
    waits for a disk, whose rate wanders without any other work. Its own floor withholds its verdict all the same.
    """
    if measurement.workload.endswith(ON_DISK):
        return False
    if measurement.provenance != "measured" or not measurement.metric.endswith("tokens_per_second"):
        return False
    return measurement.noise_floor is not None and measurement.noise_floor > BUSY_FLOOR


def _timed(measurement: Measurement) -> bool:
    """Whether the number rests on time: it has a noise floor, and is of speed or of efficiency."""
    return measurement.noise_floor is not None and measurement.dimension in ("performance", "efficiency")
