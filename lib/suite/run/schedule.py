"""Runs jobs beside each other, each on its own cores, and follows them until all have ended or the build is stopped.

One thread, one loop: start what there is room for, follow what runs, settle what has ended. A failure stops nothing;
what is tried once more is a kernel that would not start and a child that was lost. Knows nothing of what notebooks do.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.models import parameters
from lib.suite.plan.plan import Job
from lib.suite.run import kernel_process, settle
from lib.suite.run.kernel_process import ExecutionOutcome, Task, Worker
from lib.suite.run.progress import Progress
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
class CoreSlot:
    """A share of the cores, and what runs on it."""

    cores: tuple[int, ...]
    temporary: Path
    entry: Entry | None = None
    worker: Worker | None = None
    tries: int = 0
    result: Result | None = None
    rendering_since: float = 0.0


@dataclass(frozen=True)
class BuildContext:
    """What all jobs of a build share. `side_by_side`: how many run on this machine, where not all are this build's."""

    folder: Folder
    shares: Sequence[Sequence[int]]
    temporary: Path
    neighbours: Sequence[tuple[str, str]]
    progress: Progress
    side_by_side: int | None = None


def run(build: BuildContext, entries: Sequence[Entry]) -> list[Result]:
    """Run every entry; return how each ended, in the order in which they did.

    No process of a job outlives this function, whatever ends it early (a signal, a full disk). Raises OSError where
    results cannot be written.
    """
    waiting, results = deque(by_size(entries)), []
    slots = [CoreSlot(tuple(cores), build.temporary / str(at)) for at, cores in enumerate(build.shares)]
    try:
        while waiting or any(slot.entry for slot in slots):
            for at, slot in enumerate(slots):
                if slot.entry is None and waiting:
                    entry = waiting.pop() if at % 2 and sized(waiting[0]) else waiting.popleft()
                    slot.entry, slot.tries, slot.result = entry, 0, None
                    _begin(build, slot)
                elif slot.entry is not None and _step(build, slot):
                    results.append(slot.result)
                    slot.entry = slot.worker = None
            time.sleep(POLL_SECONDS)
    finally:
        for slot in slots:
            if slot.worker is not None:
                kernel_process.finish(slot.worker)
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


def _begin(build: BuildContext, slot: CoreSlot) -> None:
    job = slot.entry.job
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
    slot.tries += 1
    slot.worker = kernel_process.start(task)
    build.progress.start(job.stem, lambda: _doing(slot))


def _doing(slot: CoreSlot) -> str:
    if slot.result:
        return "rendering"
    if slot.worker is None or slot.worker.cell is None:
        return "starting"
    return f"cell {slot.worker.cell + 1} of {len(slot.entry.job.template.cells) + 1}"


def _step(build: BuildContext, slot: CoreSlot) -> bool:
    """Advance one slot; return whether its job has ended."""
    if slot.result is None:
        outcome = kernel_process.poll(slot.worker)
        if outcome is None:
            return False
        if outcome.worth_another_try and slot.tries == 1:
            build.progress.line(f"{slot.entry.job.stem}: {outcome.error['kind']}, trying once more")
            kernel_process.finish(slot.worker)
            _begin(build, slot)
            return False
        return _settle(build, slot, outcome)
    kernel_process.poll(slot.worker)
    over = time.monotonic() - slot.rendering_since > RENDER_SECONDS
    if slot.worker.rendered is None and not over and not slot.worker.closed:
        return False
    fault = (slot.worker.rendered or {"error": "the pages could not be made: the process was lost"})["error"]
    return _close(build, slot, fault)


def _settle(build: BuildContext, slot: CoreSlot, outcome: ExecutionOutcome) -> bool:
    """Write the record of a run that has ended, and have its pages made; return whether that is done already."""
    entry = slot.entry
    slot.result = settle.settle(build.folder, entry.job, entry.parts, entry.key, slot.worker.task, outcome)
    order = {"render": entry.job.stem, "folder": str(build.folder.path), "neighbours": list(build.neighbours)}
    if outcome.alive and kernel_process.send(slot.worker, order):
        slot.rendering_since = time.monotonic()
        return False
    kernel_process.finish(slot.worker)
    return _close(build, slot, render.render(build.folder.path, entry.job.stem, build.neighbours))


def _close(build: BuildContext, slot: CoreSlot, fault: str | None) -> bool:
    kernel_process.finish(slot.worker)
    result = slot.result
    if fault and result.status != "failed":
        result = Result(result.stem, "failed", fault, None, result.seconds)
        slot.result = result
    build.progress.end(result.stem, result.status, result.seconds, result.reason if result.status != "ok" else None)
    return True
