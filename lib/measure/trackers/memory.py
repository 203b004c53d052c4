"""True peaks of memory: each arm in a process of its own, where nothing else ever lived, read after load and after the
workload. Knows how to start such a process and what to make of its answer; `lib.measure.trackers.memory_child` is what
runs in it.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.measure.metrics.measurement import Measurement

ROOT = Path(__file__).resolve().parents[3]
TIME_LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Arm:
    """What a child process loads and runs.

    `folder`: a checkpoint folder; or `load`: keyword arguments of `lib.models.loading.load`. `transform`:
    "module:function" that is given the loaded model and `arguments` and returns the model to measure. `opener`:
    "module:function" that is given the folder and `arguments` and returns the model, which is then not loaded whole.
    `workload`: prefill, decode or generate.
    """

    folder: str | None = None
    load: dict | None = None
    transform: str | None = None
    opener: str | None = None
    arguments: dict = field(default_factory=dict)
    workload: str = "generate"
    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 16
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Peak:
    """What was found. Bytes are of the whole process, or of the allocator on CUDA (`scope` says which).

    `before_load_bytes` is the interpreter with its libraries and the architecture's code: the same in every arm, and
    for a small model most of the rest. Times are of one fresh process: seconds to load, milliseconds of the first and
    of the second call (None where the first was long).
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
        """The peak less what the process held before it loaded anything."""
        return None if self.peak_bytes is None else self.peak_bytes - (self.before_load_bytes or 0)


def peaks(*arms: Arm) -> list[Peak]:
    """Run each arm in a fresh child process, one after the other, on the cores and threads of this one; return what
    they found.

    The children are forked from one process that has imported the libraries, and nothing else, so that they are not
    imported once per arm; on CUDA, and where nothing can be forked, each is started anew. An arm whose child fails
    comes back with nulls and the reason.
    """
    together = hasattr(os, "fork") and not any(arm.device.startswith("cuda") for arm in arms)
    groups = [arms] if together else [[arm] for arm in arms]
    if not together and (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process's allocator keeps for itself, a child could not have
    return [found for group in groups for found in _run(group)]


def peak(arm: Arm) -> Peak:
    """Run one arm in a fresh child process and return what it found; see `peaks`."""
    return peaks(arm)[0]


def allocated(arm: Callable[[], object], model: object, reason: str) -> Peak:
    """Return the peak of the CUDA allocator while `arm` runs `model` in this process, less what is held beside it.

    For a model of which no second copy has room (`reason`): the allocator counts tensors, so what else it holds can be
    taken off exactly. How long loading and a first call take is not known then.
    """
    import torch

    from lib.measure.roofline import cost_model  # which needs torch

    gc.collect()
    own = cost_model.weights_bytes(model)
    torch.cuda.synchronize()
    beside = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    arm()
    torch.cuda.synchronize()
    scope = "peak of the CUDA allocator in the notebook's process, less what it held beside this arm"
    return Peak(0, own, torch.cuda.max_memory_allocated() - beside, scope, None, None, None, reason, child=False)


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
    found = [_failed(one["failed"]) if "failed" in one else Peak(**one) for one in lines]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    lost = _failed(f"the child process ended with {done.returncode}: {last}")
    return found + [lost] * (len(arms) - len(found))


def _failed(reason: str) -> Peak:
    return Peak(None, None, None, "none", None, None, None, reason)


def measurements(baseline: Peak, optimized: Peak, workload: str = "generate") -> "list[Measurement]":
    """Return both peaks, time to load and time of the first call as measurements of (baseline, optimized).

    Load and first call are single readings of fresh processes: informative, without an interval.
    """
    from lib.measure.metrics import measurement  # the child needs no statistics, whose import takes half a second

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
    found = []
    for metric, (name, work) in names.items():
        values = getattr(baseline, name), getattr(optimized, name)
        if None in values:
            missing = reason or "the system offers no peak of a process's memory"
            found.append(measurement.unavailable(metric, work, missing, source))
        elif metric.endswith("bytes"):
            found.append(measurement.counted(metric, work, *values, source + fixed, "measured"))
        else:
            found.append(
                measurement.informative(metric, work, *values, "one fresh child process per arm, perf_counter", n=1)
            )
    return found
