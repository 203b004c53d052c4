"""CPU and memory use of a process tree, sampled while it runs. Independent of notebooks."""

import contextlib
import time
from dataclasses import dataclass, field

import psutil

INTERVAL_SECONDS = 0.5
MOST_SAMPLES = 1200


@dataclass
class Samples:
    """Samples as lists of equal length. At MOST_SAMPLES their number is halved, and the interval doubled."""

    seconds: list[float] = field(default_factory=list)
    cpu_percent: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    interval_seconds: float = INTERVAL_SECONDS

    def add(self, seconds: float, cpu_percent: float, memory_bytes: int) -> None:
        """Add one sample; two merged samples keep the mean CPU use and the larger memory."""
        self.seconds.append(round(seconds, 2))
        self.cpu_percent.append(round(cpu_percent, 1))
        self.memory_bytes.append(memory_bytes)
        if len(self.seconds) >= MOST_SAMPLES:
            self._halve()

    def _halve(self) -> None:
        pairs = range(0, len(self.seconds) - 1, 2)
        self.seconds = [self.seconds[at + 1] for at in pairs]
        self.cpu_percent = [round((self.cpu_percent[at] + self.cpu_percent[at + 1]) / 2, 1) for at in pairs]
        self.memory_bytes = [max(self.memory_bytes[at : at + 2]) for at in pairs]
        self.interval_seconds *= 2


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Tree:
    """The descendants of a process: samples their use and ends them. Remembers them all, so that orphans end too."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.used: dict[tuple[int, float], float] = {}
        self.start = self.last = time.monotonic()
        self.samples = Samples()

    def sample(self) -> None:
        """Take a sample if one is due. The root itself (papermill) is not counted."""
        now = time.monotonic()
        if now - self.last < self.samples.interval_seconds:
            return
        busy, memory = 0.0, 0
        for process in self._descendants():
            mark = (process.pid, process.create_time())
            try:
                with process.oneshot():
                    times, resident = process.cpu_times(), process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            used = times.user + times.system
            busy += used - self.used.get(mark, 0.0)
            self.used[mark] = used
            memory += resident
        elapsed, self.last = now - self.last, now
        self.samples.add(now - self.start, 100 * max(busy, 0.0) / elapsed, memory)

    def _descendants(self) -> list[psutil.Process]:
        try:
            processes = self.root.children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                self.seen[(process.pid, process.create_time())] = process
            except psutil.NoSuchProcess:
                continue
        return processes

    def end_descendants(self) -> None:
        """Kill all descendants of the root, including orphans."""
        for _ in range(3):
            self._descendants()
            alive = [process for process in self.seen.values() if is_alive(process)]
            if not alive:
                return
            for process in alive:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(alive, timeout=0.5)

    def end(self) -> None:
        """Kill the root first, so that it starts nothing more, then its descendants."""
        self._descendants()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.root.kill()
        self.end_descendants()
