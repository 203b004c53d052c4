"""The program in a child process of `lib.measure.trackers.memory`: loads and runs an arm, and answers with peaks of
memory and times. No arm inherits memory from another. The workload is called once, as in a process that starts.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib import memory_limits
from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.measure.timing import child
from lib.measure.timing.children import Arm
from lib.measure.trackers.live_tensors import LiveTensors
from lib.measure.trackers.memory import LARGE_BYTES, Peak

MEMORY = Path("/proc/self")
# Settings of glibc's allocator (malloc.h): one arena for all threads, and large blocks are mapped and given back at
# once, whatever came before.
SETTLED = {"M_ARENA_MAX": (-8, 1), "M_MMAP_THRESHOLD": (-3, 2**17), "M_TRIM_THRESHOLD": (-1, 2**17)}


def peak_bytes() -> tuple[int | None, str]:
    """Return the peak of this process's resident memory so far and its source; None on a system without one."""
    if (highest := _high_water_bytes()) is not None:
        return highest, "VmHWM of the whole process"
    try:
        import resource
    except ImportError:
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None), "peak working set of the whole process"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, every other system in kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak or None, "ru_maxrss of the whole process"


def _high_water_bytes() -> int | None:
    """Return Linux's own peak; None elsewhere, and in sandboxes that show `/proc` without it."""
    lines = memory_limits.lines_of(MEMORY / "status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def reset_peak() -> bool:
    """Give free memory back, and let the peak begin at what is resident now; return whether the system permits it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water_bytes() is not None  # no other peak begins anew


def settle_allocator() -> None:
    """Set the allocator as `SETTLED` says, for the rest of this process; other systems' allocators stay as they are."""
    with suppress(OSError, AttributeError):
        for parameter, value in SETTLED.values():
            ctypes.CDLL(None).mallopt(parameter, value)


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
    settle_allocator()
    return asdict(read(Arm(**fields), watched=job["watched"]))


def read(arm: Arm, *, watched: bool = True) -> Peak:
    """Load and run `arm` in this process and return its peaks; `watched`: that of live tensors too.

    These cannot be counted where weights are used in a mapped file, nor need they be where CUDA's allocator counts.
    """
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
    live = LiveTensors() if watched and not on_gpu and not arm.opener else None
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
    with _watched(live):
        work = child.workload(model, arm)
        if work.prepare:
            work.prepare()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        first_call_ms = 1000 * (time.perf_counter() - start)
    most, _ = peak()
    return Peak(
        before,
        after_load,
        most,
        scope,
        load_seconds,
        first_call_ms,
        weights_bytes=cost_model.weights_bytes(model),
        # Without a reset the peak before loading may hide pages of code that came since.
        code_bytes=code_bytes() - code if reset and not on_gpu else 0,
        tensor_bytes=live.peak_bytes if live else None,
    )


@contextmanager
def _watched(live: LiveTensors | None) -> Iterator[None]:
    """Count live tensors within, where they are counted; no garbage is collected then: when that happens is chance."""
    if live is None:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        with live:
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
