"""The variance between processes, estimated from records: every timed A/A control is a draw. Independent of how the
pool of draws is used (`lib.measure.metrics.process_variance`).
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib.measure.metrics import paired_stats, process_variance
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.process_variance import Draw
from lib.measure.trackers import energy_source
from lib.report.records import history
from lib.report.records.record import Record, read_folder

CONTROL = "A/A"
SUFFIX = "tokens_per_second"  # latencies restate the same times
BUILDS = 3  # builds of the history that are pooled

QUICK = ("preview", "quick")  # efforts with shorter workloads


def publish(folder: Path, store: Path, effort: str) -> None:
    """Pool this machine's draws for runs of `effort`, and publish the pool's file to them in the environment variable
    `process_variance.VARIABLE`.
    """
    os.environ.pop(process_variance.VARIABLE, None)
    path = refresh(folder, store, this_machine(), effort)
    if path:
        os.environ[process_variance.VARIABLE] = str(path.resolve())


def this_machine() -> dict[str, Any]:
    """Return the fields of the environment card that identify this machine's records. Virtual machines of different
    sizes may report the same processor, but their variance between processes depends on the size.
    """
    return {"cpu": energy_source.cpu_name(), "cores_of_machine": os.cpu_count()}


def refresh(folder: Path, store: Path, machine: Mapping[str, Any], effort: str = "quick") -> Path | None:
    """Pool the controls measured on `machine` (fields of the environment card) in a result folder and in the last
    builds of its history, and write the pool into the folder; return its path, None where there is no control.

    Small efforts time shorter workloads under the same names: their controls are pooled only for the same effort.
    """
    records = read_folder(folder)[0] if folder.is_dir() else []
    for build in history.builds(store, folder.name)[-BUILDS:]:
        records += history.records(store, build)
    unique = {(record.started, record.key or record.stem): record for record in records}
    own = [r for r in unique.values() if _made_on(r, machine) and (r.effort == effort or r.effort not in QUICK)]
    pooled = process_variance.table(draw for record in own for draw in draws(record))
    return process_variance.write(folder / process_variance.NAME, pooled) if pooled else None


def _made_on(record: Record, machine: Mapping[str, Any]) -> bool:
    return all(record.environment.get(name) == value for name, value in machine.items())


def draws(record: Record) -> Iterator[Draw]:
    """Yield a draw for every process of every timed control of a record, except measurements with disturbed pairs. A
    control that is the baseline object itself is skipped: it varies less than two copies do, and would make the noise
    floors of other runs too small.
    """
    if process_variance.SAME_OBJECT in str(record.details.get("control")):
        return
    on_gpu = record.environment.get("gpu") and str(record.parameters.get("device")).startswith("cuda")
    device = "cuda" if on_gpu else "cpu"
    timed: Iterable[Measurement] = (
        measurement
        for control in record.controls
        if control.name == CONTROL
        for measurement in control.measurements
        if measurement.metric.endswith(SUFFIX) and measurement.provenance == "measured" and not measurement.disturbed
        if process_variance.SAME_OBJECT not in (measurement.reason or "")
    )
    for measurement in timed:
        for effect, error in _effects(measurement):
            yield Draw(device, measurement.workload, effect, error)


def _effects(measurement: Measurement) -> Iterator[tuple[float, float]]:
    """Yield (effect, standard error within the process) of each process; the samples list the pairs by process."""
    samples, processes = measurement.samples, measurement.processes
    if not samples or not processes:
        return  # a record older than the copies
    d_N = paired_stats.differences(samples["baseline"], samples["optimized"])
    if d_N.size < paired_stats.MINIMUM_BLOCKS:
        return  # too few for an error of the effect
    if processes == 1:
        yield float(np.median(d_N)), paired_stats.MEDIAN_FACTOR * float(d_N.std(ddof=1)) / math.sqrt(d_N.size)
    elif d_N.size % processes == 0:
        groups_PR = d_N.reshape(processes, -1)
        within = float(groups_PR.var(axis=1, ddof=1).mean()) if groups_PR.shape[1] > 1 else 0.0
        for group_R in groups_PR:
            yield float(group_R.mean()), math.sqrt(within / group_R.size)
