"""True peaks of memory: each arm loads and runs in a fresh process, and its peak is read after load and after the
workload. Starts the processes and turns their answers into measurements; `lib.measure.trackers.memory_child` runs in
them. Knows nothing of how the arms differ.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lib.measure.metrics.measurement import Measurement

ROOT = Path(__file__).resolve().parents[3]
TIME_LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Arm:
    """What a child process loads and runs.

    `folder`: a checkpoint folder; or `load`: keyword arguments of `lib.models.loading.load`. `transform`:
    "module:function", called with the loaded model and `arguments`, returns the model to measure. `opener`:
    "module:function", called with the folder and `arguments`, returns the model, which is then not loaded whole.
    `workload`: prefill, decode or generate.
    """

    folder: str | None = None
    load: dict[str, Any] | None = None
    transform: str | None = None
    opener: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    workload: str = "generate"
    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 16
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Peak:
    """Peaks of one arm. Bytes are of the whole process, or of the allocator on CUDA (`scope` says which).

    `before_load_bytes` is the interpreter with its libraries and the architecture's code: the same in every arm, and
    most of the peak of a small model. Times are of one fresh process: seconds to load, milliseconds of the first and of
    the second call (None where the first was long).
    """

    before_load_bytes: int | None
    after_load_bytes: int | None
    peak_bytes: int | None
    scope: str
    load_seconds: float | None
    first_call_ms: float | None
    second_call_ms: float | None
    reason: str | None = None
    child: bool = True  # read in a process of its own

    @property
    def above_start_bytes(self) -> int | None:
        """The peak minus what the process held before it loaded anything."""
        return None if self.peak_bytes is None else self.peak_bytes - (self.before_load_bytes or 0)


def peaks(*arms: Arm) -> list[Peak]:
    """Run each arm in a fresh child process, one after the other, on the cores and threads of this one; return their
    peaks.

    The children are forked from one process that has imported the libraries and done nothing else, so that these are
    imported once; on CUDA, and where processes cannot fork, each child is started anew. The peak of an arm whose child
    fails has nulls and the reason.
    """
    together = hasattr(os, "fork") and not any(arm.device.startswith("cuda") for arm in arms)
    groups: list[Sequence[Arm]] = [arms] if together else [[arm] for arm in arms]
    if not together and (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that this process's allocator holds back is not free for a child
    return [peak for group in groups for peak in _run(group)]


def allocated(arm: Callable[[], object], model: "nn.Module", reason: str) -> Peak:
    """Return the peak of the CUDA allocator while `arm` runs `model` in this process, minus what it holds besides.

    For a model without room for a second copy (`reason`): the allocator counts tensors, so the memory of others can be
    subtracted exactly. The times to load and of a first call stay unknown.
    """
    import torch

    from lib.measure.roofline import cost_model  # which needs torch

    gc.collect()
    own = cost_model.weights_bytes(model)
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    arm()
    torch.cuda.synchronize()
    scope = "peak of the CUDA allocator in the notebook's process, less what it held beside this arm"
    return Peak(0, own, torch.cuda.max_memory_allocated() - others, scope, None, None, None, reason, child=False)


def _run(arms: Sequence[Arm]) -> list[Peak]:
    torch = sys.modules.get("torch")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if torch else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lib.measure.trackers.memory_child"],
            input=json.dumps([asdict(arm) for arm in arms]),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, "PYTHONPATH": path},
            timeout=TIME_LIMIT_SECONDS * len(arms),
        )
    except subprocess.TimeoutExpired:
        return [_failed(f"the child process ran past {TIME_LIMIT_SECONDS} s")] * len(arms)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    peaks_read = [_failed(fields["failed"]) if "failed" in fields else Peak(**fields) for fields in lines]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    lost = _failed(f"the child process ended with {done.returncode}: {last}")
    return peaks_read + [lost] * (len(arms) - len(peaks_read))


def _failed(reason: str) -> Peak:
    return Peak(None, None, None, "none", None, None, None, reason)


def measurements(baseline: Peak, optimized: Peak, *, workload: str = "generate") -> "list[Measurement]":
    """Return both peaks, time to load and time of the first call as measurements of (baseline, optimized).

    Load and first call are single readings of fresh processes: informative, without an interval.
    """
    from lib.measure.metrics import measurement  # not above: statistics import slowly, and the child needs none

    reason = baseline.reason or optimized.reason
    fixed = f", {optimized.before_load_bytes / 2**20:.0f} MiB of it before load" if optimized.before_load_bytes else ""
    source = f"one fresh child process per arm, {optimized.scope}" if optimized.child else optimized.scope
    names = {
        "peak_memory_above_start_bytes": ("above_start_bytes", workload),
        "peak_memory_after_load_bytes": ("after_load_bytes", "load"),
        "peak_memory_bytes": ("peak_bytes", workload),
        "load_seconds": ("load_seconds", "load"),
        "first_call_ms": ("first_call_ms", workload),
    }
    results = []
    for metric, (name, work) in names.items():
        base, opt = getattr(baseline, name), getattr(optimized, name)
        if base is None or opt is None:
            missing = reason or "the system offers no peak of a process's memory"
            results.append(measurement.unavailable(metric, work, missing, source))
        elif metric.endswith("bytes"):
            results.append(measurement.counted(metric, work, base, opt, source + fixed, "measured"))
        else:
            clock = "one fresh child process per arm, perf_counter"
            results.append(measurement.informative(metric, work, base, opt, clock, n=1))
    return results
