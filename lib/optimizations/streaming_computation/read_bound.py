"""Counts the bytes that streaming reads, and times the same reads alone: the minimum time that streaming can take.

The split between disk and page cache is the system's own count for this process. Independent of which weights are read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import pandas as pd
from torch import nn

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import ceilings
from lib.models.offload.streamer import Streamer, streamer
from lib.optimizations.streaming_computation.limited.process_memory import disk_bytes

REPEATS = 5
FAR = "baseline far from its bound"
SHARED = "reading and computing share the machine"
ITSELF = "more time than reading and computing take one after the other"


@dataclass(frozen=True)
class Reads:
    """The reads of one call of a workload: bytes in total, bytes from the disk (None if the system does not say),
    median seconds of the same reads alone, and the tokens of the call.
    """

    bytes: int
    disk_bytes: int | None
    seconds: float
    tokens: int

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of the reads alone; None if nothing was read."""
        return self.bytes / self.seconds if self.bytes else None

    @property
    def source(self) -> str:
        """A phrase for where the bytes came from."""
        if self.disk_bytes is None:
            return "disk or page cache, the system does not say"
        share = self.disk_bytes / self.bytes if self.bytes else 0.0
        return f"{100 * min(share, 1.0):.0f} % from the disk, the rest from the page cache"


def stream_of(model: nn.Module) -> Streamer:
    """Return the streamer of the weights of `model`. Raises TypeError if they are in memory."""
    if (stream := streamer(model)) is None:
        raise TypeError("the weights of this model do not stream from a file")
    return stream


def reads(model: nn.Module, work: Callable[[], object], repeats: int = REPEATS) -> Reads:
    """Return the reads of one call of `work` on a streamed `model`, after one call that is not counted.

    Then the same places are read again into the same memory, without computing: the minimum time for these bytes in the
    same state of the page cache. Invalidates the slots of the streamer. Raises TypeError if `model` does not stream.
    """
    stream, prepare = stream_of(model), getattr(work, "prepare", None) or (lambda: None)
    file = stream.file
    work()
    prepare()
    stream.settle()  # waits for the uncounted call's read-ahead
    before, disk_before = file.bytes_read, disk_bytes()
    log: list[Callable[[], None]] = []
    file.log = log
    try:
        work()
    finally:
        file.log = None
    stream.settle()
    count = file.bytes_read - before
    disk_after = disk_bytes()
    from_disk = None if disk_before is None or disk_after is None else disk_after - disk_before
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        for reread in log:
            reread()
        seconds.append(perf_counter() - start)
    stream.forget()
    return Reads(count, from_disk, float(np.median(seconds)), getattr(work, "tokens", 1))


def of_workloads(model: nn.Module, compared: Compared) -> dict[str, Reads]:
    """Return the `reads` of the streamed `model` for every timed workload."""
    return {name: reads(model, timed.optimized) for name, timed in compared.timed.items()}


def against_reading(compared: Compared, reads_by_workload: Mapping[str, Reads]) -> tuple[Compared, pd.DataFrame]:
    """Return the comparison and its rows for `style.bound`, with the streamed arm held to its own bound: the larger of
    the physical bound of computing and the time of reading its bytes alone.

    `reads_by_workload`: the reads of one call of the optimized arm. If the arm falls short of the bound, the reason
    says whether its additional time is within that of the reads alone.
    """
    rows, bounds, peaks = pd.DataFrame(compared.bounds()), {}, compared.ceilings
    slower: dict[str, str] = {}
    for name, read in reads_by_workload.items():
        assert peaks is not None, "the timed workloads have no ceilings"
        base, computing = (ceilings.bound(cost, peaks).seconds for cost in compared.timed[name].costs)
        bounds[name] = base, max(computing, read.seconds)
        own = (rows.workload == name) & (rows.arm == "optimized")
        rows.loc[own, "bound"] = 1000 * bounds[name][1]
        if read.seconds > computing:
            rows.loc[own, "limit"] = "reading"
        pairs = compared.timed[name].pairs
        longer = float(np.median(pairs.optimized_seconds) - np.median(pairs.baseline_seconds))
        slower[name] = SHARED if longer <= (1 + ceilings.CLOSE) * read.seconds else ITSELF
    measurements = [_explained(m, bounds.get(m.workload), slower.get(m.workload, "")) for m in compared.measurements]
    return replace(compared, measurements=measurements), rows


def _explained(measured: Measurement, bounds: tuple[float, float] | None, slower: str) -> Measurement:
    """Return a rate or latency with predicted and realised speed-up against the streamed arm's own bound.

    The reason for a difference (`slower` if the arm falls short) replaces the one for the general bound; the reason for
    an undecided verdict is kept.
    """
    if bounds is None or measured.dimension != "performance" or measured.ratio is None:
        return measured
    predicted = bounds[0] / bounds[1]
    speed_up = measured.ratio if measured.higher_is_better else 1 / measured.ratio
    reasons = [part for part in (measured.reason or "").split("; ") if part and part not in ceilings.REASONS]
    if abs(speed_up / predicted - 1) > ceilings.CLOSE:
        reasons.append(FAR if speed_up > predicted else slower)
    reason = "; ".join(reasons) or None
    return measured.model_copy(update={"predicted": predicted, "realised": speed_up / predicted, "reason": reason})


def measurements(reads_by_workload: Mapping[str, Reads]) -> list[Measurement]:
    """Return the bytes read per token for every workload; the baseline reads none."""
    return [
        measurement.counted(
            "weight_bytes_read_per_token",
            name,
            0.0,
            read.bytes / read.tokens,
            f"counted at the file, one call; {read.source}",
            "measured",
        )
        for name, read in reads_by_workload.items()
    ]


def table(reads_by_workload: Mapping[str, Reads]) -> pd.DataFrame:
    """Return a table of text: the megabytes read per token for every workload, and where they came from."""
    rows = [(name, f"{read.bytes / read.tokens / 1e6:.3f}", read.source) for name, read in reads_by_workload.items()]
    return pd.DataFrame(rows, columns=["workload", "MB read per token", "where from"])


def share_of_bound(seconds: Sequence[float], bound: float) -> tuple[float, float, float]:
    """Return bound ÷ time at the median time, and at the ends of its 95 % interval (low, high)."""
    low, high = paired_stats.median_interval(seconds)
    return bound / float(np.median(seconds)), bound / high, bound / low
