"""Disturbances are read from the machine's counters and named; nothing else counts as one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.measure.timing import disturbance
from lib.measure.timing.disturbance import Reading

QUIET = Reading(wall=0.0, own=0.0, busy=0.0, stolen=0.0, waited=0.0, throttled=0)
# One second later, on two cores, both used by us.
AFTER = Reading(wall=1.0, own=2.0, busy=2.0, stolen=0.0, waited=0.01, throttled=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"stolen": 0.2}, "stolen"),
        ({"waited": 0.5}, "waited for a core"),
        ({"own": 1.0}, "other processes"),
        ({"throttled": 1}, "throttled"),
    ],
)
def test_each_disturbance_is_named(change, reason):
    disturbed = disturbance.judge(QUIET, replace(AFTER, **change), 2)
    assert disturbed is None if reason is None else reason in disturbed


def test_waiting_is_a_share_of_the_time_given_to_the_container():
    """Half a second of waiting is much relative to two cores' time, however many cores the machine has."""
    waiting = replace(AFTER, waited=0.5)
    assert disturbance.judge(QUIET, waiting, 64) is None
    assert "waited for a core" in disturbance.judge(QUIET, waiting, 64, 2)


def test_one_kernel_tick_in_a_short_block_is_not_a_disturbance():
    assert disturbance.judge(QUIET, replace(AFTER, wall=0.01, own=0.02, busy=0.03, stolen=0.01, waited=0), 2) is None


@pytest.mark.parametrize("edges", [(True, False), (False, True), (True, True)])
def test_a_constantly_slow_gpu_is_as_disturbed_as_one_that_slowed_down(edges):
    """A block repeated while the GPU is still slow must not pass as quiet."""
    before, after = (replace(reading, slowed=slow) for reading, slow in zip((QUIET, AFTER), edges))
    assert disturbance.judge(before, after, 2) == "throttled"


def test_nvml_reads_the_gpu_that_torch_uses(monkeypatch):
    """With CUDA_VISIBLE_DEVICES, torch's first device may be any of those that NVML counts."""
    pynvml, torch = pytest.importorskip("pynvml"), pytest.importorskip("torch")
    used = [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used[0])
    assert disturbance.gpu_handle() is None, "a run on a CPU has nothing to do with the GPU beside it"
    used[0] = True
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="5eed"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: f"number {index}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-5eed": "its own"}.__getitem__)
    assert disturbance.gpu_handle() == "its own"

    def unknown(uuid):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", unknown)
    assert disturbance.gpu_handle() == "number 0"


@pytest.mark.parametrize(("others", "said"), [(0.1, None), (3.0, "1.5 times as long as this one")])
def test_other_processes_are_seen_on_any_core(others, said):
    """A socket-wide counter includes a neighbor that disturbs none of our cores."""
    readings = iter([QUIET, replace(AFTER, busy=AFTER.own + others)])
    told = disturbance.beside(lambda: next(readings))()
    assert told is None if said is None else told.endswith(said)
    assert disturbance.beside(lambda: None)() is None


def test_all_cores_are_read_where_all_count(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text("cpu  9 9 9 9 9 9 9 9\ncpu0 10 0 0 0 0 0 0 0\ncpu1 30 0 0 0 0 0 0 0\nctxt 5\n")
    monkeypatch.setattr(disturbance, "STAT", tmp_path / "stat")
    monkeypatch.setattr(disturbance, "cores", lambda: [0])
    read = [disturbance.reading(everywhere=every).busy / disturbance.TICK_SECONDS for every in (False, True)]
    assert read == pytest.approx([10, 40])


def test_a_system_without_counters_marks_nothing():
    assert disturbance.watch(lambda: None)() is None
    readings = iter([QUIET, replace(AFTER, throttled=3)])
    assert disturbance.watch(lambda: next(readings))() == "throttled"


@pytest.mark.parametrize(("columns", "busy", "stolen"), [("10 5 20 900 7 1 2 4 0 0", 38, 4), ("10 5 20 900", 35, 0)])
def test_missing_columns_are_tolerated(monkeypatch, tmp_path, columns, busy, stolen):
    """FreeBSD's `/proc` for Linux programs has four columns."""
    (tmp_path / "stat").write_text(f"cpu  {columns}\ncpu0 {columns}\ncpu1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(disturbance, "STAT", tmp_path / "stat")
    monkeypatch.setattr(disturbance, "cores", lambda: [0])
    read = disturbance.reading()
    ticks = [read.busy / disturbance.TICK_SECONDS, read.stolen / disturbance.TICK_SECONDS]
    assert ticks == pytest.approx([busy, stolen])
    monkeypatch.setattr(disturbance, "STAT", tmp_path / "nothing")
    assert disturbance.reading() is None
