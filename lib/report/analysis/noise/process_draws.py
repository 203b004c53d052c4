"""What records show of the variance between processes: every A/A control that was timed is a draw. Knows nothing of how
the pool is used (`lib.measure.metrics.process_variance`).
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
SUFFIX = "tokens_per_second"  # latencies are the same times once more
BUILDS = 3  # of the history

QUICK = ("preview", "quick")  # efforts whose workloads are shorter


def publish(folder: Path, store: Path, effort: str) -> None:
    """Pool what this machine showed, and name the pool's file in the environment of the runs to come, which are of this
    effort.
    """
    os.environ.pop(process_variance.VARIABLE, None)
    path = refresh(folder, store, this_machine(), effort)
    if path:
        os.environ[process_variance.VARIABLE] = str(path.resolve())


def this_machine() -> dict[str, Any]:
    """Return the fields of the environment card by which this machine's records are known. Virtual machines of any size
    may call their processor by one name, and how they differ between processes goes with their size.
    """
    return {"cpu": energy_source.cpu_name(), "cores_of_machine": os.cpu_count()}


def refresh(folder: Path, store: Path, machine: Mapping[str, Any], effort: str = "quick") -> Path | None:
    """Pool the controls of a result folder and of the last builds in its history, as far as they were made on
    `machine` (fields of the environment card), and write the pool into the folder; return its path, None where there is
    no control.

    Runs of small efforts time shorter workloads under the same names: their controls serve runs of that effort only.
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
    """Yield a draw for every process of every timed control of a record, unless the machine was seen to be busy. A
    control that is the baseline itself is none: it never differs as two copies do, and would narrow what others claim.
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
    """Yield (effect, standard error within) of each process, whose pairs stand in their order in the samples."""
    samples, processes = measurement.samples, measurement.processes
    if not samples or not processes:
        return  # a record from before there were copies
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
