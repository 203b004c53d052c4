"""Checks a result set against its acceptance criteria, one by one, and names each record that falls short.

The criteria: all models, all optimizations, several metrics in each dimension, values before and after, comparable
across models, performance and accuracy maintained or improved, every number labelled, sound files, and verdicts that
follow from their numbers. A run that is not applicable is excused, a failed one is not. Reads the records on disk; runs
nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import headlines, result_set
from lib.report.analysis.result_set import Results
from lib.report.records import migration, schema
from lib.report.records.checks import lint
from lib.report.records.record import Record
from lib.report.records.setting import reproduce
from lib.report.records.verdicts import verdict
from lib.report.text import commands
from lib.report.text.wording import SIGNS, label, one_line, words

MODELS = ("glm-4.7-flash", "qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b")
OPTIMIZATIONS = (
    "structured_pruning", "adaptive_sparse_attention", "adaptive_batch_sizes", "continuous_nas",
    "streaming_computation", "tensor_decomposition", "sparse_neural_networks", "modular_components",
    "automl_components", "feedback_mechanisms", "pre_vs_post_optimization",
)  # fmt: skip
SEVERAL = 2
FASTER_OR_EQUAL = ("better", "equivalent")
JUDGED = ("better", "worse", "equivalent", "mixed", "maintained", "not_maintained")


@dataclass(frozen=True)
class Criterion:
    """An acceptance criterion, and every violation of it as (record or file, reason)."""

    name: str
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether there is no violation."""
        return not self.faults


def check(folder: Path, optimizations: Iterable[str] = (), models: Iterable[str] = ()) -> list[Criterion]:
    """Return every criterion for the result set in `folder`, with its violations.

    `optimizations` and `models` are expected in addition to OPTIMIZATIONS and MODELS.
    """
    folder = Path(folder)
    wanted_optimizations = tuple(dict.fromkeys([*OPTIMIZATIONS, *optimizations]))
    wanted_models = tuple(dict.fromkeys([*MODELS, *models]))
    unsound: list[tuple[str, str]] = []
    unlabelled: list[tuple[str, str]] = []

    def look(stem: str, content: Any) -> None:  # called during reading, so that each file is read once
        content = migration.upgrade(content)
        unsound.extend(_file(stem, content))
        unlabelled.extend(_labels(stem, content))

    results = result_set.read(folder, wanted_optimizations, wanted_models, look)
    points: list[tuple[str, Callable[[], list[tuple[str, str]]]]] = [
        ("the files are sound", lambda: _files(folder, results, unsound)),
        (f"all {len(wanted_models)} models are present", lambda: _models(results, wanted_models)),
        (
            f"all {len(wanted_optimizations)} optimizations are measured",
            lambda: _optimizations(results, wanted_optimizations, wanted_models),
        ),
        ("several metrics in each of the four dimensions", lambda: _each(results, _dimensions)),
        ("values before and after in each dimension", lambda: _each(results, _both_arms)),
        ("comparable across models", lambda: _comparable(results)),
        ("performance maintained or improved", lambda: _within_the_set(results, _performance)),
        ("accuracy maintained or improved", lambda: _within_the_set(results, _accuracy)),
        ("verdicts follow from the numbers", lambda: _each(results, _verdicts)),
        ("every number has its provenance", lambda: unlabelled),
    ]
    return [Criterion(name, look()) for name, look in points]


def _each(results: Results, look: Callable[[Record], list[str]]) -> list[tuple[str, str]]:
    """Return the faults that `look` finds in each record with a result; failed runs are reported elsewhere, once."""
    return [(record.stem, why) for record in results.measured for why in look(record)]


def _within_the_set(results: Results, look: Callable[[Record], list[str]]) -> list[tuple[str, str]]:
    """Return the faults that `look` finds in each record with a result, by its own verdicts or else by those within the
    set: a verdict that is inconclusive there is not an improvement.
    """
    settled = {record.stem: record for record in results.settled.measured}
    return [(record.stem, why) for record in results.measured for why in look(record) or look(settled[record.stem])]


def _file(stem: str, content: Any) -> list[tuple[str, str]]:
    """Return the faults of one record's plain JSON; a file without a JSON object is reported as damaged elsewhere."""
    if not isinstance(content, dict):
        return []
    faults = [(stem, why) for why in schema.faults(content)]
    holds = f"{content.get('optimization', '?')}--{content.get('model', '?')}"
    return faults if holds == stem else [*faults, (stem, f"holds the record of {holds}")]


def _files(folder: Path, results: Results, unsound: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    faults = list(results.damaged.items()) + [fault for fault in unsound if fault[0] not in results.damaged]
    for path in sorted(folder.glob("*_results*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            faults.append((path.name, f"cannot be read ({error.strerror})"))
            continue
        except ValueError:
            faults.append((path.name, "is not JSON"))
            continue
        faults += [(path.name, why) for why in schema.faults(content)] or _outdated(path.name, content, results)
    return faults


def _outdated(name: str, content: Mapping, results: Results) -> list[tuple[str, str]]:
    """Return a fault if a result file does not describe the same runs as the records of its folder."""
    listed = content.get("records", content.get("runs"))
    if listed is None:
        return []
    keys = {(run["optimization"], run["model"], run["key"], run["started"]) for run in listed}
    present = {(r.optimization, r.model, r.key, r.started) for r in results.records}
    if keys == present:
        return []
    again = commands.at(reproduce.of_set("report", results.scale), results.folder)
    return [(name, f"was built from other records; run: {again}")]


def _models(results: Results, models: Sequence[str]) -> list[tuple[str, str]]:
    present = {record.model for record in results.measured}
    return [(model, "no record with a result") for model in models if model not in present]


def _optimizations(results: Results, optimizations: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    faults = []
    for name in optimizations:
        runs = {model: results.of(name, model) for model in models}
        if not any(run and run.status == "ok" for run in runs.values()):
            faults.append((name, "measured on no model"))
        for model, run in runs.items():
            if run is None and f"{name}--{model}" not in results.damaged:
                faults.append((f"{name}--{model}", "never run"))
            elif run is not None and run.status == "failed":
                faults.append((run.stem, f"failed: {run.reason}"))
    return faults


def _partial(record: Record) -> list[str]:
    return [f"partial: measured for {', '.join(record.dimensions)} only"] if record.dimensions else []


def _dimensions(record: Record) -> list[str]:
    count = {
        name: len({m.metric for m in record.measurements if m.dimension == name and m.optimized is not None})
        for name in DIMENSIONS
    }
    few = [f"{name}: {number} of at least {SEVERAL} metrics" for name, number in count.items() if number < SEVERAL]
    return _partial(record) + few


def _both_arms(record: Record) -> list[str]:
    both = {m.dimension for m in record.measurements if m.baseline is not None and m.optimized is not None}
    return [f"{name}: no metric has a value before and after" for name in DIMENSIONS if name not in both]


def _comparable(results: Results) -> list[tuple[str, str]]:
    """Return the runs that differ in effort, scale or metrics from other models of the same optimization.

    Units are those of the catalogue (`lib.measure.metrics.catalogue`): a record with others is reported as damaged.
    """
    faults = []
    for name in dict.fromkeys(record.optimization for record in results.measured):
        runs = [record for record in results.measured if record.optimization == name]
        first = runs[0]
        for run in runs[1:]:
            for setting in ("effort", "scale"):
                own, others = getattr(run, setting), getattr(first, setting)
                if own != others:
                    faults.append((run.stem, f"{setting} {own}, but {others} on {first.model}"))
        every = {m.metric for run in runs for m in run.measurements}
        for run in runs:
            if lacking := sorted(every - {m.metric for m in run.measurements}):
                names = ", ".join(map(label, lacking[:4]))
                faults.append((run.stem, f"lacks metrics that other models have: {names}"))
    return faults


def _performance(record: Record) -> list[str]:
    state = record.verdict.performance
    well = state in FASTER_OR_EQUAL and not record.verdict.losses_of("performance")
    return [] if well else [_evidence(record, "performance", state)]


def _accuracy(record: Record) -> list[str]:
    state = record.verdict.accuracy
    well = state in ("maintained", "better") and not record.verdict.losses_of("accuracy")
    return [] if well else [_evidence(record, "accuracy", state)]


def _evidence(record: Record, dimension: str, state: str) -> str:
    """Return the verdict with the numbers behind it: the deciding measurement and the losses."""
    named = headlines.of(record, dimension)[: 1 + len(record.verdict.losses_of(dimension))]
    but = ", but another measurement got worse" if record.verdict.losses_of(dimension) else ""
    why = record.verdict.reasons.get(dimension)
    listed = "; ".join(f"{shown.what} {shown.text}" for shown in named) or "nothing was measured"
    return f"{words(state)}{but}: {listed}" + (f" ({why})" if why else "")


def _verdicts(record: Record) -> list[str]:
    """Return the differences from a recomputation: words of the dimensions, verdicts of measurements, ratios."""
    if not record.verdict.carried_by and any(word in JUDGED for word in record.verdict.words().values()):
        return ["its verdicts were reached without a primary measurement, as in earlier schemas; run it again"]
    declared = {str(name): pair for name, pair in record.primaries.items()}
    again = verdict.judge(record.measurements, record.status, record.reason, record.dimensions, declared)
    faults = [
        f"{name} is recorded as {words(recorded)}, but its numbers give {words(computed)}"
        for name in DIMENSIONS
        if (recorded := getattr(record.verdict, name)) != (computed := getattr(again, name))
    ]
    held = ("carried_by", "losses")
    if not faults and any(getattr(record.verdict, name) != getattr(again, name) for name in held):
        faults = ["its primary measurements, or its losses, do not follow from its numbers"]
    faults += [line.split(": ", 1)[1] for line in lint.verdicts(record)]
    return faults + [
        f"{label(m.metric)} [{m.workload}]: {why}" for m in record.measurements for why in _contradiction(m)
    ]


def _contradiction(m: Measurement) -> list[str]:
    """Return the contradictions within a measurement."""
    low, high = m.ci or (None, None)
    faults = []
    if low is not None and high is not None and low > high:
        faults.append(f"the interval {low:.3g} to {high:.3g} is reversed")
    if m.n is None and m.baseline and m.optimized is not None and m.ratio is not None:
        ratio = m.optimized / m.baseline
        if abs(ratio - m.ratio) > 1e-6 * abs(ratio):
            faults.append(f"the ratio is {m.ratio:.4g}, the two values give {ratio:.4g}")
    return faults


def _labels(stem: str, content: Any) -> list[tuple[str, str]]:
    """Return the label faults of a record's plain JSON, even if it is damaged otherwise."""
    return [(stem, line.split(": ", 1)[1]) for line in lint.labels(content)] if isinstance(content, dict) else []


def table(points: Sequence[Criterion], most: int = 4) -> list[str]:
    """Return the criteria as lines of text; below a violated one, at most `most` of its faults and how many more."""
    lines = []
    for point in points:
        number = "" if point.holds else f": {len(point.faults)} fall short"
        lines.append(f"{SIGNS['ok' if point.holds else 'failed']} {point.name}{number}")
        lines += [f"    {stem}: {one_line(why, 200)}" for stem, why in point.faults[:most]]
        lines += [f"    … and {len(point.faults) - most} more; --all shows them"] if len(point.faults) > most else []
    return lines
