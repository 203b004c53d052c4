"""Measures the machine's ceilings and compares times with them. The ceilings are a large matrix product, and the faster
of a large copy and of a matrix that is only read; they are measured once per host, device, dtype, number of threads and
version of torch. From them follow the physical bound of a workload, the predicted speed-up, and the realised share of
it. Knows nothing about how a cost is counted.

A copy alone is not a ceiling of a CPU's memory: the caches fetch each line of the target before it is overwritten.
These bytes are in no formula, so decoding, which only reads its weights, can be faster than a copy.
"""

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lib import files
from lib.measure.metrics import measurement
from lib.measure.metrics.busy import says_busy
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline.cost_model import Cost
from lib.measure.timing import disturbance

REPEATS = 5
# Side of the square product and bytes of the copy: far larger than any cache, about a second in all.
PRODUCT = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}
READ_ROWS = 4096  # of the matrix that is only read
TRAFFIC = "copy or reading"  # how bytes/s were measured; stored ceilings of another kind are measured again
DISPATCH_SHARE = 0.2  # share of the bound below which neither arithmetic nor traffic explains the time
CLOSE = 0.1
ZEROS, FALLBACK, BELOW_MDE = "zeros stored dense", "kernel fallback", "below MDE"
CACHED, DISPATCH, UNEXPLAINED = "cache resident", "dispatch bound", "unexplained"
REASONS = (ZEROS, FALLBACK, BELOW_MDE, CACHED, DISPATCH, UNEXPLAINED)  # that `explain` adds
# NVIDIA cards by driver name: dense 16-bit FLOP/s and bytes/s from their data sheets.
DATA_SHEETS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA L40S": (362e12, 0.864e12),
}
_DISTURBED: dict[str, dict[str, Any]] = {}  # measured by this process while the machine was disturbed


@dataclass(frozen=True)
class Ceilings:
    """The highest FLOP/s and bytes/s that this machine reaches (bytes read, and for a copy also written)."""

    flops_per_second: float
    bytes_per_second: float
    device: str
    dtype: str
    threads: int
    measured_at: str
    cache_bytes: int | None

    @property
    def source(self) -> str:
        """How the ceilings were measured, as a record states it."""
        where = f"this machine, {self.dtype}, {self.threads} threads, {self.measured_at}"
        return f"matrix product, {TRAFFIC} on {where}"


@dataclass(frozen=True)
class Bound:
    """The lower bound on the time of a cost: the larger of arithmetic and traffic, and which of the two it is."""

    seconds: float
    limited_by: str


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32, *, fresh: bool = False) -> Ceilings:
    """Return this machine's ceilings for `dtype` at the current number of threads; measured once, then read from the
    cache.

    The cache is in WORKBENCH_CACHE, or `~/.cache/workbench`. `fresh` measures again. Ceilings measured on a disturbed
    machine are not stored; this process keeps using them, so that all its bounds are comparable.
    """
    name = str(dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    key = f"{platform.node()} {where} {name} {torch.get_num_threads()} threads {disturbance.cores_given()} cores"
    key += f" torch {torch.__version__} {TRAFFIC}"
    path = files.cache_folder() / "ceilings.json"
    stored = _read(path) | _DISTURBED
    if key in stored and not fresh:
        return Ceilings(**stored[key])
    disturbed = disturbance.watch()
    ceilings = Ceilings(
        _product(device, dtype),
        _traffic(device),
        device,
        name,
        torch.get_num_threads(),
        datetime.now(timezone.utc).date().isoformat(),
        last_level_cache_bytes(device),
    )
    if disturbed() is None:
        with suppress(OSError):  # a cache that is not writable is ignored
            files.write_atomically(path, json.dumps(_read(path) | {key: asdict(ceilings)}, indent=1))
    else:
        _DISTURBED[key] = asdict(ceilings)
    return ceilings


def last_level_cache_bytes(device: str = "cpu") -> int | None:
    """Return the size of the last-level cache of this process's cores; None if the system does not report it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path(f"/sys/devices/system/cpu/cpu{disturbance.cores()[0]}/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
        except (OSError, ValueError, KeyError):
            continue
    return max(sizes, default=None)


def bound(cost: Cost, ceilings: Ceilings) -> Bound:
    """Return t_bound = max(FLOPs / peak, bytes / bandwidth)."""
    arithmetic, traffic = cost.flops / ceilings.flops_per_second, cost.bytes / ceilings.bytes_per_second
    return Bound(max(arithmetic, traffic), "arithmetic" if arithmetic >= traffic else "traffic")


def utilisation(
    workload: str,
    costs: tuple[Cost, Cost],
    seconds: tuple[float, float],
    ceilings: Ceilings,
) -> list[Measurement]:
    """Return the model-FLOPs and memory-bandwidth utilisation of (baseline, optimized).

    `costs` and measured `seconds` are those of one call. The source also states the vendor's figures, where known.
    """
    flops = [cost.flops / time_ / ceilings.flops_per_second for cost, time_ in zip(costs, seconds)]
    traffic = [cost.bytes / time_ / ceilings.bytes_per_second for cost, time_ in zip(costs, seconds)]
    source = f"FLOPs and bytes by formula over measured time, against {ceilings.source}{data_sheet(ceilings)}"
    return [
        measurement.informative("model_flops_utilisation", workload, flops[0], flops[1], source, "derived"),
        measurement.informative("memory_bandwidth_utilisation", workload, traffic[0], traffic[1], source, "derived"),
    ]


def data_sheet(ceilings: Ceilings) -> str:
    """Return the measured ceilings and the vendor's, as a clause; empty if the vendor's are not known."""
    if not ceilings.device.startswith("cuda") or ceilings.dtype not in ("bfloat16", "float16"):
        return ""
    stated = DATA_SHEETS.get(torch.cuda.get_device_name(ceilings.device))
    if stated is None:
        return ""
    reached = ceilings.flops_per_second, ceilings.bytes_per_second
    flops, traffic, most_flops, most_traffic = (f"{number / 1e12:.3g}" for number in (*reached, *stated))
    return f": {flops} TFLOP/s and {traffic} TB/s, of {most_flops} and {most_traffic} in its data sheet"


def explain(
    measured: Measurement,
    costs: tuple[Cost, Cost],
    seconds: tuple[float, float],
    ceilings: Ceilings,
    *,
    zero_share: float = 0.0,
    fallback: bool = False,
    working_set_bytes: float | None = None,
) -> Measurement:
    """Return the measurement (a rate or latency) with the predicted speed-up, the realised share of it, and the reason
    if they differ.

    `costs` and `seconds` (median time of one call) are those of (baseline, optimized). `zero_share` is the share of
    zeros in the optimized model's dense weights (`cost_model.zero_share`). `fallback` says that a slower kernel ran
    than the optimization is designed for. `working_set_bytes` are the bytes that the optimized arm reads in every call
    (its weights).
    """
    if measured.ratio is None:
        return measured
    bounds = [bound(cost, ceilings) for cost in costs]
    predicted = bounds[0].seconds / bounds[1].seconds
    invert = not measured.higher_is_better
    speedup = 1 / measured.ratio if invert else measured.ratio
    low, high = measured.ci or (measured.ratio, measured.ratio)
    low, high = (1 / high, 1 / low) if invert else (low, high)
    reason = None
    # Times of a busy machine explain nothing, and their reason is repeated for other workloads.
    if not (says_busy(measured.reason) or low <= predicted <= high or abs(speedup / predicted - 1) <= CLOSE):
        if zero_share > CLOSE and costs[1].flops < costs[0].flops:
            reason = ZEROS
        elif fallback:
            reason = FALLBACK
        elif measured.mde is not None and abs(predicted - 1) < max(measured.mde, measured.noise_floor or 0):
            reason = BELOW_MDE
        else:
            fits = bool(working_set_bytes and ceilings.cache_bytes and working_set_bytes < ceilings.cache_bytes)
            reason = _unrealised(bounds, seconds, fits)
    both = "; ".join(part for part in (measured.reason, reason) if part) or None
    return measured.model_copy(update={"predicted": predicted, "realised": speedup / predicted, "reason": both})


def _unrealised(bounds: list[Bound], seconds: tuple[float, float], fits_in_cache: bool) -> str:
    """Return the reason why times differ from their bounds, as far as these show it."""
    reached = [limit.seconds / time_ for limit, time_ in zip(bounds, seconds)]
    # Only traffic can beat the ceiling thanks to a cache; arithmetic cannot.
    beaten = any(share > 1 and limit.limited_by == "traffic" for share, limit in zip(reached, bounds))
    if beaten or (bounds[0].limited_by == "traffic" and fits_in_cache):
        return CACHED
    if min(reached) < DISPATCH_SHARE:
        return DISPATCH
    return UNEXPLAINED


def _product(device: str, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a square matrix product."""
    side = PRODUCT["cuda" if device.startswith("cuda") else "cpu"]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _best(lambda: torch.mm(left, right, out=out), device)


def _traffic(device: str) -> float:
    """Return the higher bytes/s of a copy (bytes read and written) and of a vector-matrix product (which reads the
    matrix once).
    """
    size = COPY_BYTES["cuda" if device.startswith("cuda") else "cpu"] // 4
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    matrix = source.view(min(READ_ROWS, size), -1)
    vector = torch.ones(1, matrix.shape[1], device=device)
    return max(copied, source.nbytes / _best(lambda: torch.nn.functional.linear(vector, matrix), device))


def _best(call: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
