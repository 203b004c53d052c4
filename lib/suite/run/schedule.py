"""Runs jobs in parallel, each on its own cores, until all have ended or the build is stopped.

One thread, one loop: start jobs on free cores, follow running jobs, settle ended ones. A failed job does not stop the
others; a job is tried once more only if its kernel did not start or its child process was lost. Independent of what
notebooks do.
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
    """A job to run, its key, and the parts of the key."""

    job: Job
    key: str
    parts: Mapping[str, Mapping[str, str]]


@dataclass
class EntryRun:
    """A running entry: its child process, the number of starts, and its result while pages are rendered. `planned` says
    whether the parts of its key were unchanged when it started.
    """

    entry: Entry
    worker: Worker
    tries: int = 1
    result: Result | None = None
    rendering_since: float = 0.0
    planned: bool = True


@dataclass
class CoreSlot:
    """A share of the cores, and the run on it."""

    cores: tuple[int, ...]
    temporary: Path
    run: EntryRun | None = None


@dataclass(frozen=True)
class BuildContext:
    """The context shared by all jobs of a build. `side_by_side` is the number of parallel jobs on this machine, if some
    belong to others. `refresh_seconds` is the maximum age of the index while runs are replaced one by one (None: it is
    not refreshed). `server` forks the runs' processes (None: each is a new process).
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
    """Run every entry; return the results in the order of completion.

    No process of a job outlives this function, even if it ends early (a signal, a full disk). Raises OSError where
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
    """Return whether memory limits what may run next to `entry`, as it does at real dimensions (slices)."""
    return entry.job.scale == "slice"


def by_size(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries in the order of running. Slices are sorted by model size, the largest first: every second
    share of the cores starts from the other end, so that the two largest models are not in memory together.
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
    """Return whether all parts of an entry's key are unchanged since the build was planned."""
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
    """Advance one slot's run; return its result once the run has ended and its pages are rendered."""
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
    rendered = run.worker.rendered or {"error": "the pages could not be rendered: the process was lost"}
    return _close(build, run, run.result, rendered["error"])


def _settle(build: BuildContext, run: EntryRun, outcome: ExecutionOutcome) -> Result | None:
    """Write the record of a run that has ended and request its pages; return the result if they are already rendered.

    If code, weights or the template changed since the build was planned, the record gets no key: it may mix both
    versions.
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
