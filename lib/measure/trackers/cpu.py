"""Utilisation of the CPU (and of the GPU, if there is one) while something runs. Knows nothing about what runs."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lib.measure.timing import disturbance


@dataclass(frozen=True)
class Use:
    """CPU use over a period, on the cores given to this process. `gpu` is the GPU's utilisation as a share (None
    without a GPU).
    """

    wall_seconds: float
    cpu_seconds: float
    cores: int
    gpu: float | None = None

    @property
    def utilisation(self) -> float:
        """(user + system) / (wall × cores)."""
        return self.cpu_seconds / (self.wall_seconds * self.cores)

    @property
    def source(self) -> str:
        """How the utilisation was measured, as a record states it."""
        return f"user + system time over wall time on {self.cores} given core{'s' * (self.cores > 1)}"


def use(arm: Callable[[], object], seconds: float = 0.5) -> Use:
    """Call `arm` until `seconds` have passed, at least once; return the CPU use of this process, and the GPU's.

    The arm's `prepare` is not counted.
    """
    prepare = getattr(arm, "prepare", None)
    synchronize = getattr(arm, "synchronize", None)
    wall = busy = 0.0
    with _GpuSampler() as gpu:
        while not wall or wall < seconds:
            if prepare:
                prepare()
            if synchronize:
                synchronize()
            start_wall, start_busy = time.perf_counter(), time.process_time()
            arm()
            if synchronize:
                synchronize()
            wall += time.perf_counter() - start_wall
            busy += time.process_time() - start_busy
    return Use(wall, busy, disturbance.cores_given(), gpu.mean)


class _GpuSampler:
    """Samples the GPU's utilisation twenty times a second while entered."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.closing = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def mean(self) -> float | None:
        """The mean utilisation as a share; None where there is no GPU."""
        return sum(self.samples) / len(self.samples) / 100 if self.samples else None

    def __enter__(self) -> "_GpuSampler":
        handle = disturbance.gpu_handle()
        if handle is not None:
            self.thread = threading.Thread(target=self._sample, args=(handle,), daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        if self.thread:
            self.thread.join()

    def _sample(self, handle: Any) -> None:
        import pynvml

        with suppress(pynvml.NVMLError):  # `mean` stays None on a card without this counter
            while not self.closing.wait(0.05):
                self.samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
