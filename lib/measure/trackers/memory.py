"""Measures true memory peaks: each arm loads and runs in several fresh processes, the arms taking turns, and its peak
is read after loading and after the workload. Starts the processes and converts their answers to measurements;
`lib.measure.trackers.memory_child` runs in them. Knows nothing about how the arms differ.

Two peaks are read. The peak of the process (resident memory, or CUDA's allocator) includes everything and varies
between processes: it has an interval over turns and a floor from the baseline's children. The peak of live tensors, in
bytes, is the same in every process, and is judged if the weights are so small that this variation would dominate.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

from lib.measure.timing import children
from lib.measure.timing.children import Arm as Arm

if TYPE_CHECKING:
    from torch import nn

    from lib.measure.metrics.measurement import Measurement

TURNS = 3
TURNS_ON_GPU = 3  # the fewest that give an interval: processes on CUDA cannot be forked, and each takes many seconds
# Smaller weights could fit into memory that was held and freed before they were loaded.
LARGE_BYTES = 2**28
# glibc's heap grows in such steps (M_TOP_PAD and a page). Equal processes rarely differ by more than one, and a few of
# them often read equal peaks, whose scatter of zero is then no interval.
HEAP_STEP_BYTES = 2**17 + 2**12
ALLOCATOR = "CUDA allocator"  # whose peaks are exact


@dataclass(frozen=True)
class Peak:
    """Peaks that one process read. Bytes are those of the whole process, or of the allocator on CUDA (see `scope`).

    `before_load_bytes` is the memory of the interpreter with its libraries and the architecture's code: the same in
    every arm, and most of the peak of a small model. `code_bytes` is by how much the resident pages of library files
    grew meanwhile, which belong to the process but not to the model. `tensor_bytes` is the peak of live tensors, or
    None if it was not counted; counting it watches every operation, which makes the times longer. Times are those of
    one fresh process: seconds to load, milliseconds of the first call.
    """

    before_load_bytes: int | None
    after_load_bytes: int | None
    peak_bytes: int | None
    scope: str
    load_seconds: float | None
    first_call_ms: float | None
    reason: str | None = None
    weights_bytes: int | None = None
    code_bytes: int = 0
    tensor_bytes: int | None = None

    @property
    def above_start_bytes(self) -> int | None:
        """The peak minus what the process held before loading, and minus pages of code loaded since. (These may have
        been loaded after the peak, so that the value can be negative for a model of less than a megabyte.)
        """
        if self.peak_bytes is None:
            return None
        return self.peak_bytes - (self.before_load_bytes or 0) - self.code_bytes


@dataclass(frozen=True)
class Peaks:
    """The readings of one arm's child processes, in order; a single reading if there was no room for children."""

    readings: list[Peak]
    child: bool = True  # read in child processes

    @property
    def reason(self) -> str | None:
        """Why a reading failed, or None."""
        return next((reading.reason for reading in self.readings if reading.reason), None)

    @property
    def scope(self) -> str:
        """What the bytes include."""
        return self.readings[0].scope

    @property
    def tensor_bytes(self) -> int | None:
        """The peak of live tensors, counted by one child; None if no child counted it."""
        return next((n for reading in self.readings if (n := reading.tensor_bytes) is not None), None)

    def values(self, name: str) -> list[float] | None:
        """Return the field `name` of every reading, in order; None if a reading lacks it."""
        numbers = [getattr(reading, name) for reading in self.readings]
        return None if None in numbers else numbers

    def median(self, name: str) -> float | None:
        """Return the median of the field `name` over the readings; None if a reading lacks it."""
        numbers = self.values(name)
        return None if numbers is None else median(numbers)

    def times(self, name: str) -> list[float] | None:
        """Return the time `name` of every reading without counted tensors (of all readings if there is none), in order;
        None if a reading lacks it.
        """
        unwatched = [reading for reading in self.readings if reading.tensor_bytes is None] or self.readings
        return Peaks(unwatched).values(name)


def peaks(*arms: Arm, turns: int | None = None, watched: bool = True) -> list[Peaks]:
    """Run each arm in `turns` fresh child processes, the arms taking turns, on this process's cores and threads; return
    the readings of each arm. With `watched`, live tensors are counted in the first turn only, since that makes small
    steps several times slower. The reading of a child that fails has nulls and the reason.
    """
    if reason := children.why_none():
        return [Peaks([failed(reason)]) for _ in arms]
    on_gpu = any(arm.device.startswith("cuda") for arm in arms)
    turns = turns or (TURNS_ON_GPU if on_gpu else TURNS)
    jobs = [{"arms": [asdict(arm)], "watched": watched and turn == 0} for turn in range(turns) for arm in arms]
    answers = children.run("lib.measure.trackers.memory_child", jobs)
    readings = [failed(answer["failed"]) if "failed" in answer else Peak(**answer) for answer in answers]
    return [Peaks(readings[number :: len(arms)]) for number in range(len(arms))]


def allocated(arm: Callable[[], object], model: "nn.Module", reason: str) -> Peaks:
    """Return the peak of the CUDA allocator while `arm` runs `model` in this process, minus what it holds for others.

    For models without room for a second copy (`reason`). The allocator counts tensors, so the memory of others can be
    subtracted exactly. The times to load and of the first call remain unknown.
    """
    import torch

    from lib.measure.roofline import cost_model  # imported late: needs torch

    arm()  # libraries keep what they allocate at their first call, which would count for the first arm only
    gc.collect()
    own = cost_model.weights_bytes(model)
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    arm()
    torch.cuda.synchronize()
    scope = f"peak of the {ALLOCATOR} in the notebook's process, minus what it held besides this arm"
    peak = torch.cuda.max_memory_allocated() - others
    return Peaks([Peak(0, own, peak, scope, None, None, reason, own)], child=False)


def failed(reason: str) -> Peak:
    """Return the reading of a child that failed."""
    return Peak(None, None, None, "none", None, None, reason)


# --- measurements ----------------------------------------------------------------------------------------------------

BYTES = {
    "peak_memory_above_start_bytes": ("above_start_bytes", None),
    "peak_memory_after_load_bytes": ("after_load_bytes", "load"),
    "peak_memory_bytes": ("peak_bytes", None),
}
TIMES = {"load_seconds": ("load_seconds", "load"), "first_call_ms": ("first_call_ms", None)}


def measurements(baseline: Peaks, optimized: Peaks, *, workload: str = "generate") -> "list[Measurement]":
    """Return both arms' peaks (of live tensors and of processes) and times (to load, and of the first call).

    One kind of peak is judged: that of live tensors if the baseline's weights are small, else that of the process.
    Peaks that were read once, and times, are informative.
    """
    results = _live_tensors(baseline, optimized, workload)
    shown = None
    if results and not _large(baseline):
        weights = (baseline.readings[0].weights_bytes or 0) / 1e6
        shown = f"weights of {weights:.1f} MB are too small to judge a process's peak: peak_tensor_bytes is judged"
    for metric, (name, work) in BYTES.items():
        results.append(_process(metric, name, work or workload, baseline, optimized, shown))
    for metric, (name, work) in TIMES.items():
        results.append(_time(metric, name, work or workload, baseline, optimized))
    return results


def _large(arm: Peaks) -> bool:
    return (arm.readings[0].weights_bytes or 0) >= LARGE_BYTES


def _live_tensors(baseline: Peaks, optimized: Peaks, workload: str) -> "list[Measurement]":
    from lib.measure.metrics import measurement  # imported late: slow, and not needed in the child

    base, opt = baseline.tensor_bytes, optimized.tensor_bytes
    if base is None or opt is None:
        return []
    source = "peak bytes of all live tensors during load and workload, in a child whose operations are watched"
    if not _large(baseline):
        return [measurement.counted("peak_tensor_bytes", workload, base, opt, source, "measured")]
    reason = "the peak of the process is judged"
    return [measurement.informative("peak_tensor_bytes", workload, base, opt, source, reason=reason)]


def _process(
    metric: str, name: str, workload: str, baseline: Peaks, optimized: Peaks, shown: str | None
) -> "Measurement":
    """Return a peak of the process. It is informative if a reason `shown` is given, or if it was read once."""
    from lib.measure.metrics import measurement, paired_samples

    base, opt = baseline.values(name), optimized.values(name)
    source = _source(optimized)
    if base is None or opt is None:
        missing = baseline.reason or optimized.reason or "the system does not report a process's peak memory"
        return measurement.unavailable(metric, workload, missing, source)
    before = optimized.median("before_load_bytes")
    source += f", {before / 2**20:.0f} MiB of it before load" if before and name != "above_start_bytes" else ""
    count = len(base)
    if count < 2 or min(*base, *opt) <= 0:
        reason = shown or ("read once: no interval" if count < 2 else "a child held no more than before loading")
        return measurement.informative(metric, workload, median(base), median(opt), source, n=count, reason=reason)
    resolution = 0.0 if ALLOCATOR in optimized.scope else math.log1p(HEAP_STEP_BYTES / min(*base, *opt))
    judged = paired_samples.from_samples(
        metric, workload, base, opt, source=source, floor=_floor(base), process=range(count), resolution=resolution
    )
    return measurement.unjudged(judged, shown) if shown else judged


def _floor(baseline: Sequence[float]) -> float:
    """Return by how much two groups of the baseline's children can differ (natural logarithm)."""
    from lib.measure.metrics import paired_stats

    low, high = paired_stats.student_interval([math.log(value) for value in baseline])
    return math.sqrt(2) * (high - low) / 2


def _source(arm: Peaks) -> str:
    if not arm.child:
        return arm.scope
    count = len(arm.readings)
    how = "one fresh child process per arm" if count == 1 else f"{count} fresh child processes per arm, in turn"
    return f"{how}, {arm.scope}"


def _time(metric: str, name: str, workload: str, baseline: Peaks, optimized: Peaks) -> "Measurement":
    from lib.measure.metrics import measurement

    base, opt = baseline.times(name), optimized.times(name)
    if base is None or opt is None:
        missing = baseline.reason or optimized.reason or "not timed"
        return measurement.unavailable(metric, workload, missing, _source(optimized))
    clock = f"median of {len(base)} fresh child processes per arm, perf_counter; the allocator keeps no large blocks"
    samples = {"baseline": base, "optimized": opt}
    return measurement.informative(metric, workload, median(base), median(opt), clock, n=len(base), samples=samples)
