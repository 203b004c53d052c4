"""Which cores a build may use, and how they are assigned: control groups and hyper-threads on simulated machines."""

from types import SimpleNamespace

import pytest

from lib import cpu_limits, memory_limits
from lib.suite.run import cpu_affinity


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that sets a machine's cores, by the first thread of their physical core, and the folder of its
    control groups.
    """
    groups = tmp_path / "cgroup"
    groups.mkdir()
    monkeypatch.setattr(memory_limits, "GROUPS", groups)
    monkeypatch.setattr(memory_limits, "OWN_GROUPS", tmp_path / "own")

    def of(first_threads: dict[int, int]):
        process = SimpleNamespace(cpu_affinity=lambda: list(first_threads))
        monkeypatch.setattr(cpu_affinity.psutil, "Process", lambda: process)
        monkeypatch.setattr(cpu_affinity, "_first_sibling", first_threads.get)
        return groups

    return of


SINGLE = {core: core for core in range(8)}
PAIRS = {core: core % 4 for core in range(8)}  # 0 and 4 share a physical core, as do 1 and 5


def test_without_a_limit_every_core_may_be_used(machine, tmp_path):
    groups = machine(PAIRS)
    assert cpu_affinity.available() == [0, 4, 1, 5, 2, 6, 3, 7]
    (tmp_path / "own").write_text("0::/job\n")
    (groups / "job").mkdir()
    (groups / "job" / "cpu.max").write_text("max 100000\n")
    assert len(cpu_affinity.available()) == 8 and cpu_limits.cpu_quota() is None


@pytest.mark.parametrize(
    ("threads", "limit", "cores"),
    [(SINGLE, "200000", [0, 1]), (PAIRS, "200000", [0, 1]), (PAIRS, "550000", [0, 4, 1, 2, 3]), (SINGLE, "50000", [0])],
    ids=["two cores", "not two threads of one", "some threads", "half a core"],
)
def test_a_containers_cpu_quota_limits_the_cores(threads, limit, cores, machine, tmp_path):
    groups = machine(threads)
    (tmp_path / "own").write_text("0::/outside/of/the/container\n")
    (groups / "cpu.max").write_text(f"{limit} 100000\n")
    assert cpu_affinity.available() == cores


def test_cgroups_v1_and_the_tightest_group_are_respected(machine, tmp_path):
    groups = machine(SINGLE)
    (tmp_path / "own").write_text("5:cpu,cpuacct:/batch/job\n4:memory:/\n0::/\n")
    for path, quota in (("cpu", -1), ("cpu/batch", 600_000), ("cpu/batch/job", 300_000)):
        (groups / path).mkdir()
        (groups / path / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (groups / path / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limits.cpu_quota() == 3 and cpu_affinity.available() == [0, 1, 2]


@pytest.mark.parametrize(
    ("threads", "jobs", "shares"),
    [
        ({0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 4}, 2, [[0, 1], [2, 3]]),
        ({0: 0, 1: 0, 2: 2, 3: 2}, 2, [[0, 1], [2, 3]]),
        ({0: 0, 1: 0, 2: 2, 3: 2}, 4, [[0], [1], [2], [3]]),
        (PAIRS, 2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ({0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 5}, 2, [[0, 1, 4], [2, 3, 5]]),
        ({0: 0, 1: 0, 2: 2}, 2, [[0], [2]]),
        (SINGLE, 3, [[0, 1], [2, 3], [4, 5]]),
    ],
    ids=["one is left", "one each", "too few", "two each", "two kinds", "unequal", "no threads"],
)
def test_physical_cores_are_not_shared_while_there_are_enough(threads, jobs, shares, machine):
    machine(threads)
    assert cpu_affinity.share_out(jobs) == shares


def test_two_threads_of_one_physical_core_are_not_two_jobs(machine, monkeypatch):
    monkeypatch.setattr(memory_limits, "memory_bytes", lambda: 64 * 2**30)
    machine({0: 0, 1: 0})
    assert cpu_affinity.default_jobs("proxy", "cpu") == cpu_affinity.default_jobs("slice", "cpu") == 1
    machine({0: 0, 1: 0, 2: 2, 3: 2})
    assert cpu_affinity.default_jobs("proxy", "cpu") == 2
