"""What a busy machine does to a record: where foreign load was seen in more blocks than could be repeated, nothing that
was timed in the same run is a verdict.
"""

from collections.abc import Iterable

from lib.measure.metrics.measurement import Measurement

JUDGED = ("better", "worse", "equivalent")


def withhold_if_busy(measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements; where one of them was disturbed beyond repair, all that were timed are inconclusive."""
    reason = why_busy(measurements)
    if reason is None:
        return measurements
    return [
        m.model_copy(update={"verdict": "inconclusive", "reason": reason}) if _timed(m) and m.verdict in JUDGED else m
        for m in measurements
    ]


def why_busy(measurements: Iterable[Measurement]) -> str | None:
    """Return why nothing timed is judged, or None where the machine was quiet enough."""
    return next((m.reason for m in measurements if m.disturbed and m.reason), None)


def _timed(measurement: Measurement) -> bool:
    """Whether the number rests on time: it has a noise floor, and is of speed or of efficiency."""
    return measurement.noise_floor is not None and measurement.dimension in ("performance", "efficiency")
