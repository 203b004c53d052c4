"""The processor time that this process may use: all of its cores, or less where a control group (containers, batch
systems) sets a quota. Reads both versions of Linux control groups; other systems have no quota to read.
"""

from pathlib import Path

from lib import memory_limits


def within_quota(cores: int) -> int:
    """Return how many of `cores` this process may keep busy: as many as its quota pays for, at least one."""
    quota = cpu_quota()
    return cores if quota is None or quota >= cores else max(1, int(quota))


def cpu_quota() -> float | None:
    """Return the quota of this process's control groups, in cores; None where they set no limit.

    Reads both versions of control groups, and every parent of each group, as `memory_limits` does.
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
