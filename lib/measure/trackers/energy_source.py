"""Sources of joules: a counter read through Zeus (NVML: the whole GPU; RAPL: the whole socket, and its memory if that
is counted), or else an estimate from CPU time and a table of watts, with the reason why no counter was read. Knows
nothing about what uses energy.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from lib import memory_limits
from lib.measure.metrics.measurement import Provenance
from lib.measure.timing import disturbance

# NVML refreshes its counter slowly: shorter windows would be dominated by rounding.
COUNTER_WINDOW_SECONDS = 2.0
ESTIMATE_WINDOW_SECONDS = 0.1

POWERCAP = Path("/sys/class/powercap")  # where Linux shows RAPL, also for AMD processors
CPU_INFO, VENDOR = Path("/proc/cpuinfo"), Path("/sys/class/dmi/id/sys_vendor")

# Watts per logical core, idle and busy, from SPECpower_ssj2008 submissions per processor generation, as tabulated by
# the Cloud Carbon Footprint project (AWS constants). "EPYC" is the second generation; "server" the table's average.
WATTS_PER_CORE = {"EPYC": (0.47, 1.69), "Graviton": (0.47, 1.69), "server": (0.74, 3.5)}


@dataclass(frozen=True)
class Counter:
    """A source of joules. `kind` is nvml, rapl or estimate; `provenance` and `scope` are as a record states them.

    `idle_watts` were read when the counter was opened; `idle` reads them again, which takes a second. `beside` opens a
    watch for the work of others that the counter includes, if it counts more than this process's own device
    (`disturbance.beside`). For an estimate, `missing` states why no counter was read (and how to permit reading it),
    and `of_times` computes the estimate from wall and CPU seconds measured elsewhere.
    """

    kind: str
    provenance: Provenance
    scope: str
    window_seconds: float
    idle_watts: float | None
    joules: Callable[[], float]
    missing: str | None = None
    of_times: Callable[[float, float], float] | None = None
    idle: Callable[[], float | None] | None = None
    beside: Callable[[], Callable[[], str | None]] | None = None


def counter(device: str = "cpu") -> Counter:
    """Return the best source of joules for `device`: NVML for CUDA, RAPL for a CPU, else the estimate."""
    source, error = _zeus_counter(device)
    return source or replace(_estimate(), missing=_why_none(device, error))


def facts(device: str = "cpu") -> dict[str, str | None]:
    """Return, for the environment card, the energy counter of this machine or None, and the reason if there is none.

    The counter is opened, so that the card agrees with the measurements. Idle power is not read, as that takes a
    second.
    """
    opened, error = _opened(device)
    if opened is not None:
        return {"counter": opened[1], "missing": None}
    return {"counter": None, "missing": _why_none(device, error)}


def _why_none(device: str, error: str | None) -> str | None:
    """Return why no counter is read, where `error` is what reading it raised; None if there is no reason."""
    if device.startswith("cuda"):
        return f"NVML offers no energy counter here ({error})" if error else None
    files = sorted(POWERCAP.glob("intel-rapl*/energy_uj"))
    if not files:
        return f"absent: no RAPL counter under {POWERCAP}, as on most virtual machines"
    if closed := [file for file in files if not os.access(file, os.R_OK)]:
        return (
            f"not permitted: {closed[0]} is readable by root alone; "
            f"`sudo chmod o+r {POWERCAP}/intel-rapl*/energy_uj` permits it until the next boot"
        )
    return f"RAPL could not be read ({error})" if error else None


def _estimate() -> Counter:
    """Return the estimate from this process's CPU time. Idle cores are charged with idle power, so that gross joules
    depend on wall time as well.
    """
    family, (idle, busy) = watts_per_core()
    count = disturbance.cores_given()

    def of_times(seconds: float, cpu_seconds: float) -> float:
        return cpu_seconds * (busy - idle) + seconds * idle * count

    def joules() -> float:
        return of_times(time.perf_counter(), time.process_time())

    scope = (
        f"estimated: processor time × {busy} W per busy core, {idle} W per idle core "
        f'(SPECpower table of Cloud Carbon Footprint, row "{family}")'
    )
    return Counter("estimate", "estimated", scope, ESTIMATE_WINDOW_SECONDS, idle * count, joules, of_times=of_times)


def watts_per_core() -> tuple[str, tuple[float, float]]:
    """Return the row of WATTS_PER_CORE for this processor, and its (idle, busy) watts."""
    name = cpu_name()
    family = next((row for row in WATTS_PER_CORE if row in name), "server")
    return family, WATTS_PER_CORE[family]


@lru_cache
def cpu_name() -> str:
    """Return the processor's name as reported by the system. Linux on ARM reports no name, but numbers that identify
    the processor, and the machine's vendor.
    """
    fields = dict[str, str]()
    for line in memory_limits.lines_of(CPU_INFO):
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if name := fields.get("model name"):
        return name
    if part := fields.get("CPU part"):
        brand = "Graviton, " if " ".join(memory_limits.lines_of(VENDOR)).startswith("Amazon") else ""
        return f"{brand}{platform.machine()} implementer {fields.get('CPU implementer', 'unknown')} part {part}"
    return _macos_name() or platform.processor() or platform.machine()


def _macos_name() -> str | None:
    """Return macOS's name of the processor (`platform` only knows its architecture); None on other systems."""
    if platform.system() != "Darwin":
        return None
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() or None


Opened = tuple[Callable[[], float], str, str]  # joules so far, kind, scope


@lru_cache
def _opened(device: str) -> tuple[Opened | None, str | None]:
    """Return Zeus's counter for `device`, read once to test it; or None, and the error that reading raised."""
    import logging

    logging.getLogger("zeus").setLevel(logging.CRITICAL)
    try:
        return _nvml_joules(device) if device.startswith("cuda") else _rapl_joules(), None
    except Exception as error:  # Zeus raises a dozen kinds of errors for absent, forbidden or broken counters
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


@lru_cache
def _zeus_counter(device: str) -> tuple[Counter | None, str | None]:
    """Return Zeus's counter for `device`, with the idle power of one second; or None, and the error."""
    opened, error = _opened(device)
    if opened is None:
        return None, error
    joules, kind, scope = opened
    idle = partial(_idle_watts, joules)
    # RAPL counts every core, including those on which a build runs another notebook.
    beside = disturbance.beside if kind == "rapl" else None
    return Counter(kind, "measured", scope, COUNTER_WINDOW_SECONDS, idle(), joules, idle=idle, beside=beside), None


def _idle_watts(joules: Callable[[], float]) -> float | None:
    """Return the mean power over one second in which this process is idle; None if the counter did not move."""
    start, before = time.perf_counter(), joules()
    time.sleep(1.0)
    watts = (joules() - before) / (time.perf_counter() - start)
    return watts if watts > 0 else None


def _nvml_joules(device: str) -> Opened:
    import torch
    from zeus.device import get_gpus

    index = torch.device(device).index or 0
    gpus = get_gpus()
    gpus.get_total_energy_consumption(index)
    return lambda: gpus.get_total_energy_consumption(index) / 1000, "nvml", "NVML total-energy counter, whole GPU"


def _rapl_joules() -> Opened:
    from zeus.device import get_cpus

    cpus = get_cpus()
    first = [cpus.get_total_energy_consumption(index) for index in range(len(cpus))]

    def joules() -> float:
        energies = (cpus.get_total_energy_consumption(index) for index in range(len(cpus)))
        return sum(energy.cpu_mj + (energy.dram_mj or 0) for energy in energies) / 1000

    where = "whole socket" if len(first) == 1 else f"all {len(first)} sockets"
    memory = any(energy.dram_mj is not None for energy in first)  # many processors have no memory counter
    counters = "package and memory counters" if memory else "package counter, memory not counted"
    return joules, "rapl", f"RAPL {counters}, {where}"
