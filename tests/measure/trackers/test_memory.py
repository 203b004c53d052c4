"""Memory peaks from child processes: planted memory is found, and none where none is planted."""

import json
import os
import sys
from dataclasses import asdict, replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.roofline import cost_model
from lib.measure.timing import child, children
from lib.measure.trackers import memory, memory_child
from lib.measure.trackers.memory import Arm, Peak, Peaks
from lib.models.checkpoints import io

MODEL = "qwen3-4b-instruct-2507"
MB = 2**20
PROCESS = ("peak_memory_bytes", "peak_memory_above_start_bytes", "peak_memory_after_load_bytes")

TRANSFORMS = """
import time

import torch

from lib.measure.timing import workloads

def slow(model):
    time.sleep(1.0)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    return model

def holding(model, megabytes):
    def hold(module, inputs):
        if not hasattr(module, "held"):
            module.held = torch.ones(megabytes, 2**20, dtype=torch.uint8)

    model.register_forward_pre_hook(hold)
    return model

def work(model, rows):
    return workloads.prefill(model, workloads.random_prompt(model, rows, 8))
"""


@pytest.fixture
def arm(tiny, tmp_path, monkeypatch) -> Arm:
    """A saved model as an arm; its children can import `memory_transforms`."""
    (tmp_path / "memory_transforms.py").write_text(TRANSFORMS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Arm(folder=str(io.save(tiny(MODEL), tmp_path / "model")), prompt_tokens=16, new_tokens=2)


def by_metric(baseline: Peaks, optimized: Peaks) -> dict[str, measurement.Measurement]:
    return {m.metric: m for m in memory.measurements(baseline, optimized)}


def test_peaks_come_from_several_fresh_processes_in_turn(arm):
    peaks, failed = memory.peaks(arm, replace(arm, folder=arm.folder + "/nothing"), turns=3)
    assert peaks.reason is None and len(peaks.readings) == len(failed.readings) == 3
    for peak in peaks.readings:
        assert 0 < peak.before_load_bytes <= peak.after_load_bytes <= peak.peak_bytes
    assert failed.readings[0].peak_bytes is None and "expected a checkpoint folder" in failed.reason
    measured = by_metric(peaks, peaks)
    assert "VmHWM" in measured["peak_memory_bytes"].source and "3 fresh" in measured["peak_memory_bytes"].source
    assert measured["load_seconds"].verdict == "informative" and measured["load_seconds"].n == 2
    assert measurement.lint(measured.values()) == []
    missing = memory.measurements(peaks, failed)
    assert all(m.verdict == "unavailable" and "child process" in m.reason for m in missing)


def test_two_children_do_not_borrow_variance_from_times():
    """Two are too few for an interval, and the spread of times between processes says nothing about memory."""
    two = Peaks([Peak(0, 900, 1000, "peak of the CUDA allocator", 1.0, 1.0, weights_bytes=2**29)] * 2)
    for name in PROCESS:
        peak = by_metric(two, two)[name]
        assert peak.verdict == "informative" and "2 pairs are too few" in peak.reason
        assert peak.noise_floor == 0 and not peak.process_sigma and "between processes" not in peak.source


def test_gpu_peaks_are_read_as_often_as_an_interval_requires(monkeypatch):
    """Previously there were two readings, which give no interval, so no peak on a GPU was ever judged."""
    peak_bytes = {"large": 1000, "small": 900}

    def run(_program, jobs) -> list[dict]:
        sizes = [peak_bytes[job["arms"][0]["folder"]] for job in jobs]
        scope = "peak of the CUDA allocator"
        return [asdict(Peak(0, 800, size, scope, 1.0, 1.0, weights_bytes=2**29)) for size in sizes]

    monkeypatch.setattr(children, "run", run)
    measured = by_metric(*memory.peaks(*(Arm(folder=name, device="cuda") for name in peak_bytes)))
    peak = measured["peak_memory_bytes"]
    assert (peak.verdict, peak.n, peak.processes) == ("better", 3, 3)
    assert peak.ci == pytest.approx((0.9, 0.9)) and peak.noise_floor == pytest.approx(0.0, abs=1e-9)
    assert measured["peak_memory_after_load_bytes"].verdict == "equivalent"


def test_one_time_library_allocations_are_charged_to_no_arm(tiny, monkeypatch):
    """A workspace stays allocated after the first call, whichever arm makes it."""
    model = tiny("qwen3-4b-instruct-2507")
    own = cost_model.weights_bytes(model)
    allocator = {"held": own + 1000, "peak": 0}

    def work():
        if allocator["held"] == own + 1000:
            allocator["held"] += 50  # the workspace
        allocator["peak"] = max(allocator["peak"], allocator["held"] + 7)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocator["held"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocator.update(peak=allocator["held"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocator["peak"])
    peaks = [memory.allocated(work, model, "no room").readings[0].peak_bytes for _ in range(2)]
    assert peaks == [own + 7] * 2


def test_memory_held_by_a_hook_is_found_to_the_byte_and_within_a_megabyte(arm):
    planted = [0, 5, 20, 40]
    hooks = [replace(arm, transform="memory_transforms:holding", arguments={"megabytes": held}) for held in planted]
    baseline, *others = memory.peaks(arm, *hooks, turns=3)
    for held, other in zip(planted, others, strict=True):
        measurements = by_metric(baseline, other)
        live, process = measurements["peak_tensor_bytes"], measurements["peak_memory_above_start_bytes"]
        assert live.optimized - live.baseline == held * MB
        assert live.verdict == ("worse" if held else "equivalent")
        assert abs(process.optimized - process.baseline - held * MB) < MB
        # The weights are small: one of the two kinds of peak is judged.
        assert {measurements[name].verdict for name in PROCESS} == {"informative"}
        whole = measurements["peak_memory_bytes"]
        assert "peak_tensor_bytes is judged" in whole.reason and whole.ci and whole.noise_floor is not None


def test_live_tensors_match_to_the_byte_in_every_child(arm, tiny, tmp_path):
    others = [replace(arm, folder=str(io.save(tiny(name), tmp_path / name))) for name in ("qwen3-coder-30b",)]
    first, second = (memory.peaks(arm, *others, turns=1) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert before.tensor_bytes == after.tensor_bytes > before.readings[0].weights_bytes


def readings(values: list[float], weights_bytes: int = 2**30) -> Peaks:
    return Peaks([Peak(100, int(value), int(value), "VmHWM", 1.0, 2.0, None, weights_bytes) for value in values])


def test_large_weights_are_judged_by_process_memory_with_interval_and_floor():
    base, less = readings([1e9, 1.001e9, 1.002e9]), readings([0.8e9, 0.801e9, 0.8005e9])
    judged = by_metric(base, less)["peak_memory_bytes"]
    assert judged.verdict == "better" and judged.n == 3 and judged.ci[1] < 0.82 and judged.noise_floor > 0
    again = by_metric(base, readings([1.002e9, 1.0e9, 1.001e9]))["peak_memory_bytes"]
    assert again.verdict == "equivalent"
    scattered = readings([1e9, 1.4e9, 0.8e9])
    assert by_metric(scattered, readings([1.2e9, 0.7e9, 0.9e9]))["peak_memory_bytes"].verdict == "inconclusive"


def test_a_peak_interval_is_at_least_as_wide_as_a_heap_step():
    """Four processes of an arm often read the same peak to the byte, and the next four a peak of another step."""
    step = memory.HEAP_STEP_BYTES / 1e9
    for peak in ("peak_memory_bytes", "peak_memory_after_load_bytes"):
        low, high = by_metric(readings([1e9] * 4), readings([1e9] * 4))[peak].ci
        assert low < 1 - 0.9 * step and high > 1 + 0.9 * step
    wide = by_metric(readings([1e9, 1.1e9, 1.2e9]), readings([1.2e9, 1e9, 1.1e9]))["peak_memory_bytes"]
    assert wide.ci[1] - wide.ci[0] > 100 * step  # real scatter is not widened further


def test_a_single_peak_reading_is_informative():
    once = by_metric(readings([1e9]), readings([0.5e9]))["peak_memory_bytes"]
    assert once.verdict == "informative" and once.reason == "read once: no interval" and once.ratio == 0.5


def test_weights_outside_tensors_are_judged_by_process_memory():
    base, streamed = (readings(values, 2**20) for values in ([1e9, 1.001e9, 1.0e9], [0.5e9, 0.501e9, 0.5e9]))
    measured = by_metric(base, streamed)
    assert "peak_tensor_bytes" not in measured and measured["peak_memory_bytes"].verdict == "better"


def test_a_child_times_loading_and_the_first_call(arm):
    """Loading is planted to take 1 s longer, and each of the two forward passes of a call 0.3 s."""
    plain, slow = memory.peaks(arm, replace(arm, transform="memory_transforms:slow"), turns=1)
    assert plain.reason is None and slow.reason is None
    assert slow.readings[0].load_seconds >= 1.0, "what the transform does counts for loading"
    assert slow.readings[0].first_call_ms >= 600, "a call holds both of its passes"


def test_a_child_runs_the_given_workload(arm):
    work = {"workload": "memory_transforms:work"}
    few, many = memory.peaks(*(replace(arm, **work, workload_arguments={"rows": rows}) for rows in (1, 64)), turns=1)
    assert few.reason is None and many.tensor_bytes > few.tensor_bytes


def test_imports_of_a_transform_happen_before_any_arm_is_forked(tmp_path, monkeypatch, capsys):
    (tmp_path / "heavy_transform.py").write_text("def apply(model):\n    return model\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    arms = [Arm(load={"name": MODEL}), Arm(transform="heavy_transform:apply")]
    request = {"program": "lib.measure.trackers.memory_child", "environment": dict(os.environ)}
    request |= {"jobs": [{"arms": [asdict(arm)]} for arm in arms], "fork": True, "limit_seconds": 1}
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps(request)))
    monkeypatch.setattr(child, "_forked", lambda run, job, limit: {"known": "heavy_transform" in sys.modules})
    monkeypatch.setattr(child.gc, "freeze", lambda: None)  # of this process, which continues
    child.serve()
    assert capsys.readouterr().out.splitlines() == ['{"known": true}'] * 2


def test_the_peak_is_reset_once_libraries_are_loaded(monkeypatch, tmp_path):
    spent = bytearray(64 * MB)
    spent[::4096] = b"x" * len(spent[::4096])
    held = memory_child.peak_bytes()[0]
    del spent
    if memory_child.reset_peak():
        assert memory_child.peak_bytes()[0] <= held - 32 * MB
    assert 0 <= memory_child.code_bytes() < memory_child.peak_bytes()[0]
    monkeypatch.setattr(memory_child, "MEMORY", tmp_path / "nothing")
    assert not memory_child.reset_peak() and memory_child.code_bytes() == 0


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("freebsd14", 1024), ("darwin", 1)])
def test_without_a_kernel_peak_getrusage_is_used(monkeypatch, tmp_path, platform, unit):
    """A sandbox's `/proc` has files of that name but no peak line; only macOS counts in bytes."""
    resource = pytest.importorskip("resource")
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t1000 kB\n")
    monkeypatch.setattr(memory_child, "MEMORY", tmp_path)
    monkeypatch.setattr(memory_child.sys, "platform", platform)
    most = [123_456]
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=most[0]))
    assert memory_child.peak_bytes() == (123_456 * unit, "ru_maxrss of the whole process")
    assert not memory_child.reset_peak(), "what can be read does not begin anew"
    most[0] = 0
    assert memory_child.peak_bytes()[0] is None, "unknown is never 0"


def test_a_child_returns_large_blocks_to_the_system_at_once(tmp_path, monkeypatch):
    """A block of 8 MB lies in malloc's heap where larger ones were freed before, but in its own mapping if the
    allocator is configured.
    """
    text = """
import ctypes
from lib.measure.trackers import memory_child

def run(job):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    for _ in range(3):
        libc.free(libc.malloc(2**24))
    if job["settled"]:
        memory_child.settle_allocator()
    memory_child.reset_peak()
    address = libc.malloc(2**23)
    start, end = next(line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line)
    return {"in_heap": int(start, 16) <= address < int(end, 16)}
"""
    (tmp_path / "allocating_program.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plain, settled = children.run("allocating_program", [{"arms": [], "settled": False}, {"arms": [], "settled": True}])
    assert (plain, settled) == ({"in_heap": True}, {"in_heap": False})


def test_a_system_without_peak_reset_reports_it(arm, monkeypatch):
    monkeypatch.setattr(memory_child, "reset_peak", lambda: False)
    peak = memory_child.read(replace(arm, workload="prefill"))
    assert "cannot be reset" in peak.scope and peak.above_start_bytes >= 0


def test_removed_weights_make_no_peak():
    memory_child._require_all(3_740_000_000, 4_060_000_000, 310_000_000)
    memory_child._require_all(13_000_000, 310_000_000, 310_000_000)  # held in memory that was returned before
    with pytest.raises(UserError, match="memory is short: of 3"):
        memory_child._require_all(3_740_000_000, 2_420_000_000, 310_000_000)


def test_a_checkpoint_is_in_memory_once_after_loading(tiny, tmp_path):
    # 64 MB in one matrix.
    model = tiny(MODEL)
    model.resize_token_embeddings(2**19)
    folder = io.save(model, tmp_path / "large")
    (peaks,) = memory.peaks(Arm(folder=str(folder), prompt_tokens=4, new_tokens=1, dtype="float32"), turns=1)
    weights = sum(parameter.numel() * 4 for parameter in {id(p): p for p in model.parameters()}.values())
    (peak,) = peaks.readings
    assert 0.9 * weights <= peak.after_load_bytes - peak.before_load_bytes <= 1.4 * weights
