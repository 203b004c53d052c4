"""Energy of both arms, per token. Measured through Zeus where the machine has a readable counter (NVML: the whole GPU;
RAPL: the whole socket and its memory), else estimated as processor time × a stated power per core, and labelled so.
Unknown energy is never 0, and measured and estimated joules are never added up.

Knows nothing of models. Loading and start-up lie outside every window.
"""

import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement, Provenance
from lib.measure.timing import disturbance

Readings = dict[str, list[tuple[float, float]]]  # arm → joules and wall seconds per token, one pair a window

# NVML refreshes its counter slowly: shorter windows would be mostly rounding.
COUNTER_WINDOW_SECONDS = 2.0
ESTIMATE_WINDOW_SECONDS = 0.1
POWERCAP = Path("/sys/class/powercap")

# Watts per logical core, idle and busy, from SPECpower_ssj2008 submissions per processor generation, as tabulated by
# the Cloud Carbon Footprint project (AWS constants). "EPYC" is the second generation; "server" the table's average.
WATTS_PER_CORE = {"EPYC": (0.47, 1.69), "Graviton": (0.47, 1.69), "server": (0.74, 3.5)}


class CountedArm(Protocol):
    """An arm that says how many tokens one call processes; `prepare` and `synchronize` are used where it has them."""

    @property
    def tokens(self) -> int: ...

    def __call__(self) -> object: ...


@dataclass(frozen=True)
class Counter:
    """A source of joules: `kind` nvml, rapl or estimate; `provenance` and `scope` as a record states them."""

    kind: str
    provenance: Provenance
    scope: str
    window_seconds: float
    idle_watts: float | None
    joules: Callable[[], float]


def counter(device: str = "cpu") -> Counter:
    """Return the best source of joules for `device`: NVML for CUDA, RAPL for a CPU, else the estimate."""
    measured = _zeus_counter(device)
    return measured if isinstance(measured, Counter) else _estimate(measured)


def per_token(
    baseline: CountedArm,
    optimized: CountedArm,
    *,
    workload: str,
    blocks: int,
    device: str = "cpu",
    seconds: float | None = None,
    seed: int = 0,
    source: Counter | None = None,
) -> list[Measurement]:
    """Return gross joules per token, joules above idle per token, and tokens per joule of two workloads.

    In each of `blocks` blocks, in random order, each arm runs for one window (`seconds`; by default as long as the
    counter needs), and the baseline a second time as A/A control. `tokens` of an arm is what one call processes.
    """
    source = source or counter(device)
    window = seconds or source.window_seconds
    baseline(), optimized()
    shuffle = random.Random(seed)
    readings: Readings = {"baseline": [], "control": [], "optimized": []}
    for _ in range(blocks):
        arms = [("baseline", baseline), ("control", baseline), ("optimized", optimized)]
        shuffle.shuffle(arms)
        for name, arm in arms:
            readings[name].append(_window(arm, source, window))
    return _measurements(readings, source, workload, window)


def _window(arm: CountedArm, source: Counter, seconds: float) -> tuple[float, float]:
    """Run `arm` for at least `seconds`; return joules and wall seconds per token, without those of its `prepare`."""
    prepare, synchronize = getattr(arm, "prepare", None), getattr(arm, "synchronize", None)
    joules = wall = 0.0
    tokens = 0
    while wall < seconds:
        if prepare:
            prepare()
        if synchronize:
            synchronize()
        start, before = time.perf_counter(), source.joules()
        # With nothing to prepare the whole window is one stretch, so that a slow counter is read as rarely as possible.
        while True:
            arm()
            tokens += arm.tokens
            if synchronize:
                synchronize()
            if prepare or time.perf_counter() - start >= seconds:
                break
        joules += source.joules() - before
        wall += time.perf_counter() - start
    return joules / tokens, wall / tokens


def _measurements(readings: Readings, source: Counter, workload: str, window: float) -> list[Measurement]:
    gross = {name: [joules for joules, _ in values] for name, values in readings.items()}
    how = f"{source.scope}, {len(gross['baseline'])} windows of {window:g} s per arm in random order"
    options: dict[str, Any] = {"provenance": source.provenance, "source": how}
    if min(min(values) for values in gross.values()) <= 0:
        reason = "the counter did not move within a window"
        names = ("energy_joules_per_token", "energy_above_idle_joules_per_token", "tokens_per_joule")
        return [measurement.unavailable(name, workload, reason, how) for name in names]
    floor = paired_stats.noise_floor(paired_stats.differences(gross["baseline"], gross["control"]))
    inverse = {name: [1 / joules for joules in values] for name, values in gross.items()}

    def compared(metric: str, values: dict[str, list[float]], samples: bool) -> Measurement:
        return measurement.from_samples(
            metric, workload, values["baseline"], values["optimized"], floor=floor, samples=samples, **options
        )

    return [
        compared("energy_joules_per_token", gross, True),
        _above_idle(readings, source, workload, floor, how),
        compared("tokens_per_joule", inverse, False),
    ]


def _above_idle(readings: Readings, source: Counter, workload: str, floor: float, how: str) -> Measurement:
    name = "energy_above_idle_joules_per_token"
    if source.idle_watts is None:
        return measurement.unavailable(name, workload, "idle power could not be read", how)
    above = {
        arm: [joules - source.idle_watts * seconds for joules, seconds in values] for arm, values in readings.items()
    }
    if min(min(values) for values in above.values()) <= 0:
        return measurement.unavailable(name, workload, "a window took no more energy than idling", how)
    return measurement.from_samples(
        name,
        workload,
        above["baseline"],
        above["optimized"],
        source=f"{how}, less {source.idle_watts:.3g} W idle",
        floor=floor,
        provenance=source.provenance,
        samples=False,
    )


def _estimate(why: str) -> Counter:
    """Return the estimate by this process's processor time, with the reason why no counter is read. Idle cores are
    charged as idle, so that gross joules depend on wall time too.
    """
    family, (idle, busy) = watts_per_core()
    count = len(disturbance.cores())

    def joules() -> float:
        return time.process_time() * (busy - idle) + time.perf_counter() * idle * count

    scope = (
        f"estimated: processor time × {busy} W per busy core, {idle} W per idle core "
        f'(SPECpower table of Cloud Carbon Footprint, row "{family}"); {why}'
    )
    return Counter("estimate", "estimated", scope, ESTIMATE_WINDOW_SECONDS, idle * count, joules)


def watts_per_core() -> tuple[str, tuple[float, float]]:
    """Return the row of WATTS_PER_CORE for this processor, and its (idle, busy) watts."""
    name = cpu_name()
    family = next((row for row in WATTS_PER_CORE if row in name), "server")
    return family, WATTS_PER_CORE[family]


@lru_cache
def cpu_name() -> str:
    """Return the processor's name as the system states it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache
def _zeus_counter(device: str) -> Counter | str:
    """Return Zeus's counter for `device`, with the idle power of one second; or why no counter can be read."""
    import logging

    logging.getLogger("zeus").setLevel(logging.CRITICAL)
    try:
        joules, kind, scope = _nvml_joules(device) if device.startswith("cuda") else _rapl_joules()
    except Exception as error:  # Zeus raises a dozen kinds where a counter is absent, forbidden or broken
        return why_no_counter(device, error)
    start, before = time.perf_counter(), joules()
    time.sleep(1.0)
    idle = (joules() - before) / (time.perf_counter() - start)
    return Counter(kind, "measured", scope, COUNTER_WINDOW_SECONDS, idle if idle > 0 else None, joules)


def why_no_counter(device: str, error: Exception, powercap: Path = POWERCAP) -> str:
    """Return whether the energy counter of `device` is absent, or there and not permitted, and how to permit it."""
    if device.startswith("cuda"):
        return f"no energy counter: NVML gives none for {device} ({type(error).__name__})"
    counters = sorted(powercap.glob("intel-rapl*/energy_uj"))
    if not counters:
        return "no energy counter: this system offers none (no RAPL under /sys/class/powercap)"
    if not all(os.access(path, os.R_OK) for path in counters):
        return (
            "no energy counter: RAPL is there, but this user may not read it; to permit it, as root: "
            "chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"
        )
    return f"no energy counter: RAPL is there and cannot be used ({type(error).__name__})"


def _nvml_joules(device: str) -> tuple[Callable[[], float], str, str]:
    import torch
    from zeus.device import get_gpus

    index = torch.device(device).index or 0
    gpus = get_gpus()
    gpus.get_total_energy_consumption(index)
    return lambda: gpus.get_total_energy_consumption(index) / 1000, "nvml", "NVML total-energy counter, whole GPU"


def _rapl_joules() -> tuple[Callable[[], float], str, str]:
    from zeus.device import get_cpus

    cpus = get_cpus()
    indices = range(len(cpus))

    def joules() -> float:
        total = 0.0
        for index in indices:
            energy = cpus.get_total_energy_consumption(index)
            total += energy.cpu_mj + (energy.dram_mj or 0)
        return total / 1000

    joules()
    return joules, "rapl", "RAPL package and memory counters, whole socket"
