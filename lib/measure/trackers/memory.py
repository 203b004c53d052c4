"""True peaks of memory: each arm loads and runs in fresh processes, several per arm and in turn, and its peak is read
after load and after the workload. Starts the processes and turns their answers into measurements;
`lib.measure.trackers.memory_child` runs in them. Knows nothing of how the arms differ.

Two peaks are read. That of the process (resident memory, or CUDA's allocator) holds everything, and scatters: it has an
interval over turns and a floor from the baseline's children. That of the bytes of live tensors is the same in every
process, and is judged where weights are so small that the scatter would decide.
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
TURNS_ON_GPU = 3  # the fewest that have an interval: no process there can be forked, and each takes many seconds
# Weights of fewer bytes could fit into memory that was held and freed before they were loaded.
LARGE_BYTES = 2**28


@dataclass(frozen=True)
class Peak:
    """Peaks that one process read. Bytes are of the whole process, or of the allocator on CUDA (`scope` says which).

    `before_load_bytes` is the interpreter with its libraries and the architecture's code: the same in every arm, and
    most of the peak of a small model. `code_bytes` is by how much the resident pages of the libraries' files grew
    meanwhile: of the process, but not of the model. `tensor_bytes` is the peak of live tensors, None where it was not
    counted; where it was, watching every operation has made the times longer. Times are of one fresh process: seconds
    to load, milliseconds of the first call.
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
        """The peak minus what the process held before it loaded anything, and minus pages of code since then (which
        may have come after the peak: a model of less than a megabyte can seem to take less than nothing).
        """
        if self.peak_bytes is None:
            return None
        return self.peak_bytes - (self.before_load_bytes or 0) - self.code_bytes


@dataclass(frozen=True)
class Peaks:
    """What the children of one arm read, in turn; a single reading where there was no room for children."""

    readings: list[Peak]
    child: bool = True  # read in processes of their own

    @property
    def reason(self) -> str | None:
        """Why a reading failed, or None."""
        return next((reading.reason for reading in self.readings if reading.reason), None)

    @property
    def scope(self) -> str:
        """Of what the bytes are."""
        return self.readings[0].scope

    @property
    def tensor_bytes(self) -> int | None:
        """The peak of live tensors, which one child counted; None where none did."""
        return next((n for reading in self.readings if (n := reading.tensor_bytes) is not None), None)

    def values(self, name: str) -> list[float] | None:
        """Return a number of every reading, in turn; None where one lacks it."""
        numbers = [getattr(reading, name) for reading in self.readings]
        return None if None in numbers else numbers

    def median(self, name: str) -> float | None:
        """Return the median of a number over the readings; None where one lacks it."""
        numbers = self.values(name)
        return None if numbers is None else median(numbers)

    def times(self, name: str) -> list[float] | None:
        """Return a time of every reading that was not watched, in turn; None where there is none, or one lacks it."""
        free = [reading for reading in self.readings if reading.tensor_bytes is None] or self.readings
        return Peaks(free).values(name)


def peaks(*arms: Arm, turns: int | None = None, watched: bool = True) -> list[Peaks]:
    """Run each arm in `turns` fresh child processes, the arms taking turns, on the cores and threads of this process;
    return what they read. In the first turn live tensors are counted, where `watched`: it makes small steps several
    times slower. The reading of a child that fails has nulls and the reason.
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
    """Return the peak of the CUDA allocator while `arm` runs `model` in this process, minus what it holds besides.

    For a model without room for a second copy (`reason`): the allocator counts tensors, so the memory of others can be
    subtracted exactly. The times to load and of a first call stay unknown.
    """
    import torch

    from lib.measure.roofline import cost_model  # which needs torch

    arm()  # what libraries allocate at their first call stays: the arm that ran first would pay for both
    gc.collect()
    own = cost_model.weights_bytes(model)
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    arm()
    torch.cuda.synchronize()
    scope = "peak of the CUDA allocator in the notebook's process, less what it held beside this arm"
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
    """Return the peaks of both arms, of live tensors and of processes, the time to load and of the first call.

    Of the two kinds of peak one is judged: that of live tensors where the baseline's weights are small, else that of
    the process. A peak that was read once and the times are informative.
    """
    results = _live_tensors(baseline, optimized, workload)
    shown = None
    if results and not _large(baseline):
        weights = (baseline.readings[0].weights_bytes or 0) / 1e6
        shown = f"weights of {weights:.1f} MB are too few to judge a process's peak: peak_tensor_bytes is judged"
    for metric, (name, work) in BYTES.items():
        results.append(_process(metric, name, work or workload, baseline, optimized, shown))
    for metric, (name, work) in TIMES.items():
        results.append(_time(metric, name, work or workload, baseline, optimized))
    return results


def _large(arm: Peaks) -> bool:
    return (arm.readings[0].weights_bytes or 0) >= LARGE_BYTES


def _live_tensors(baseline: Peaks, optimized: Peaks, workload: str) -> "list[Measurement]":
    from lib.measure.metrics import measurement  # not above: statistics import slowly, and the child needs none

    base, opt = baseline.tensor_bytes, optimized.tensor_bytes
    if base is None or opt is None:
        return []
    source = "bytes of all live tensors at the worst moment of load and workload, a child whose operations are watched"
    if not _large(baseline):
        return [measurement.counted("peak_tensor_bytes", workload, base, opt, source, "measured")]
    reason = "the peak of the process is judged"
    return [measurement.informative("peak_tensor_bytes", workload, base, opt, source, reason=reason)]


def _process(
    metric: str, name: str, workload: str, baseline: Peaks, optimized: Peaks, shown: str | None
) -> "Measurement":
    """Return a peak of the process; informative with the reason `shown`, where there is one, or where it was read
    once.
    """
    from lib.measure.metrics import measurement, paired_samples

    base, opt = baseline.values(name), optimized.values(name)
    source = _source(optimized)
    if base is None or opt is None:
        missing = baseline.reason or optimized.reason or "the system offers no peak of a process's memory"
        return measurement.unavailable(metric, workload, missing, source)
    before = optimized.median("before_load_bytes")
    source += f", {before / 2**20:.0f} MiB of it before load" if before and name != "above_start_bytes" else ""
    count = len(base)
    if count < 2 or min(*base, *opt) <= 0:
        reason = shown or ("read once: no interval" if count < 2 else "a child held no more than before it loaded")
        return measurement.informative(metric, workload, median(base), median(opt), source, n=count, reason=reason)
    judged = paired_samples.from_samples(
        metric, workload, base, opt, source=source, floor=_floor(base), process=range(count)
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
