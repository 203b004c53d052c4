"""Runs with an empty stack: a search, a rule or a bisection chose to change nothing. The optimized model is a copy, so
any timing difference is noise and no timing is judged: one interval in twenty would show a false effect.
"""

from collections.abc import Mapping
from typing import Any

from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.measurement import Measurement, unjudged

ENTRIES = ("stack", "order")  # entries of the details that hold a run's steps
NOTHING_CHANGED = "the stack is empty: both arms have the same weights, so any difference is noise"


def stored(details: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return (optimization, knobs) of the steps in a record's details, in order; None where it has no stack entry."""
    for name in ENTRIES:
        value = value_of(details, name)
        if isinstance(value, list) and all(isinstance(step, Mapping) and "optimization" in step for step in value):
            return [(str(step["optimization"]), dict(step.get("knobs") or {})) for step in value]
    return None


def value_of(details: Mapping[str, Any], name: str) -> Any:
    """Return the value of the detail `name`, with or without label; None where there is none."""
    entry = details.get(name)
    return entry.get("value") if isinstance(entry, Mapping) else entry


def withhold_if_unchanged(measurements: list[Measurement], details: Mapping[str, Any]) -> list[Measurement]:
    """Return the measurements; if the stack is empty, those with a noise floor are shown but not judged. Measurements
    of a busy machine stay unchanged: they say so, and ask for another run.
    """
    if stored(details) != [] or why_busy(measurements):
        return measurements
    return [
        unjudged(m, NOTHING_CHANGED) if m.noise_floor is not None and m.dimension != "accuracy" else m
        for m in measurements
    ]
