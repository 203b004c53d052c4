"""The processor time that this process may use: that of all its cores, or less where a control group (containers, batch
systems) limits it. Control groups of Linux are read in both versions; other systems have no limit to read.
"""

from pathlib import Path

from lib import memory_limits


def within_quota(cores: int) -> int:
    """Return how many of so many cores this process may keep busy: as many as its time is worth, one at least."""
    quota = cpu_quota()
    return cores if quota is None or quota >= cores else max(1, int(quota))


def cpu_quota() -> float | None:
    """Return how many cores' time the control groups of this process allow it, None where they set no limit. Both
    versions of control groups are read, and of each group those above it too, as for the memory.
    """
    quotas = []
    for line in memory_limits.lines_of(memory_limits.OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        for name in {"", "cpu"} & set(controllers.split(",")):
            own_group = memory_limits.GROUPS / (name or ".") / path.lstrip("/")
            inside = [own_group, *own_group.parents]
            quotas += [_quota(group) for group in inside if group.is_relative_to(memory_limits.GROUPS)]
    return min((quota for quota in quotas if quota), default=None)


def _quota(group: Path) -> float | None:
    """Return the limit of one control group, in cores; None where it sets none."""
    second = " ".join(memory_limits.lines_of(group / "cpu.max"))
    first = [line for name in ("quota", "period") for line in memory_limits.lines_of(group / f"cpu.cfs_{name}_us")]
    try:
        microseconds, period = map(int, second.split() or first)
        return microseconds / period if microseconds > 0 else None
    except (ValueError, ZeroDivisionError):
        return None  # "max", or a group without these files
