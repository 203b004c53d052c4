"""Runs jobs beside each other, each on its own cores, and follows them until all have ended or the build is stopped.

One thread, one loop: start what there is room for, follow what runs, settle what has ended. A failure stops nothing;
what is tried once more is a kernel that would not start and a child that was lost. Knows nothing of what notebooks do.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.models import parameters
from lib.suite.plan import cache_key
from lib.suite.plan import template as templates
from lib.suite.plan.plan import Job
from lib.suite.run import kernel_process, settle
from lib.suite.run.fork_server import ForkServer
from lib.suite.run.kernel_process import ExecutionOutcome, Task, Worker
from lib.suite.run.progress import Reporter
from lib.suite.run.settle import Result
from lib.suite.store import render
from lib.suite.store.result_folder import Folder

POLL_SECONDS = 0.1
RENDER_SECONDS = 300


@dataclass(frozen=True)
class Entry:
    """A job that has to run, its key, and what the key is made of."""

    job: Job
    key: str
    parts: Mapping[str, Mapping[str, str]]


@dataclass
class EntryRun:
    """An entry that is running: its child process, how often it was started, and its result while pages are made.
    `planned`: whether it began with what its key is made of.
    """

    entry: Entry
    worker: Worker
    tries: int = 1
    result: Result | None = None
    rendering_since: float = 0.0
    planned: bool = True


@dataclass
class CoreSlot:
    """A share of the cores, and what runs on it."""

    cores: tuple[int, ...]
    temporary: Path
    run: EntryRun | None = None


@dataclass(frozen=True)
class BuildContext:
    """What all jobs of a build share. `side_by_side`: how many run on this machine, where not all are this build's.
    `refresh_seconds`: how old the index may become while runs are replaced one by one; None: it is left alone.
    `server`: what forks the runs' processes; None: each is started anew.
    """

    folder: Folder
    shares: Sequence[Sequence[int]]
    temporary: Path
    neighbours: Sequence[tuple[str, str]]
    progress: Reporter
    side_by_side: int | None = None
    refresh_seconds: float | None = None
    server: ForkServer | None = None


def run(build: BuildContext, entries: Sequence[Entry]) -> list[Result]:
    """Run every entry; return how each ended, in the order in which they did.

    No process of a job outlives this function, whatever ends it early (a signal, a full disk). Raises OSError where
    results cannot be written.
    """
    waiting = deque(by_size(entries))
    results: list[Result] = []
    slots = [CoreSlot(tuple(cores), build.temporary / str(at)) for at, cores in enumerate(build.shares)]
    try:
        while waiting or any(slot.run for slot in slots):
            for at, slot in enumerate(slots):
                if slot.run is None and waiting:
                    _begin(build, slot, waiting.pop() if at % 2 and sized(waiting[0]) else waiting.popleft())
                elif slot.run is not None and (result := _step(build, slot, slot.run)):
                    results.append(result)
                    slot.run = None
            time.sleep(POLL_SECONDS)
    finally:
        for slot in slots:
            if slot.run is not None:
                kernel_process.finish(slot.run.worker)
    return results


def sized(entry: Entry) -> bool:
    """Return whether memory decides what may run beside `entry`: at real dimensions."""
    return entry.job.scale == "slice"


def by_size(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries in the order of running. Slices: the largest model's first, since every second share of the
    cores begins at the other end, so that the two largest models are not in memory at once.
    """
    if not all(sized(entry) for entry in entries):
        return list(entries)
    sizes = {entry.job.model: parameters.about_slice_parameters(parameters.read(entry.job.model)) for entry in entries}
    return sorted(entries, key=lambda entry: (-sizes[entry.job.model], entry.job.model))


def _begin(build: BuildContext, slot: CoreSlot, entry: Entry, tries: int = 1) -> None:
    job = entry.job
    task = Task(
        name=f"{job.stem}.ipynb",
        notebook=job.template.path,
        parameters=job.parameters,
        folder=build.folder.running / job.stem,
        temporary=slot.temporary,
        cores=slot.cores,
        jobs=build.side_by_side or len(build.shares),
        effort=job.effort,
        dimensions=job.dimensions,
    )
    planned = _as_planned(build, entry)
    run = EntryRun(entry, kernel_process.start(task, build.server), tries, planned=planned)
    slot.run = run
    build.progress.start(job.stem, lambda: _doing(run))


def _as_planned(build: BuildContext, entry: Entry) -> bool:
    """Return whether all that an entry's key is made of is what it was when the build was planned."""
    try:
        now = replace(entry.job, template=templates.read(entry.job.template.path))
        return cache_key.of(cache_key.parts(now, cache_key.Hashes(build.folder.hashes))) == entry.key
    except (OSError, UserError):  # a part is gone
        return False


def _doing(run: EntryRun) -> str:
    if run.result:
        return "rendering"
    if run.worker.cell is None:
        return "starting"
    return f"cell {run.worker.cell + 1} of {len(run.entry.job.template.cells) + 1}"


def _step(build: BuildContext, slot: CoreSlot, run: EntryRun) -> Result | None:
    """Advance one slot's run; return its result once the run has ended and its pages are made."""
    outcome = kernel_process.poll(run.worker)
    if run.result is None:
        if outcome is None:
            return None
        if outcome.error and outcome.worth_another_try and run.tries == 1:
            build.progress.line(f"{run.entry.job.stem}: {outcome.error['kind']}, trying once more")
            kernel_process.finish(run.worker)
            _begin(build, slot, run.entry, run.tries + 1)
            return None
        return _settle(build, run, outcome)
    over = time.monotonic() - run.rendering_since > RENDER_SECONDS
    if run.worker.rendered is None and not over and not run.worker.closed:
        return None
    rendered = run.worker.rendered or {"error": "the pages could not be made: the process was lost"}
    return _close(build, run, run.result, rendered["error"])


def _settle(build: BuildContext, run: EntryRun, outcome: ExecutionOutcome) -> Result | None:
    """Write the record of a run that has ended and have its pages made; return the result if they are made already.

    Where code, weights or the template changed since the build was planned, the record gets no key: it may be of both.
    """
    job, key = run.entry.job, run.entry.key
    if not (run.planned and _as_planned(build, run.entry)):
        key = ""
        build.progress.line(f"{job.stem}: its code, weights or template changed during the build; it is out of date")
    run.result = settle.settle(build.folder, job, run.entry.parts, key, run.worker.task, outcome)
    order: dict[str, Any] = {"render": job.stem, "folder": str(build.folder.path)}
    order |= {"neighbours": list(build.neighbours), "refresh_seconds": build.refresh_seconds}
    if outcome.alive and kernel_process.send(run.worker, order):
        run.rendering_since = time.monotonic()
        return None
    kernel_process.finish(run.worker)
    return _close(build, run, run.result, render.render(build.folder.path, job.stem, build.neighbours))


def _close(build: BuildContext, run: EntryRun, result: Result, fault: str | None) -> Result:
    kernel_process.finish(run.worker)
    if fault and result.status != "failed":
        result = Result(result.stem, "failed", fault, None, result.seconds)
    build.progress.end(result.stem, result.status, result.seconds, result.reason if result.status != "ok" else None)
    return result
