"""The program in a child process of `lib.measure.trackers.memory`: loads and runs an arm, and answers with peaks of
memory and times. No arm inherits memory from another.

The workload is called once, as a process does it that starts; a second call, whose live tensors are counted, follows
where the first was short or the child is its arm's first.
"""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.measure.timing import child
from lib.measure.timing.children import Arm
from lib.measure.trackers.live_tensors import LiveTensors
from lib.measure.trackers.memory import LARGE_BYTES, Peak

LONG_SECONDS = 1.0  # after a first call that lasts longer there is no second
MEMORY = Path("/proc/self")


def peak_bytes() -> tuple[int | None, str]:
    """Return the peak of this process's resident memory so far and its source; None on a system without one."""
    status = MEMORY / "status"
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "VmHWM of the whole process"
    try:
        import resource
    except ImportError:
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None), "peak working set of the whole process"
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "ru_maxrss of the whole process"


def reset_peak() -> bool:
    """Give free memory back, and let the peak begin at what is resident now; return whether the system permits it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def code_bytes() -> int:
    """Return the resident bytes of the libraries' files: pages of code come when they are used, whatever the model."""
    total, library = 0, False
    try:
        for line in (MEMORY / "smaps").read_text().splitlines():
            if line[0] in "0123456789abcdef":
                library = ".so" in line.rpartition("/")[2]
            elif library and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return total


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load and run the job's arm in this process and return the fields of its `Peak`."""
    (fields,) = job["arms"]
    return asdict(read(Arm(**fields), first=job["first"]))


def read(arm: Arm, *, first: bool = True) -> Peak:
    """Load and run `arm` in this process and return its peaks; `first`: count live tensors however long a call is."""
    on_gpu = arm.device.startswith("cuda")
    child.import_architecture(arm)
    if on_gpu:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        reset = True
    else:
        reset = reset_peak()

    def peak() -> tuple[int | None, str]:
        if on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(), "peak of the CUDA allocator"
        size, scope = peak_bytes()
        return size, scope + (", reset before load" if reset else ", which here cannot be reset: less what was before")

    code, (before, scope) = code_bytes(), peak()
    live = None if on_gpu or arm.opener else LiveTensors()
    start = time.perf_counter()
    with _watched(live):
        model = child.load(arm)
        if live:
            live.hold(model)
    present = child.make_present(model)
    if on_gpu:
        torch.cuda.synchronize()
    load_seconds = time.perf_counter() - start
    after_load, _ = peak()
    if not on_gpu:
        _require_all(present, after_load, before)
    work = child.workload(model, arm)
    if work.prepare:
        work.prepare()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    most, _ = peak()
    code = 0 if on_gpu else code_bytes() - code
    counted = live is not None and (first or first_call < LONG_SECONDS)
    if counted:
        with _watched(live):
            if work.prepare:
                work.prepare()
            work()
    return Peak(
        before,
        after_load,
        most,
        scope,
        load_seconds,
        1000 * first_call,
        weights_bytes=cost_model.weights_bytes(model),
        code_bytes=code,
        tensor_bytes=live.peak_bytes if live and counted else None,
    )


@contextmanager
def _watched(live: LiveTensors | None) -> Iterator[None]:
    """Count live tensors within, where they are counted; garbage is collected before and not meanwhile, since when
    that happens is chance.
    """
    gc.collect()
    gc.disable()
    try:
        with live or nullcontext():
            yield
    finally:
        gc.enable()


def _require_all(present: int, after_load: int | None, before: int | None) -> None:
    """Raise UserError where the weights were never whole in memory: the system took mapped pages away again."""
    if present > LARGE_BYTES and after_load is not None and after_load - (before or 0) < 0.95 * present:
        raise UserError(
            f"memory is short: of {present / 1e9:.2f} GB of weights the system kept "
            f"{(after_load - (before or 0)) / 1e9:.2f} GB in memory, so a peak would be too low"
        )


if __name__ == "__main__":
    child.serve(run)
