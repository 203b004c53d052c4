"""What streaming reads, and the least time that reading takes: bytes counted, and the same reads once more without the
model. Says what came from the disk and what from the page cache, by the system's own count of this process.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from torch import nn

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import ceilings
from lib.models.offload.streamer import streamer

REPEATS = 5


@dataclass(frozen=True)
class Reads:
    """One call of a workload: bytes it read, those of them that came from the disk (None where the system does not
    say), the median seconds that the same reads take alone, and the tokens of the call.
    """

    bytes: int
    disk_bytes: int | None
    seconds: float
    tokens: int

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of the reads alone; None where nothing was read."""
        return self.bytes / self.seconds if self.bytes else None

    @property
    def source(self) -> str:
        """Where the bytes came from, in words."""
        if self.disk_bytes is None:
            return "disk or page cache, the system does not say"
        share = self.disk_bytes / self.bytes if self.bytes else 0.0
        return f"{100 * min(share, 1.0):.0f} % from the disk, the rest from the page cache"


def reads(model: nn.Module, work: Callable[[], object], repeats: int = REPEATS) -> Reads:
    """Return what one call of `work` on a streamed `model` reads, after one call that is not counted.

    Then the same places are read again into the same memory, without computing: the least time for these bytes, in the
    same state of the page cache. Forgets what the slots hold.
    """
    file, prepare = streamer(model).file, getattr(work, "prepare", None) or (lambda: None)
    work()
    prepare()
    before, disk = file.bytes_read, disk_bytes()
    file.log = log = []
    try:
        work()
    finally:
        file.log = None
    streamer(model).settle()
    count = file.bytes_read - before
    from_disk = None if disk is None else disk_bytes() - disk
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        for again in log:
            again()
        seconds.append(perf_counter() - start)
    streamer(model).forget()
    return Reads(count, from_disk, float(np.median(seconds)), getattr(work, "tokens", 1))


def disk_bytes() -> int | None:
    """Return the bytes that this process had read from a disk so far; None where the system has no count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def against_reading(compared: Compared, found: dict[str, Reads]) -> tuple[Compared, pd.DataFrame]:
    """Return the comparison and its rows for `figures.bound` with the streamed arm's own bound: the larger of the
    physical bound of computing and of the time that reading its bytes takes alone.

    `found`: workload → what one call of the optimized arm reads.
    """
    rows, bounds = pd.DataFrame(compared.bounds()), {}
    for name, one in found.items():
        base, computing = (ceilings.bound(cost, compared.ceilings).seconds for cost in compared.timed[name].costs)
        bounds[name] = base, max(computing, one.seconds)
        mine = (rows.workload == name) & (rows.arm == "optimized")
        rows.loc[mine, "bound"] = 1000 * bounds[name][1]
        if one.seconds > computing:
            rows.loc[mine, "limit"] = "reading"
    told = [_told(one, bounds.get(one.workload)) for one in compared.measurements]
    return replace(compared, measurements=told), rows


def _told(found: Measurement, bounds: tuple[float, float] | None) -> Measurement:
    """Set predicted and realised speed-up of one rate or latency against the streamed arm's own bound."""
    if bounds is None or found.dimension != "performance" or found.ratio is None:
        return found
    predicted = bounds[0] / bounds[1]
    measured = found.ratio if found.higher_is_better else 1 / found.ratio
    reason = found.reason
    if abs(measured / predicted - 1) > ceilings.CLOSE:
        reason = "baseline far from its bound" if measured > predicted else "reading and computing share the machine"
    return found.model_copy(update={"predicted": predicted, "realised": measured / predicted, "reason": reason})


def measurements(found: dict[str, Reads]) -> list[Measurement]:
    """Return bytes read per token of every workload; the baseline reads none."""
    return [
        measurement.counted(
            "weight_bytes_read_per_token", name, 0.0, one.bytes / one.tokens,
            f"counted at the file, one call; {one.source}", "measured",
        )
        for name, one in found.items()
    ]  # fmt: skip


def share_of_bound(seconds: list[float], bound: float) -> tuple[float, float, float]:
    """Return bound ÷ time, at the median time and at the ends of its 95 % interval."""
    low, high = paired_stats.median_interval(seconds)
    return bound / float(np.median(seconds)), bound / high, bound / low
