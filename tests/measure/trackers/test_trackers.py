"""What is read from the machine: disturbance, processor, energy, peaks in child processes, the environment card."""

import json
import sys
from dataclasses import asdict, replace
from io import StringIO

import pytest

from lib.errors import UserError
from lib.measure.timing import disturbance
from lib.measure.timing.disturbance import Reading
from lib.measure.trackers import cpu, energy, environment, memory, memory_child
from lib.models.checkpoints import io

QUIET = Reading(wall=0.0, own=0.0, busy=0.0, stolen=0.0, waited=0.0, throttled=0)
# One second later on two cores of which we used both.
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


def test_one_tick_of_the_kernel_in_a_short_block_is_no_disturbance():
    assert disturbance.judge(QUIET, replace(AFTER, wall=0.01, own=0.02, busy=0.03, stolen=0.01, waited=0), 2) is None


def test_a_system_without_counters_marks_nothing():
    assert disturbance.watch(lambda: None)() is None
    readings = iter([QUIET, replace(AFTER, throttled=3)])
    assert disturbance.watch(lambda: next(readings))() == "throttled"


class Arm:
    """An arm that takes `joules` of a counter and keeps the processor busy a moment."""

    tokens = 10

    def __init__(self, meter: list[float], joules: float):
        self.meter, self.joules = meter, joules

    def __call__(self):
        self.meter[0] += self.joules
        return sum(range(2000))


def counter(meter: list[float], idle: float | None = 0.0) -> energy.Counter:
    return energy.Counter("nvml", "measured", "a counter", 0.001, idle, lambda: meter[0])


def test_energy_per_token_of_both_arms_with_interval_and_label():
    meter = [0.0]
    gross, above, inverse = energy.per_token(
        Arm(meter, 2.0), Arm(meter, 1.0), workload="decode", blocks=6, source=counter(meter)
    )
    assert (gross.baseline, gross.optimized, gross.ratio) == (0.2, 0.1, pytest.approx(0.5))
    assert gross.verdict == "better" and gross.provenance == "measured" and gross.n == 6 and gross.ci
    assert above.baseline == gross.baseline and inverse.optimized == pytest.approx(10)


def test_unknown_energy_is_unavailable_never_zero():
    meter = [0.0]
    dead = energy.per_token(Arm(meter, 0), Arm(meter, 0), workload="decode", blocks=6, source=counter(meter))
    assert [measured.verdict for measured in dead] == ["unavailable"] * 3
    blind = energy.per_token(Arm(meter, 2), Arm(meter, 1), workload="decode", blocks=6, source=counter(meter, None))
    assert blind[1].verdict == "unavailable" and "idle" in blind[1].reason


def test_the_estimate_says_that_it_is_one_and_from_which_table(monkeypatch):
    monkeypatch.setattr(energy, "_zeus_counter", lambda device: "no energy counter: none here")
    source = energy.counter()
    meter = [0.0]
    metrics = energy.per_token(Arm(meter, 0), Arm(meter, 0), workload="decode", blocks=6, seconds=0.005, source=source)
    assert {measured.provenance for measured in metrics} == {"estimated"}
    assert "W per busy core" in metrics[0].source and metrics[0].baseline > 0
    assert metrics[1].baseline < metrics[0].baseline


def test_processor_use_is_a_share_of_the_cores_given():
    used = cpu.use(lambda: sum(range(100_000)), seconds=0.05)
    assert used.cores == len(disturbance.cores()) and used.wall_seconds >= 0.05
    assert 0 < used.utilisation <= 1.2 and str(used.cores) in used.source


def test_the_card_is_plain_json_and_complete(tiny, monkeypatch):
    monkeypatch.setenv("WORKBENCH_JOBS", "2")
    card = environment.card(tiny("qwen3-coder-30b"), weights_hash="w", data_hash="d")
    assert json.loads(json.dumps(card)) == card
    for name in ("cpu", "cores_given", "memory_bytes", "operating_system", "python", "threads", "commit"):
        assert card[name], name
    assert 0 < card["memory_given_bytes"] <= card["memory_bytes"]
    assert (card["weights_hash"], card["data_hash"], card["jobs_beside"]) == ("w", "d", 1)
    assert card["dtype"] == "float32" and card["packages"]["torch"] and card["experts_backend"]


def test_peaks_come_from_fresh_processes(tiny, tmp_path):
    io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "model")
    arm = memory.Arm(folder=str(tmp_path / "model"), prompt_tokens=16, new_tokens=2)
    peak, failed = memory.peaks(arm, replace(arm, folder=str(tmp_path / "nothing")))
    assert peak.reason is None and 0 < peak.before_load_bytes <= peak.after_load_bytes <= peak.peak_bytes
    assert failed.peak_bytes is None and "expected a checkpoint folder" in failed.reason
    measured = {m.metric: m for m in memory.measurements(peak, peak)}
    assert measured["peak_memory_bytes"].verdict == "equivalent" and "VmHWM" in measured["peak_memory_bytes"].source
    assert measured["load_seconds"].verdict == "informative"
    missing = memory.measurements(peak, failed)
    assert all(m.verdict == "unavailable" and "child process" in m.reason for m in missing)


SLOW = """
import time

def apply(model):
    time.sleep(1.0)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    return model
"""


def test_a_child_times_loading_and_each_call(tiny, tmp_path, monkeypatch):
    """Loading is planted to take 1 s longer, and each of the two forward passes of a call 0.3 s."""
    (tmp_path / "slow_transform.py").write_text(SLOW, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arm = memory.Arm(
        folder=str(io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "model")), prompt_tokens=16, new_tokens=2
    )
    plain, slow = memory.peaks(arm, replace(arm, transform="slow_transform:apply"))
    assert plain.reason is None and slow.reason is None
    assert slow.load_seconds >= 1.0, "what the transform does counts for loading"
    assert min(slow.first_call_ms, slow.second_call_ms) >= 600, "both calls hold both of their passes"


def test_what_a_transform_imports_is_there_before_any_arm_is_forked(tmp_path, monkeypatch, capsys):
    (tmp_path / "heavy_transform.py").write_text("def apply(model):\n    return model\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    arms = [memory.Arm(load={"name": "qwen3-4b-instruct-2507"}), memory.Arm(transform="heavy_transform:apply")]
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps([asdict(arm) for arm in arms])))
    monkeypatch.setattr(memory_child, "forked", lambda arm: {"known": "heavy_transform" in sys.modules})
    memory_child.main()
    assert capsys.readouterr().out.splitlines() == ['{"known": true}'] * 2


def test_weights_that_were_taken_away_make_no_peak():
    memory_child._require_all(3_740_000_000, 4_060_000_000, 310_000_000)
    memory_child._require_all(13_000_000, 310_000_000, 310_000_000)  # held in what was given back before
    with pytest.raises(UserError, match="memory is short: of 3"):
        memory_child._require_all(3_740_000_000, 2_420_000_000, 310_000_000)


def test_a_checkpoint_is_in_memory_after_loading_and_once(tiny, tmp_path):
    # 64 MB in one matrix.
    model = tiny("qwen3-4b-instruct-2507")
    model.resize_token_embeddings(2**19)
    folder = io.save(model, tmp_path / "large")
    arm = memory.Arm(folder=str(folder), prompt_tokens=4, new_tokens=1, dtype="float32")
    (peak,) = memory.peaks(arm)
    weights = sum(parameter.numel() * 4 for parameter in {id(p): p for p in model.parameters()}.values())
    assert 0.9 * weights <= peak.after_load_bytes - peak.before_load_bytes <= 1.4 * weights


def test_why_no_counter_is_read_is_said(tmp_path, monkeypatch):
    broken = PermissionError("energy_uj")
    assert "offers none (no RAPL" in energy.why_no_counter("cpu", broken, tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1")
    monkeypatch.setattr(energy.os, "access", lambda path, how: False)
    told = energy.why_no_counter("cpu", broken, tmp_path)
    assert "this user may not read it; to permit it, as root: chmod a+r" in told
    monkeypatch.setattr(energy.os, "access", lambda path, how: True)
    assert "cannot be used (PermissionError)" in energy.why_no_counter("cpu", broken, tmp_path)
    assert "NVML gives none for cuda:0" in energy.why_no_counter("cuda:0", broken)
    assert energy._estimate("no energy counter: because").scope.endswith("no energy counter: because")
