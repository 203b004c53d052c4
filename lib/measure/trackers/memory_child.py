"""The program of a child process of `lib.measure.trackers.memory`: loads and runs an arm, and answers with its memory
peaks and times. No arm inherits memory from another. The workload is called once, as in a newly started process.
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
# Settings of glibc's allocator (malloc.h): one arena for all threads; large blocks are always mapped, and returned
# immediately when freed.
SETTLED = {"M_ARENA_MAX": (-8, 1), "M_MMAP_THRESHOLD": (-3, 2**17), "M_TRIM_THRESHOLD": (-1, 2**17)}


def peak_bytes() -> tuple[int | None, str]:
    """Return this process's peak resident memory so far, and its source; None on systems that do not report it."""
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
    """Return the peak that Linux reports (VmHWM); None elsewhere, and in sandboxes whose `/proc` lacks it."""
    lines = memory_limits.lines_of(MEMORY / "status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def reset_peak() -> bool:
    """Return free memory to the system and reset the peak to the current resident memory; return whether the system
    supports the reset.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water_bytes() is not None  # only this peak is reset


def settle_allocator() -> None:
    """Apply `SETTLED` to glibc's allocator for the rest of this process; other allocators are left unchanged."""
    with suppress(OSError, AttributeError):
        for parameter, value in SETTLED.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def code_bytes() -> int:
    """Return the resident bytes of library files, whose pages of code are loaded on first use, for any model."""
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
    """Load and run `arm` in this process and return its peaks; with `watched`, including that of live tensors.

    Live tensors are not counted if weights are used from a mapped file, where they cannot be, or on CUDA, where the
    allocator counts them.
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
        return size, scope + (", reset before load" if reset else ", which cannot be reset here: minus what was before")

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
        # Without a reset, pages of code loaded since may be hidden below the peak before loading.
        code_bytes=code_bytes() - code if reset and not on_gpu else 0,
        tensor_bytes=live.peak_bytes if live else None,
    )


@contextmanager
def _watched(live: LiveTensors | None) -> Iterator[None]:
    """Count live tensors inside the context, if `live` is given. Garbage collection is off meanwhile, since its moment
    is random.
    """
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
    """Raise UserError if the weights were never completely in memory, because the system evicted mapped pages."""
    if present > LARGE_BYTES and after_load is not None and after_load - (before or 0) < 0.95 * present:
        raise UserError(
            f"memory is short: of {present / 1e9:.2f} GB of weights the system kept "
            f"{(after_load - (before or 0)) / 1e9:.2f} GB in memory, so a peak would be too low"
        )
