"""A real Dask scheduler and real workers, each a local process that is always ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import workbench

DASK = Path(sys.executable).with_name("dask")
# These determine what a lost connection costs; a test need not wait for a slow network.
QUICK = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s",
    "WORKBENCH_CLUSTER_SECONDS": "3",
}


class Cluster:
    """A scheduler and its workers; `root` is the workbench's folder in which the workers are started."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self.start("scheduler", "--port", "0", "--host", "127.0.0.1")

    def start(self, *arguments: str, cores: str = "", root: Path | None = None) -> subprocess.Popen:
        """Start `dask` with arguments in `root`, pinned to `cores` (in taskset's syntax) if given."""
        command = [DASK, *arguments, "--no-dashboard", "--scheduler-file", self.file]
        with (self.folder / f"{len(self.processes)}.log").open("w") as log:
            process = subprocess.Popen(
                [*(["taskset", "-c", cores] if cores else []), *map(str, command)],
                cwd=root or self.root,
                env=workbench.surroundings(**QUICK),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    @property
    def address(self) -> str:
        """The scheduler's address, once it has one."""

        def written_address() -> str:
            with contextlib.suppress(OSError, ValueError):
                return json.loads(self.file.read_text())["address"]
            return ""

        return workbench.wait_for(written_address)

    def worker(self, name: str, resources: str = "device=1", **more: Any) -> subprocess.Popen:
        """Start a worker without a nanny; it may not have met the scheduler when this returns."""
        options = ["--nthreads", "1", "--no-nanny", "--name", name, "--local-directory", str(self.folder / name)]
        given_resources = ["--resources", resources] if resources else []
        return self.start("worker", "--host", "127.0.0.1", *options, *given_resources, **more)

    def meet(self, number: int, seconds: float = 120) -> None:
        """Wait until the scheduler knows `number` workers."""
        from distributed import Client

        with Client(self.address, timeout=seconds, set_as_default=False) as client:
            client.wait_for_workers(number, timeout=seconds)

    def end(self) -> None:
        """End every process and its children."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


@contextlib.contextmanager
def cluster(folder: Path, root: Path, workers: int = 2) -> Iterator[Cluster]:
    """Yield a cluster with the given number of workers."""
    folder.mkdir(parents=True, exist_ok=True)
    dask = Cluster(folder, root)
    try:
        dask.address  # noqa: B018  the workers read the file that is there by then
        for number in range(workers):
            dask.worker(f"w{number}")
        if workers:
            dask.meet(workers)
        yield dask
    finally:
        dask.end()
        deadline = time.monotonic() + 20
        while workbench.running(root) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in workbench.running(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
