"""Runs jobs on the workers of an existing Dask cluster, one at a time per `device` token of a worker.

The same loop as on one machine (`lib.suite.run.schedule`), with remote slots: send jobs to free slots, put returned
files into place. A job runs on the worker as it would here, in its own process and result folder; its files are
returned over the network and put into the build's folder. The job of a lost worker runs again elsewhere; a job that
loses two workers is given up. Independent of notebooks; `lib.suite.cluster.workers` decides which workers are used.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.errors import ClusterLost, UserError
from lib.files import seen_from_here
from lib.suite.cluster import remote, worker_stub
from lib.suite.cluster.workers import DEVICE, Crew, WorkerSlot, answer_of
from lib.suite.plan.cache_key import Hashes
from lib.suite.run import settle
from lib.suite.run.kernel_process import ExecutionOutcome, Task, seconds_from
from lib.suite.run.sampling import Samples
from lib.suite.run.schedule import BuildContext, Entry
from lib.suite.run.settle import Result
from lib.suite.store import render, result_folder

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0
MOST_LOST = 2
PATIENCE = "WORKBENCH_CLUSTER_SECONDS"
PASSED_ON = ("WORKBENCH_CELL_SECONDS", "WORKBENCH_RUN_SECONDS", "HF_HUB_OFFLINE")


def check_address(address: str) -> None:
    """Raise UserError unless `address` is a valid scheduler address."""
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("tcp", "tls") and parts.hostname and parts.port and not parts.path
    except ValueError:
        whole = False
    if not whole:
        raise UserError(f"--cluster {address}: expected the address of a Dask scheduler, such as tcp://HOST:8786")


def patience() -> float:
    """Return the seconds that a scheduler may take to answer, and that a build waits for a worker."""
    return seconds_from(PATIENCE, 30.0)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield a client of the scheduler; its pending tasks are cancelled at the end. Raises UserError."""
    import distributed

    for name in ["distributed", *logging.root.manager.loggerDict]:
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # this module reports losses itself
    try:
        client = distributed.Client(address, timeout=patience(), set_as_default=False)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"--cluster {address}: no Dask scheduler answers there ({why}); start one with: dask scheduler"
        ) from None
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            client.close(timeout=2)


def run(build: BuildContext, entries: Sequence[Entry], address: str) -> list[Result]:
    """Run every entry on the cluster; return the results in the order of completion.

    Raises UserError if no scheduler answers or no worker can be used; ClusterLost if the scheduler or the last worker
    is lost and none returns. Finished runs are in place by then. Raises OSError if results cannot be written.
    """
    with _connected(address) as client:
        parts = {entry.job.stem: entry.parts for entry in entries}
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        jobs = [(entry.job, entry.key) for entry in entries]
        crew = Crew(client, jobs, parts.__getitem__, variables, remote.library(Hashes()))
        loop = Loop(build, address, client, crew, entries)
        loop.gather()
        client.subscribe_topic(worker_stub.TOPIC, loop.store_progress)
        while loop.waiting or any(slot.entry for slot in crew.slots):
            loop.step()
            time.sleep(POLL_SECONDS)
        return loop.results


class Loop:
    """The state of the loop: waiting, running and ended jobs, and how many workers each job has lost."""

    def __init__(self, build: BuildContext, address: str, client: Any, crew: Crew, entries: Sequence[Entry]):
        self.build, self.address, self.client, self.crew = build, address, client, crew
        self.waiting = deque(entries)
        self.lost: dict[str, list[str]] = {}
        self.results: list[Result] = []
        self.looked = self.alone_since = time.monotonic()

    def gather(self) -> None:
        """Check the workers that are present. Raises UserError if none of them can be used."""
        workers = self._workers()
        if not any(about["resources"].get(DEVICE, 0) >= 1 for about in workers.values()):
            raise UserError(
                f'--cluster {self.address}: none of its {len(workers)} workers has a "{DEVICE}" token; start one with: '
                f'dask worker {self.address} --nthreads 1 --resources "{DEVICE}=1"'
            )
        self._meet(workers)
        refusals: list[str] = []
        waiting, deadline = False, time.monotonic() + patience()
        while True:
            if not self.crew.pending or time.monotonic() > deadline:
                refusals += self.crew.welcome()
                if self.crew.slots or not self.crew.pending:
                    break
                if not waiting:
                    self.build.progress.line("all workers are busy with other work; waiting for one of them")
                    waiting = True
            time.sleep(POLL_SECONDS)
            self._look()
        if not self.crew.slots:
            raise UserError(f"--cluster {self.address}: no worker can be used: {' | '.join(refusals)}")
        self._tell_refused(refusals)

    def _workers(self) -> Mapping[str, Mapping[str, Any]]:
        """Return address → the scheduler's description of a worker. Raises ClusterLost if it no longer answers."""
        try:
            if self.client.status != "running":
                raise OSError
            return self.client.sync(self.client.scheduler.identity, callback_timeout=patience())["workers"]
        except (OSError, TimeoutError, AttributeError, RuntimeError):
            raise self._gone() from None

    def _meet(self, workers: Mapping[str, Mapping[str, Any]]) -> list[WorkerSlot]:
        """Check new workers and return the slots of those that are gone. Raises ClusterLost if the scheduler is lost:
        its OSError must not be mistaken for a file that cannot be written.
        """
        try:
            return self.crew.look(workers)
        except (OSError, TimeoutError, RuntimeError):
            raise self._gone() from None

    def _gone(self) -> ClusterLost:
        return ClusterLost(f"the scheduler at {self.address} is gone")

    def store_progress(self, event: tuple[float, Mapping[str, str]]) -> None:
        """Store a worker's progress message for the progress table."""
        for slot in list(self.crew.slots):
            if slot.future is not None and slot.future.key == event[1]["key"]:
                slot.doing = event[1]["doing"]

    def step(self) -> None:
        """Run one iteration of the loop."""
        self._look()
        for slot in list(self.crew.slots):
            if slot.entry is None and self.waiting:
                self._begin(slot)
            elif slot.entry is not None and slot.future.done():
                answer, entry = answer_of(slot.future), slot.entry
                slot.entry = slot.future = None
                if self.client.status == "running":  # else the next `_look` raises ClusterLost
                    self._take(slot, entry, answer)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS and self.client.status == "running":
            return
        self.looked = now
        for slot in self._meet(self._workers()):
            if slot.entry is not None:
                slot.future.cancel()
                self._lose(slot, slot.entry, "it disappeared")
        self._tell_refused(self.crew.welcome() if self.results or self.crew.slots else [])
        if self.crew.slots:
            self.alone_since = now
            self.build.progress.side_by_side = len(self.crew.slots)
        elif now - self.alone_since > patience() and not self.crew.pending:
            raise ClusterLost(f"no worker with a {DEVICE} token is left at {self.address}")

    def _tell_refused(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.build.progress.line(f"not used: {line}")

    def _begin(self, slot: WorkerSlot) -> None:
        entry = slot.entry = self.waiting.popleft()
        slot.doing = "starting"
        request = {
            "do": "run",
            "job": remote.describe(entry.job),
            "key": entry.key,
            "cores": list(slot.cores),
            "side_by_side": self.crew.side_by_side(slot),
            "neighbours": list(self.build.neighbours),
            "stacks": result_folder.stacks(self.build.folder),
        }
        try:
            slot.future = self.crew.submit(slot.address, request)
        except OSError:
            raise self._gone() from None
        where = slot.address.split("//")[-1]
        self.build.progress.start(entry.job.stem, lambda: f"{slot.doing} on {where}")

    def _take(self, slot: WorkerSlot, entry: Entry, answer: Mapping[str, Any]) -> None:
        """Store a returned result, or handle a lost or refused worker."""
        stem = entry.job.stem
        if "lost" in answer:
            self._lose(slot, entry, answer["lost"])
        elif why := self.crew.objection(answer):  # its files have changed since it was checked
            self._tell_refused([f"{slot.address}: {why}"])
            self.waiting.appendleft(entry)
            for lost_slot in self.crew.dismiss(slot.address):
                if lost_slot.entry is not None:
                    lost_slot.future.cancel()
                    self.waiting.appendleft(lost_slot.entry)
        else:
            result_folder.adopt(self.build.folder, stem, answer["files"])
            failed = self.build.folder.failed(stem)
            notebook = seen_from_here(failed) if answer["status"] == "failed" and failed.is_file() else None
            self._end(Result(stem, answer["status"], answer["reason"], notebook, answer["seconds"]))

    def _lose(self, slot: WorkerSlot, entry: Entry, why: str) -> None:
        """Queue the job again, or give it up after MOST_LOST lost workers."""
        stem = entry.job.stem
        lost = self.lost.setdefault(stem, [])
        lost.append(f"{slot.address} at “{slot.doing}”, {why}")
        if len(lost) < MOST_LOST:
            self.build.progress.line(f"{stem}: its worker was lost ({lost[-1]}); it runs again elsewhere")
            self.waiting.appendleft(entry)
            return
        text = f"given up: it lost {len(lost)} workers ({'; '.join(lost)})"
        error = {"kind": settle.LOST_WORKERS, "text": text}
        outcome = ExecutionOutcome(error, None, None, {}, 0.0, Samples(), False)
        folder = self.build.folder.running / stem
        task = Task(stem, Path(), {}, folder, folder, (), 0, entry.job.effort)
        result = settle.settle(self.build.folder, entry.job, entry.parts, entry.key, task, outcome)
        render.render(self.build.folder.path, stem, self.build.neighbours)
        self._end(result)

    def _end(self, result: Result) -> None:
        self.results.append(result)
        reason = result.reason if result.status != "ok" else None
        self.build.progress.end(result.stem, result.status, result.seconds, reason)
