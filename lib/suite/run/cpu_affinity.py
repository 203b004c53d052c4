"""CPU cores: which ones this process may use, and which of them each job gets.

Hyper-threads of one physical core stay with one job, so that pinned neighbours do not slow each other down. Knows only
the number of jobs.

The default number of jobs is the largest at which comparing the baseline with itself is known to stay clean: two jobs,
each pinned to its own cores, give no more false positives and no wider intervals than one, and get more done. More jobs
share caches and memory bandwidth in ways that have not been measured, and so do two jobs on the threads of one physical
core. At real dimensions and at full size two jobs need memory for both; on a GPU, and where cores cannot be pinned, the
default is one.
"""

from collections.abc import Sequence
from pathlib import Path

import psutil

from lib import cpu_limits, memory_limits
from lib.errors import UserError

CLEAN_SIDE_BY_SIDE = 2
SLICE_BYTES = 7 * 2**30  # of memory per notebook at scale slice: two, children included, held up to 12.2 GiB
FULL_COPIES, FULL_BYTES = 12, 2 * 2**30  # per notebook at scale full: float32 copies of the model, and libraries


def available() -> list[int]:
    """Return the cores that this process may use, hyper-threads of one physical core next to each other. If a control
    group limits the processor time, as `docker --cpus` does, only as many cores as the quota pays for: preferably one
    thread of each physical core.
    """
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        cores = sorted(process.cpu_affinity(), key=lambda core: (_first_sibling(core), core))
    else:
        cores = list(range(psutil.cpu_count() or 1))
    quota = cpu_limits.cpu_quota()
    if quota is None or quota >= len(cores):
        return cores
    ranked = sorted((thread, core) for group in _physical(cores) for thread, core in enumerate(group))
    kept = {core for _, core in ranked[: max(1, int(quota))]}
    return [core for core in cores if core in kept]


def _physical(cores: Sequence[int]) -> list[list[int]]:
    """Return the cores grouped by physical core."""
    groups: dict[int, list[int]] = {}
    for core in cores:
        groups.setdefault(_first_sibling(core), []).append(core)
    return list(groups.values())


def _first_sibling(core: int) -> int:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return int(path.read_text(encoding="ascii").replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return core


def can_pin() -> bool:
    """Return whether the operating system supports pinning a process to cores."""
    return hasattr(psutil.Process(), "cpu_affinity")


def default_jobs(scale: str, device: str, largest: int | None = None) -> int:
    """Return the default number of parallel jobs; the module docstring gives the reasons. `largest` is the parameter
    count of the largest checkpoint at scale full, where known.
    """
    if device != "cpu" or not can_pin() or (scale == "full" and largest is None):
        return 1
    each = FULL_COPIES * 4 * (largest or 0) + FULL_BYTES if scale == "full" else SLICE_BYTES
    room = CLEAN_SIDE_BY_SIDE if scale == "proxy" else int(memory_limits.memory_bytes() // each)
    return max(1, min(CLEAN_SIDE_BY_SIDE, room, len(_physical(available()))))


def share_out(jobs: int) -> list[list[int]]:
    """Return an equal number of cores for each of `jobs` jobs: whole physical cores if there are enough. Raises
    UserError if there are too few cores.
    """
    cores = available()
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs {jobs}: expected 1 to {len(cores)}, the number of cores that may be used here")
    groups = _physical(cores)
    if jobs > len(groups):
        groups = [[core] for core in cores]  # threads of one physical core get different jobs
    each = len(groups) // jobs
    if len({len(group) for group in groups}) == 1:  # neighbours stay together: they share caches
        shares = [groups[at * each : (at + 1) * each] for at in range(jobs)]
    else:  # physical cores of different kinds: every job gets some of each
        shares = [groups[at::jobs][:each] for at in range(jobs)]
    cores_of = [[core for group in share for core in group] for share in shares]
    fewest = min(map(len, cores_of))
    return [share[:fewest] for share in cores_of]
