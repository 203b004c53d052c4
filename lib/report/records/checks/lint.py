"""Finds numbers that cannot be trusted: without label or source, missing without a reason, contradicting the metric
catalogue, or with a verdict that does not follow from their fields (`lib.report.records.checks.recompute`).

Works on a record as plain JSON, so that it can also check the output of a newer or broken version.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from lib.errors import UserError
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.records.checks import recompute
from lib.report.records.codec import TAG
from lib.report.records.record import Record, to_json

LABELS = ("measured", "derived", "estimated", "unavailable")
VALUES = ("baseline", "optimized", "ratio", "noise_floor", "mde", "predicted", "realised")


def lint(record: Record | Mapping[str, Any]) -> list[str]:
    """Return one line per fault, each with the record's stem and the place; empty where every number is labelled and
    every verdict follows from its numbers.
    """
    return labels(record) + verdicts(record)


def verdicts(record: Record | Mapping[str, Any]) -> list[str]:
    """Return one line per measurement whose verdict, recomputed from its fields, differs from the stored one."""
    content = to_json(record) if isinstance(record, Record) else record
    stem = f"{content.get('optimization', '?')}--{content.get('model', '?')}"
    partial = bool(content.get("dimensions"))
    faults = recompute.differences(_sound(content.get("measurements") or []), partial)
    for control in content.get("controls") or []:
        members = recompute.differences(_sound(control.get("measurements") or []), partial)
        faults += [f"control {control.get('name', '?')}: {fault}" for fault in members]
    return [f"{stem}: {fault}" for fault in faults]


def _sound(measurements: Iterable[Mapping[str, Any]]) -> Iterator[Measurement]:
    """Yield the well-formed measurements; `labels` reports the malformed ones."""
    for fields in measurements:
        try:
            yield Measurement.model_validate(fields)
        except (ValidationError, UserError, TypeError):
            continue


def labels(record: Record | Mapping[str, Any]) -> list[str]:
    """Return one line per fault in the labels, each with the record's stem and the place.

    In `details`, an entry that contains a number must be an object with the keys `provenance` and `source`.
    """
    content = to_json(record) if isinstance(record, Record) else record
    stem = f"{content.get('optimization', '?')}--{content.get('model', '?')}"
    faults = _measurements(content.get("measurements") or [], "")
    for control in content.get("controls") or []:
        faults += _measurements(control.get("measurements") or [], f"control {control.get('name', '?')}: ")
    for name, entry in (content.get("details") or {}).items():
        if has_number(entry):
            faults += [f"details.{name}: {fault}" for fault in _label(entry)]
    process = content.get("process")
    if process and has_number(process):
        faults += [f"process: {fault}" for fault in _label(process)]
    return [f"{stem}: {fault}" for fault in faults]


def _measurements(measurements: Iterable[Mapping[str, Any]], where: str) -> list[str]:
    return [f"{where}{m.get('metric', '?')} [{m.get('workload', '?')}]: {f}" for m in measurements for f in _faults(m)]


def _faults(measurement: Mapping[str, Any]) -> list[str]:
    listed = METRICS.get(str(measurement.get("metric")))
    if listed is None:
        return ["not in the list of metrics (lib/measure/metrics/catalogue.py)"]
    faults = [
        f"{name} is {measurement.get(name)!r}, the list says {getattr(listed, name)!r}"
        for name in ("unit", "dimension", "higher_is_better")
        if measurement.get(name) != getattr(listed, name)
    ]
    faults += _label(measurement)
    for name in VALUES:
        value = measurement.get(name)
        if isinstance(value, Mapping) or (isinstance(value, float) and not math.isfinite(value)):
            faults.append(f"{name} is not a finite number; what is unknown is null, with a reason")
    values = [measurement.get("baseline"), measurement.get("optimized")]
    if measurement.get("provenance") == "unavailable" and any(value is not None for value in values):
        faults.append("unavailable, yet it has a number")
    if values == [None, None] and measurement.get("provenance") != "unavailable":
        faults.append("has no number, yet is not labelled unavailable")
    if None in values and not measurement.get("reason"):
        faults.append("a number is missing without a reason")
    return faults


def _label(entry: Any) -> list[str]:
    if not isinstance(entry, Mapping):
        return ["holds numbers without provenance and source"]
    faults = [] if entry.get("provenance") in LABELS else [f"provenance is {entry.get('provenance')!r}"]
    return faults if entry.get("source") else [*faults, "has no source"]


def has_number(value: Any) -> bool:
    """Return whether `value` contains a number at any depth; booleans do not count."""
    if isinstance(value, Mapping):
        return TAG in value or any(has_number(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(has_number(item) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)
