"""A run whose stack is empty: a search, a rule or a bisection chose to change nothing. Its optimized model is a copy,
so what is timed of it is noise, and nothing timed is judged: one such interval in twenty would claim something.
"""

from collections.abc import Mapping
from typing import Any

from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.measurement import Measurement, unjudged

ENTRIES = ("stack", "order")  # of the details, in which such a run keeps its steps
NOTHING_CHANGED = "the stack is empty: both arms have the same weights, and what differs is noise"


def stored(details: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return (optimization, knobs) of the steps that details keep, in order; None where they keep none."""
    for name in ENTRIES:
        value = value_of(details, name)
        if isinstance(value, list) and all(isinstance(step, Mapping) and "optimization" in step for step in value):
            return [(str(step["optimization"]), dict(step.get("knobs") or {})) for step in value]
    return None


def value_of(details: Mapping[str, Any], name: str) -> Any:
    """Return the value of a detail, labelled or not; None where there is none."""
    entry = details.get(name)
    return entry.get("value") if isinstance(entry, Mapping) else entry


def withhold_if_unchanged(measurements: list[Measurement], details: Mapping[str, Any]) -> list[Measurement]:
    """Return the measurements; where the stack is empty, what has a noise floor is shown and not judged. Those of a
    busy machine stay as they are: they say so, and ask for another run.
    """
    if stored(details) != [] or why_busy(measurements):
        return measurements
    return [
        unjudged(m, NOTHING_CHANGED) if m.noise_floor is not None and m.dimension != "accuracy" else m
        for m in measurements
    ]
