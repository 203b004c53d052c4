"""Detects disturbances of the machine during timing. Knows nothing about what is timed or its times: a block is
repeated because of what the machine did, never because of its result.

Read before and after each block: time stolen by the hypervisor, time in which this process's threads were ready but
waited for a core, other processes' time on its cores, thermal throttling of CPU and GPU. On systems without `/proc`
only the load can be read, by `environment.card`, and no block is ever marked as disturbed.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lib import cpu_limits
from lib.measure.metrics.digits import percent

# Shares of the block's time on this process's cores. The kernel counts busy and stolen time in ticks; a single tick
# means nothing.
STOLEN, WAITED, FOREIGN = 0.02, 0.10, 0.10
TICKS = 2
STAT = Path("/proc/stat")
CORE = re.compile(r"cpu\d+")
SHARE = re.compile(r"\d+ %")
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


@dataclass(frozen=True)
class Reading:
    """Counters at one moment: seconds (summed over the cores), the number of throttling events of the cores, and
    whether the GPU is slowed down.
    """

    wall: float
    own: float
    busy: float
    stolen: float
    waited: float
    throttled: int
    slowed: bool = False


def cores() -> list[int]:
    """Return the CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_given() -> int:
    """Return how many cores this process may keep busy: the number of `cores`, or fewer where a control group limits
    its time and it is not bound to specific cores (a build binds its runs).
    """
    return cpu_limits.within_quota(len(cores()))


def watch(read: Callable[[], Reading | None] | None = None) -> Callable[[], str | None]:
    """Open a watch; return the function that closes it and returns what disturbed the time in between, or None."""
    read = read or reading
    before = read()

    def close() -> str | None:
        after = read()
        return None if before is None or after is None else judge(before, after, len(cores()), cores_given())

    return close


def judge(before: Reading, after: Reading, core_count: int, usable: int | None = None) -> str | None:
    """Return what disturbed the time between two readings on `core_count` cores, or None. `usable` is the number of
    cores that this process has time for (None: all); the waiting of its threads is a share of their time.
    """
    wall = max(after.wall - before.wall, 1e-9)
    available = wall * core_count
    least = TICKS * TICK_SECONDS
    if after.throttled > before.throttled or before.slowed or after.slowed:
        return "throttled"
    stolen = after.stolen - before.stolen
    if stolen > max(STOLEN * available, least):
        return f"{percent(stolen / available)} of the time was stolen by the hypervisor"
    waited = after.waited - before.waited
    own = wall * (usable or core_count)
    if waited > WAITED * own:
        return f"our threads waited for a core {percent(waited / own)} of the time"
    foreign = (after.busy - before.busy) - (after.own - before.own)
    if foreign > max(FOREIGN * available, 2 * least):
        return f"other processes took {percent(foreign / available)} of our cores"
    return None


def taken_by_others(reason: str) -> bool:
    """Return whether other programs on our cores caused a disturbance, which a process that shares them on purpose also
    does, rather than the hypervisor or heat.
    """
    return reason.startswith(("our threads waited", "other processes"))


def in_words(reasons: Iterable[str]) -> str:
    """Return disturbances as one phrase. Reasons that differ only in their share are merged, with the range of the
    shares. "nothing" if there are none.
    """
    shares: dict[str, list[int]] = {}
    for reason in sorted(set(reasons)):
        numbers = [int(share.rstrip(" %")) for share in SHARE.findall(reason)]
        shares.setdefault(SHARE.sub("{}", reason), []).extend(numbers)
    phrases = []
    for phrase, numbers in shares.items():
        least, most = min(numbers, default=0), max(numbers, default=0)
        phrases.append(phrase.format(f"{least} %" if least == most else f"{least} % to {most} %"))
    return "; ".join(phrases) or "nothing"


def beside(read: Callable[[], Reading | None] | None = None) -> Callable[[], str | None]:
    """Open a watch of the whole machine, for a counter that does not distinguish cores. Return the function that closes
    it and returns how long other programs kept any cores busy, relative to this process's own time; None if that is
    little.
    """
    read = read or partial(reading, everywhere=True)
    before = read()

    def close() -> str | None:
        after = read()
        if before is None or after is None:
            return None
        own = after.own - before.own
        others = after.busy - before.busy - own
        if others <= max(FOREIGN * own, 2 * TICKS * TICK_SECONDS):
            return None
        return f"other programs kept the processor busy {others / max(own, TICK_SECONDS):.1f} times as long as this one"

    return close


def reading(everywhere: bool = False) -> Reading | None:
    """Return the counters of this process and its cores (`everywhere`: all cores of the machine); None on systems
    without them.
    """
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return None
    own = {f"cpu{core}" for core in cores()}
    busy = stolen = 0.0
    for line in lines:
        name, *ticks = line.split()
        if name in own or (everywhere and CORE.fullmatch(name)):
            # Emulated Linux lacks the last columns.
            seconds = [int(tick) * TICK_SECONDS for tick in ticks[:8]] + [0.0] * 8
            user, nice, system, _, _, irq, soft, steal = seconds[:8]
            busy += user + nice + system + irq + soft
            stolen += steal
    return Reading(time.perf_counter(), time.process_time(), busy, stolen, _waited(), _throttled(), _gpu_slowed())


def _waited() -> float:
    """Return the seconds in which threads of this process were ready but did not run (schedstat's second field)."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return total * 1e-9


def _throttled() -> int:
    """Return the number of throttling events of this process's cores so far."""
    total = 0
    for core in cores():
        try:
            folder = Path(f"/sys/devices/system/cpu/cpu{core}/thermal_throttle")
            total += int((folder / "core_throttle_count").read_text())
        except (OSError, ValueError):
            continue
    return total


def _gpu_slowed() -> bool:
    """Return whether heat or the power supply slows the GPU down at this moment."""
    handle = gpu_handle()
    if handle is None:
        return False
    import pynvml

    try:
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError:
        return False
    harmful = (
        pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    )
    return bool(reasons & harmful)


def gpu_handle() -> Any | None:
    """Return NVML's handle of the CUDA device in use. None if no device is in use (even if the machine has one), or
    there is no NVML.

    The device is identified by its UUID where NVML knows it: CUDA numbers the devices of CUDA_VISIBLE_DEVICES, NVML all
    devices.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    import pynvml

    device = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "unknown")
    try:
        pynvml.nvmlInit()
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetHandleByIndex(device)
    except pynvml.NVMLError:
        return None
