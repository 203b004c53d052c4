"""The processes that execute steps: one for the tests, one for each model that is kept. They are ended when a step
takes too long, when their memory is needed, and at the end; the report on an ended step names its last cell.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.device.schedule import TESTS, Ended, Step

ROOT = Path(__file__).resolve().parents[2]
ALL = ("performance", "accuracy", "resources", "efficiency")
END_SECONDS = 3.0
# Messages of torch and Triton for a device fault, after which every call of the process fails.
# Running out of memory ("CUDA out of memory") is not such a fault.
FAULTS = ("CUDA error", "Triton Error [CUDA]")


def end_with_parent() -> None:
    """End this process and those it started soon after its parent dies: nothing is left on the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class Child:
    """A process in its own session, so that all it started ends with it; a thread reads its events."""

    def __init__(self, module: str, log: Path, environment: dict[str, str] | None = None):
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # truncated line of a killed process
                self.events.put(json.loads(line))
        self.events.put({"event": "closed"})

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request. If the process has ended, its events say so."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next event, or None after `seconds` without one."""
        try:
            return self.events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def end(self) -> None:
        """Kill the process and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)


class Processes:
    """Executes steps on `device`. `free_bytes` returns the free memory of the device, None if it cannot be read;
    `slower` is the factor by which the clock that sets the limits is slower.
    """

    def __init__(
        self,
        log: Path,
        device: str,
        free_bytes: Callable[[], float | None],
        dimensions: Sequence[str] = ALL[:3],
        environment: dict[str, str] | None = None,
        kept: int = 2,
        slower: float = 1.0,
    ):
        self.log, self.device, self.free_bytes = log, device, free_bytes
        self.dimensions, self.environment, self.kept = list(dimensions), environment or {}, kept
        self.slower = slower
        self.workers: dict[tuple[str, str], Child] = {}

    def loads(self, step: Step) -> bool:
        """Return whether a step has to start a process first."""
        return (step.model, step.checkpoints) not in self.workers

    def hindrance(self, step: Step) -> str | None:
        """Return why a step has no room on the device, or None. Processes of other models make room first."""
        if not step.needs_bytes:
            return None
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if step.disk_bytes > free:
            needed = step.disk_bytes / 2**30
            return f"needs about {needed:.0f} GiB of the temporary disk, {free / 2**30:.0f} GiB are free"
        while (reason := self._no_room(step)) and (others := self._others(step)):
            self.workers.pop(others[0]).end()
        return reason

    def _others(self, step: Step) -> list[tuple[str, str]]:
        return [key for key in self.workers if key != (step.model, step.checkpoints)]

    def _no_room(self, step: Step) -> str | None:
        free = self.free_bytes()
        needed = step.needs_bytes - (0.0 if self.loads(step) else step.weights_bytes)
        if free is None or needed <= free:
            return None
        return f"needs about {needed / 2**30:.0f} GiB of the device's memory, {free / 2**30:.0f} GiB are free"

    def execute(self, step: Step, limit_seconds: float) -> Ended:
        """Execute one step, for at most `limit_seconds` of the clock that set the limit."""
        deadline = time.monotonic() + self.slower * limit_seconds
        return self._tests(step, deadline) if step.name == TESTS else self._record(step, deadline)

    def _tests(self, step: Step, deadline: float) -> Ended:
        # Device notebooks start no measuring processes; tests of what such processes read need to.
        child = Child("tests.device.cuda_tests", self.log, {**self.environment, "WORKBENCH_CHILDREN": ""})
        ended = Ended(step, "stopped", "took longer than its limit; the tests below had ended")
        try:
            while event := child.next(deadline - time.monotonic()):
                kind = event.pop("event")
                if kind == "test":
                    ended.tests.append(event)
                elif kind == "ended":
                    ended.status, ended.reason = self._outcome(ended.tests, event["code"])
                    break
                elif kind == "closed":
                    ended.status, ended.reason = "failed", "the process of the tests was lost"
                    break
        finally:
            child.end()
        return ended

    def _outcome(self, tests: Sequence[dict[str, Any]], code: int) -> tuple[str, str | None]:
        """Return status and reason of a completed pytest run with its exit code. On a device it is a failure if every
        test was skipped: none has used the device.
        """
        if failed := sum(test["outcome"] == "failed" for test in tests):
            return "failed", f"{failed} tests failed"
        if not tests:
            return "failed", f"pytest ran no test (exit code {code})"
        if code:
            return "failed", f"no test failed, but pytest ended with exit code {code}"
        if self.device == "cuda" and all(test["outcome"] == "skipped" for test in tests):
            return "failed", f"every test was skipped: {tests[0].get('reason', 'no reason given')}"
        return "finished", None

    def _record(self, step: Step, deadline: float) -> Ended:
        key = (step.model, step.checkpoints)
        if key not in self.workers:
            while len(self.workers) >= self.kept:
                self.workers.pop(next(iter(self.workers))).end()
            self.workers[key] = Child("tests.device.worker", self.log, self.environment)
        child = self.workers[key]
        child.ask(
            {
                "optimization": step.optimization,
                "model": step.model,
                "scale": step.scale,
                "parameters": dict(step.parameters),
                "checkpoints": step.checkpoints,
                "device": self.device,
                "dimensions": self.dimensions,
            }
        )
        ended, cell, since = Ended(step, "stopped"), None, time.monotonic()
        while True:
            event = child.next(deadline - time.monotonic())
            kind = event["event"] if event else "late"
            now = time.monotonic()
            if cell is not None and kind != "load":
                ended.cell_seconds[str(cell)] = round(now - since, 2)
            if event is None or kind == "closed":
                late = f"took longer than its limit, in cell {cell}" if event is None else "its process was lost"
                ended.status, ended.reason = ("stopped" if event is None else "failed"), late
                self.workers.pop(key).end()
                return ended
            if kind == "cell":
                cell, since = event["index"], now
            elif kind == "load":
                ended.load_seconds = event["seconds"]
            elif kind == "record":
                ended.record = event["record"]
                ended.status = {"ok": "finished"}.get(ended.record["status"], ended.record["status"])
                ended.reason = ended.record["reason"]
                return ended
            elif kind == "failed":
                ended.status, ended.reason = "failed", f"cell {cell}: {event['reason']}"
                if any(fault in event["reason"] for fault in FAULTS):
                    self.workers.pop(key).end()
                return ended

    def close(self) -> None:
        """End every process."""
        while self.workers:
            self.workers.popitem()[1].end()
