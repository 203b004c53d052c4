"""A result set as plain JSON, the content of the suites' result files, computed from records alone.

Lists what is present, missing and failed, and aggregates over models; never judges. Knows no file names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lib.measure.metrics.catalogue import DIMENSIONS, METRICS
from lib.report.analysis import headlines, ranking, strength_curves
from lib.report.analysis.noise import discoveries
from lib.report.records import schema
from lib.report.records.record import Record, read_folder, to_json
from lib.report.records.setting import facts
from lib.report.text import sentence


@dataclass(frozen=True)
class Results:
    """The records of a result folder, sorted. `damaged` is stem → fault; `optimizations` and `models` are expected, so
    that missing runs can be named; `folder` is None for records that are in no folder.
    """

    scale: str
    records: list[Record]
    damaged: dict[str, str] = field(default_factory=dict)
    optimizations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    folder: Path | None = None

    def of(self, optimization: str, model: str) -> Record | None:
        """Return the record of `optimization` on `model`, None where there is none."""
        return self._by_pair.get((optimization, model))

    @cached_property
    def _by_pair(self) -> dict[tuple[str, str], Record]:
        return {(record.optimization, record.model): record for record in reversed(self.records)}

    @cached_property
    def settled(self) -> "Results":
        """The same results with verdicts corrected over the whole set (`lib.report.analysis.noise.discoveries`)."""
        return replace(self, records=discoveries.settled(self.records))

    @property
    def scales(self) -> str:
        """The scales of the records as text; nearly always a single one."""
        return " and ".join(sorted({record.scale for record in self.records})) or self.scale

    @property
    def measured(self) -> list[Record]:
        """The records with a result."""
        return [record for record in self.records if record.status == "ok"]

    @property
    def missing(self) -> list[str]:
        """The expected stems without a record."""
        present = {record.stem for record in self.records} | set(self.damaged)
        stems = [f"{optimization}--{model}" for optimization in self.optimizations for model in self.models]
        return [stem for stem in stems if stem not in present]


def read(
    folder: Path,
    optimizations: Iterable[str] = (),
    models: Iterable[str] = (),
    look: Callable[[str, Any], None] | None = None,
) -> Results:
    """Return the results in a folder; optimizations and models that are not expected are added after the expected ones.

    `look` is called with each stem and its plain JSON.
    """
    folder = Path(folder)
    records, damaged = read_folder(folder, look)
    stems = [record.stem for record in records] + list(damaged)
    every_optimization, every_model = (
        tuple(dict.fromkeys([*expected, *sorted(stem.split("--", 1)[at] for stem in stems)]))
        for at, expected in enumerate((optimizations, models))
    )
    named, scales = folder.resolve().name, [record.scale for record in records]
    scale = named if named in scales or not scales else scales[0]
    return Results(scale, records, damaged, every_optimization, every_model, folder)


def summary(results: Results) -> dict[str, Any]:
    """Return a summary: counts by status, missing and damaged runs, durations, machines and dates."""
    records = results.records
    counts = {kind: sum(r.status == kind for r in records) for kind in ("ok", "failed", "not_applicable")}
    days = sorted(r.started for r in records if r.started)
    return {
        "expected": len(results.optimizations) * len(results.models),
        **counts,
        "missing": results.missing,
        "damaged": results.damaged,
        "partial": {r.stem: r.dimensions for r in records if r.dimensions},
        "reasons": {r.stem: r.reason for r in records if r.status != "ok"},
        "seconds": round(sum(r.seconds or 0 for r in records), 2),
        "efforts": sorted({r.effort for r in records}),
        "machines": sorted({facts.machine(r.environment) for r in records} - {""}),
        "first_started": days[0] if days else None,
        "last_started": days[-1] if days else None,
    }


def envelope(kind: str, results: Results) -> dict[str, Any]:
    """Return the fields common to all result files."""
    return {
        "schema": schema.VERSION,
        "kind": kind,
        "scale": results.scale,
        "optimizations": list(results.optimizations),
        "models": list(results.models),
        "summary": summary(results),
    }


def comprehensive(results: Results) -> dict[str, Any]:
    """Return every record, without its process samples and log, which stay in its own file."""
    return envelope("comprehensive", results) | {"records": _records(results)}


def enhanced(results: Results) -> dict[str, Any]:
    """Return the impact curves, and the records without a curve of at least three strengths."""
    return envelope("enhanced", results) | _curves(results)


def master(results: Results) -> dict[str, Any]:
    """Return a short form of the runs, their cells, and the aggregates of each optimization over the models."""
    parts = {"runs": _runs(results), "cells": _cells(results), "aggregate": aggregate(results.settled.measured)}
    return envelope("all", results) | parts


def complete(results: Results) -> dict[str, Any]:
    """Return records, curves, runs, cells, aggregates and coverage in one."""
    rest = {"runs": _runs(results), "cells": _cells(results)}
    rest |= {"aggregate": aggregate(results.settled.measured), "coverage": coverage(results)}
    return envelope("complete", results) | {"records": _records(results)} | _curves(results) | rest


def _records(results: Results) -> list[dict[str, Any]]:
    return [to_json(record.model_copy(update={"process": None, "log": None})) for record in results.records]


def _curves(results: Results) -> dict[str, Any]:
    return {"curves": strength_curves.curves(results.records), "without_curve": strength_curves.short(results.records)}


def _runs(results: Results) -> list[dict[str, Any]]:
    """Return an entry per record: its status and its headline numbers."""
    lines = []
    for record in results.records:
        line = {name: getattr(record, name) for name in ("optimization", "model", "effort", "status", "reason", "key")}
        line |= {"started": record.started, "seconds": record.seconds, "verdict": record.verdict.model_dump()}
        numbers = [m for name in DIMENSIONS for m in headlines.chosen(record.measurements, name)]
        keep = ("metric", "workload", "unit", "baseline", "optimized", "ratio", "ci", "verdict", "provenance", "source")
        lines.append(line | {"headlines": [{name: _plain(getattr(m, name)) for name in keep} for m in numbers]})
    return lines


def _cells(results: Results) -> list[dict[str, Any]]:
    """Return an entry per run and dimension: its primary, p, q, and its verdict within the set."""
    return [asdict(cell) for cell in discoveries.cells(results.records)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def aggregate(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return an entry per optimization and metric: the models, the geometric mean gain, least, most, verdicts.

    A gain is a ratio, inverted where lower is better: above 1 is better. All workloads of a metric count, except scores
    that were not exercised: they say nothing about the optimization, and would be averaged as unchanged. Estimates have
    an entry of their own and are never averaged with measured numbers.
    """
    groups: dict[tuple[str, str, bool], list] = {}
    for record in records:
        for measurement in (m for m in record.measurements if m.verdict != "not_exercised"):
            gain = sentence.gain(measurement)[0]
            if gain is None and measurement.ratio == 0 and measurement.higher_is_better:
                gain = 0.0  # no answer is correct any more: the worst loss must not be left out
            if gain is not None:
                kind = (record.optimization, measurement.metric, measurement.provenance == "estimated")
                groups.setdefault(kind, []).append((record.model, gain, measurement.verdict))
    order = list(METRICS)
    lines = []
    ranked = sorted(groups.items(), key=lambda i: (i[0][0], order.index(i[0][1]), i[0][2]))
    for (optimization, metric, estimated), members in ranked:
        gains = [gain for _, gain, _ in members]
        verdicts = [word for *_, word in members]
        lines.append(
            {
                "optimization": optimization,
                "metric": metric,
                "dimension": METRICS[metric].dimension,
                "models": sorted({model for model, *_ in members}),
                "geometric_mean_gain": ranking.geometric_mean(gains),
                "least": min(gains),
                "most": max(gains),
                "verdicts": {word: verdicts.count(word) for word in sorted(set(verdicts))},
                "provenance": "estimated" if estimated else "derived",
                "source": "geometric mean of the runs' ratios, each inverted where lower is better",
            }
        )
    return lines


def coverage(results: Results) -> list[dict[str, Any]]:
    """Return an entry per expected run: its status, and its count of numbers by dimension and by provenance."""
    lines = []
    for optimization in results.optimizations:
        for model in results.models:
            record = results.of(optimization, model)
            status: str = record.status if record else "missing"
            status = "damaged" if f"{optimization}--{model}" in results.damaged else status
            measurements = record.measurements if record else []
            numbers = {
                d: sum(m.dimension == d and m.provenance != "unavailable" for m in measurements) for d in DIMENSIONS
            }
            kinds = ("measured", "derived", "estimated", "unavailable")
            labels = {kind: sum(m.provenance == kind for m in measurements) for kind in kinds}
            line = {"optimization": optimization, "model": model, "status": status, "numbers": numbers}
            lines.append(line | {"provenance": labels, "controls": len(record.controls) if record else 0})
    return lines


def comparable(records: Sequence[Record]) -> Mapping[str, list[str]]:
    """Return metric → the models for which at least one record has a number."""
    models: dict[str, set[str]] = {}
    for record in records:
        for m in record.measurements:
            if m.provenance != "unavailable":
                models.setdefault(m.metric, set()).add(record.model)
    return {name: sorted(models[name]) for name in METRICS if name in models}
