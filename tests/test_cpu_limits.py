"""A control group's CPU time limit also applies to notebooks that no build has pinned to cores."""

import pytest
import torch

from lib import cpu_limits, memory_limits
from lib.measure.timing import disturbance
from lib.models import loading


@pytest.fixture
def limited(tmp_path, monkeypatch):
    """Return a function that limits this process to the CPU time of a number of cores."""
    monkeypatch.setattr(memory_limits, "GROUPS", tmp_path)
    monkeypatch.setattr(memory_limits, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")

    def to(cores: float) -> None:
        (tmp_path / "cpu.max").write_text(f"{round(100_000 * cores)} 100000\n")

    return to


def test_a_limit_counts_if_it_is_below_the_core_count(limited):
    assert cpu_limits.within_quota(8) == 8, "no limit"
    for cores, expected in ((2, 2), (2.9, 2), (0.5, 1), (16, 8)):
        limited(cores)
        assert cpu_limits.within_quota(8) == expected


def test_a_model_runs_on_no_more_threads_than_its_cpu_quota(limited):
    """Sixty-four threads that shared the time of two cores waited for it, and every turn was called disturbed."""
    threads = torch.get_num_threads()
    limited(1)
    try:
        torch.set_num_threads(3)
        loading.load("qwen3-4b-instruct-2507")
        assert torch.get_num_threads() == disturbance.cores_given() == 1
    finally:
        torch.set_num_threads(threads)
