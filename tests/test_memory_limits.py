"""The memory that a process may use according to control groups of both versions, in simulated folders."""

from types import SimpleNamespace

import pytest

from lib import memory_limits

GIB = 2**30
STAT = "anon 1\nactive_file 2147483648\ninactive_file 1073741824\ntotal_active_file 2147483648\ntotal_inactive_file 0"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that writes a group's limit and use, and one that sets the groups of this process."""
    monkeypatch.setattr(memory_limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limits, "OWN_GROUPS", tmp_path / "own")
    now = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(memory_limits.psutil, "virtual_memory", lambda: now)

    def group(path, limit, use, names=("memory.max", "memory.current")):
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "memory.stat"), (limit, use, STAT)):
            (folder / name).write_text(f"{value}\n")

    return group, (tmp_path / "own").write_text


def test_without_a_control_group_the_machines_memory_counts(groups):
    assert (memory_limits.memory_bytes(), memory_limits.free_memory_bytes()) == (64 * GIB, 40 * GIB)
    group, own = groups
    own("0::/free\n")
    group("free", "max", GIB)
    assert (memory_limits.memory_bytes(), memory_limits.free_memory_bytes()) == (64 * GIB, 40 * GIB)


def test_the_tightest_group_counts_and_file_cache_counts_as_free(groups):
    group, own = groups
    own("0::/batch/job/step\n")
    group("batch", 32 * GIB, 20 * GIB)
    group("batch/job", 16 * GIB, 10 * GIB)
    group("batch/job/step", "max", 10 * GIB)
    assert (memory_limits.memory_bytes(), memory_limits.free_memory_bytes()) == (16 * GIB, (16 - 10 + 3) * GIB)
    group("batch", 32 * GIB, 34 * GIB)
    assert memory_limits.free_memory_bytes() == (32 - 34 + 3) * GIB


def test_cgroups_v1_limits_are_read(groups):
    group, own = groups
    own("5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/\n")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group("memory", 9223372036854771712, 50 * GIB, first)
    group("memory/job", 8 * GIB, 5 * GIB, first)
    group("elsewhere", GIB, 0)
    assert (memory_limits.memory_bytes(), memory_limits.free_memory_bytes()) == (8 * GIB, (8 - 5 + 2) * GIB)


def test_in_a_container_the_limit_is_in_the_top_group(groups):
    group, own = groups
    own("0::/machine/of/the/host\n")
    group(".", 4 * GIB, GIB)
    assert memory_limits.memory_bytes() == 4 * GIB
    group(".", 4 * GIB, "no number")
    assert memory_limits.memory_bytes() == 64 * GIB


@pytest.mark.parametrize(
    ("free", "kept"), [(0, 2**28), (2**32, 2**29), (2**40, 2**31)], ids=["none is free", "an eighth", "at most"]
)
def test_memory_kept_only_to_save_time_is_bounded(monkeypatch, free, kept):
    monkeypatch.setattr(memory_limits, "free_memory_bytes", lambda: free)
    assert memory_limits.room_to_keep() == kept
