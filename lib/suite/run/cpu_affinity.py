"""CPU cores: which ones this process may use, and which of them each job gets.

Cores that share one physical core (hyper-threads) stay with one job, so that pinned neighbours do not slow each other.
Knows nothing of jobs beyond their number.

The default number of jobs is the largest at which comparing the baseline with itself is known to stay clean: two, each
pinned to its own cores, give no more false positives and no wider intervals than one alone, and more work done. More of
them share caches and memory bandwidth in ways that have not been measured. At real dimensions two need memory for both;
at full size, on a GPU and where cores cannot be pinned it is one.
"""

from pathlib import Path

import psutil

from lib import memory_limits
from lib.errors import UserError

CLEAN_SIDE_BY_SIDE = 2
SLICE_BYTES = 7 * 2**30  # of memory per notebook at scale slice: two, children included, held up to 12.2 GiB


def available() -> list[int]:
    """Return the cores that this process may use, hyper-threads of one physical core next to each other."""
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        return list(range(psutil.cpu_count() or 1))
    return sorted(process.cpu_affinity(), key=lambda core: (_first_sibling(core), core))


def _first_sibling(core: int) -> int:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return int(path.read_text(encoding="ascii").replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return core


def can_pin() -> bool:
    """Return whether the operating system supports pinning a process to cores."""
    return hasattr(psutil.Process(), "cpu_affinity")


def default_jobs(scale: str, device: str) -> int:
    """Return the default number of parallel jobs; the module docstring gives the reasons."""
    if device != "cpu" or scale == "full" or not can_pin():
        return 1
    room = CLEAN_SIDE_BY_SIDE if scale == "proxy" else int(memory_limits.memory_bytes() // SLICE_BYTES)
    return max(1, min(CLEAN_SIDE_BY_SIDE, room, len(available())))


def share_out(jobs: int) -> list[list[int]]:
    """Return equally many cores for each of `jobs` jobs. Raises UserError if there are too few."""
    cores = available()
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs {jobs}: expected 1 to {len(cores)}, the number of cores that may be used here")
    each = len(cores) // jobs
    return [cores[index * each : (index + 1) * each] for index in range(jobs)]
