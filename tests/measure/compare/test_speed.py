"""One call measures the speed and efficiency of two models, and reports no speed-up of a degenerate model."""

import errno
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lib.errors import UserError
from lib.measure.compare import replication, saved, speed
from lib.measure.compare.footprint import footprint
from lib.measure.metrics import measurement, process_variance, settings
from lib.measure.metrics.pairs import Pairs
from lib.measure.roofline import ceilings
from lib.measure.timing import interleaved, workloads
from lib.measure.trackers import energy, energy_source, memory

QUICK = replace(settings.read("quick"), prompt_tokens=16, new_tokens=2, batch=2)


@pytest.fixture(autouse=True)
def small_machine(tmp_path, monkeypatch):
    """Use a small product for the ceilings and a very short energy window, and do not wait for a quiet machine."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(energy_source, "ESTIMATE_WINDOW_SECONDS", 0.001)
    monkeypatch.setattr(speed.disturbance, "watch", lambda: lambda: None)


def test_one_call_fills_performance_and_efficiency(tiny, name):
    base, other = tiny(name), tiny(name, seed=1)
    compared = speed.compare(base, other, workloads.random_prompt(base, 1, 16), QUICK)
    metrics = {measured.metric for measured in compared.measurements}
    assert (
        set(compared.timed) == {"prefill", "decode", "batch_decode"}
        and compared.timed["batch_decode"].baseline.batch == 2
    )
    assert {"prefill_tokens_per_second", "time_to_first_token_ms", "batch_decode_tokens_per_second"} <= metrics
    assert {"model_flops_utilisation", "memory_bandwidth_utilisation", "cpu_utilisation"} <= metrics
    assert {"energy_joules_per_token", "tokens_per_joule"} <= metrics
    assert measurement.lint(compared.measurements) == []
    rates = [measured for measured in compared.measurements if measured.metric in speed.METRICS_OF["prefill"]]
    assert all(rate.n >= 6 and rate.noise_floor and rate.predicted == pytest.approx(1, rel=0.2) for rate in rates)
    steps = compared.details["step_milliseconds"]["value"]["decode"]["baseline"]
    assert steps["p50"] == pytest.approx(1000 * np.median(compared.timed["decode"].baseline.step_seconds))
    assert all(entry["provenance"] and entry["source"] for entry in compared.details.values())
    assert len(compared.bounds()) == 6 and all(row["low"] <= row["time"] <= row["high"] for row in compared.bounds())
    assert measurement.lint(compared.control()) == [] and len(compared.control()) == 5


@pytest.mark.parametrize("handle", [None, "a GPU"])
def test_a_gpu_is_sampled_for_longer_than_a_short_call(tiny, monkeypatch, handle):
    """It is sampled twenty times a second: a call of a few milliseconds ends before the first sample."""
    model = tiny("qwen3-4b-instruct-2507")
    work = workloads.prefill(model, workloads.random_prompt(model, 1, 16))
    pairs = interleaved.paired(work, work, blocks=6)
    monkeypatch.setattr(speed.disturbance, "gpu_handle", lambda: handle)
    monkeypatch.setattr(speed.cpu, "use", lambda arm, seconds: speed.Use(seconds, seconds, 1, 0.75))
    short = speed.Use(0.004, 0.004, 1)
    uses = speed._cpu_use("prefill", speed.Timed(work, work, pairs, pairs, (None, None)), (short, short))
    shown = {use.metric: (use.baseline, use.optimized) for use in uses}
    assert shown.get("gpu_utilisation") == ((0.75, 0.75) if handle else None)
    assert shown["cpu_utilisation"][0] > 0


def test_a_degenerate_model_is_not_timed(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT = workloads.random_prompt(model, 1, 16)
    compared = speed.compare(model, model, prompt_BT, QUICK, invalid="its logits are not finite")
    assert (
        not compared.timed
        and compared.bounds() == []
        and {measured.verdict for measured in compared.measurements} == {"invalid"}
    )
    with pytest.raises(UserError, match="unknown effort"):
        speed.compare(model, model, prompt_BT, "brisk")


def test_the_control_is_a_copy_in_the_same_rounds(tiny, monkeypatch):
    base, calls, names = tiny("qwen3-4b-instruct-2507"), [], {"names": ("prefill",), "with_energy": False}
    other = tiny("qwen3-4b-instruct-2507", seed=1)
    for arm, model in (("base", base), ("other", other)):
        model.register_forward_hook(lambda *_, arm=arm: calls.append(arm))
    monkeypatch.setattr(interleaved, "rounds_for", lambda *_, **__: (6, 1))
    monkeypatch.setattr(speed, "LONG_SECONDS", 0.0)
    compared = speed.compare(base, other, workloads.random_prompt(base, 1, 16), QUICK, **names)
    # One call of each arm, for experts and CPU use, one of each copy, then six rounds of three. The
    # copies have the hooks of their originals.
    assert calls[:5] == ["base", "other"] * 2 + ["base"] and len(calls) == 23 and calls.count("other") == 8
    pairs, control = compared.timed["prefill"].pairs, compared.timed["prefill"].control
    assert pairs.baseline_seconds == control.baseline_seconds and pairs.optimized_seconds != control.optimized_seconds
    for blocks in (pairs, control):
        assert sorted(blocks.order) == ["AB"] * 3 + ["BA"] * 3 and "3 arms a round" in blocks.describe()
    (use,) = (measured for measured in compared.measurements if measured.metric == "cpu_utilisation")
    assert 0 < use.baseline < 1.2 and 0 < use.optimized < 1.2
    assert compared.measurements[0].n == 6 and compared.measurements[0].noise_floor == pytest.approx(
        control.floor(0.0), abs=0.05
    )


def test_cost_options_reach_the_prediction(tiny):
    base, other = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    for parameter in other.parameters():
        parameter[::2] = 0
    options = {"names": ("prefill",), "costs": {"skip_zeros": True}, "with_energy": False}
    rate = speed.compare(base, other, workloads.random_prompt(base, 1, 16), QUICK, **options).measurements[0]
    assert rate.predicted > 1.3


def test_the_copy_decodes_at_the_same_position_as_the_other_arms(tiny, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT = workloads.random_prompt(model, 1, 16)
    longer = replace(QUICK, new_tokens=6)
    arms = {"decode": tuple(workloads.standard("decode", model, prompt_BT, 6, 1) for _ in range(2))}
    arms["decode"][0]()  # as after the calls that are not judged
    seen = []

    def at_the_beginning(*works, **options):
        for work in works:
            work.output_BN = None
            work()
            seen.append(work.output_BN is not None)  # set only by the first turn of an answer
        return None, None

    monkeypatch.setattr(speed, "with_control", at_the_beginning)
    monkeypatch.setattr(speed.replication, "in_processes", lambda *a, **b: ({}, "planted"))
    speed._pairs((model, model), arms, prompt_BT, longer, 0, ())
    assert seen == [True, True, True]


def _watched(tiny, monkeypatch):
    """Return two models that are timed in one process, their arms, the prompt, and the ids of the models that ran."""
    models = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=1)
    ran = set()
    for model in models:
        model.register_forward_hook(lambda module, *_: ran.add(id(module)))
    monkeypatch.setattr(speed.replication, "in_processes", lambda *a, **b: ({}, "planted"))
    prompt_BT = workloads.random_prompt(models[0], 1, 16)
    arms = {"prefill": tuple(workloads.standard("prefill", model, prompt_BT, 2, 1) for model in models)}
    return models, arms, prompt_BT, ran


def test_in_one_process_every_arm_is_a_fresh_copy(tiny, monkeypatch):
    models, arms, prompt_BT, ran = _watched(tiny, monkeypatch)
    originals = {id(model) for model in models}
    for work in arms["prefill"]:
        work()
    assert ran == originals
    ran.clear()
    speed._pairs(models, arms, prompt_BT, QUICK, 0, ())
    assert len(ran) == 3 and not ran & originals


def test_if_one_arm_cannot_be_copied_neither_is(tiny, monkeypatch):
    """Previously a copy of the baseline ran against an optimized model loaded long before: the difference was its
    age.
    """
    models, arms, prompt_BT, ran = _watched(tiny, monkeypatch)
    models[1].lock = threading.Lock()  # which cannot be copied
    _, details = speed._pairs(models, arms, prompt_BT, QUICK, 0, ())
    assert {id(model) for model in models} < ran and len(ran) == 3, "the control is a copy, still"
    assert details["age of the arms"].startswith("no copy of the optimized model")


def test_a_control_that_is_the_baseline_itself_is_not_judged(tiny, monkeypatch):
    """It cannot differ as two copies do, and was previously called equivalent."""
    models = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=1)
    models[0].lock = threading.Lock()  # which cannot be copied
    monkeypatch.setattr(speed.replication, "in_processes", lambda *a, **b: ({}, "planted"))
    options = {"names": ("prefill",), "with_energy": False}
    compared = speed.compare(*models, workloads.random_prompt(models[0], 1, 16), QUICK, **options)
    control = compared.control()
    assert {m.verdict for m in control} == {"informative"} and all(m.noise_floor and m.ci for m in control)
    assert all(process_variance.SAME_OBJECT in m.reason for m in control) and measurement.lint(control) == []


def _counted(models, arms, prompt_BT, monkeypatch):
    """Return the joules that an energy counter reports for both arms."""
    source = energy_source.Counter("rapl", "measured", "RAPL", 0.001, None, lambda: 10.0 * time.perf_counter())
    monkeypatch.setattr(energy, "counter", lambda device="cpu": source)
    timed = speed.Timed(*arms["prefill"], None, None, ())
    return speed._energy("prefill", timed, models, prompt_BT, QUICK, 0)


def test_energy_is_counted_on_copies_of_the_same_age(tiny, monkeypatch):
    """The older of two copies of one model took more because of its age alone, by more than the energy margin."""
    models, arms, prompt_BT, ran = _watched(tiny, monkeypatch)
    for work in arms["prefill"]:
        work()
    ran.clear()
    gross = _counted(models, arms, prompt_BT, monkeypatch)[0]
    assert gross.metric == "energy_joules_per_token" and gross.n == 6
    assert len(ran) == 3 and not ran & {id(model) for model in models}


def test_energy_uses_both_original_models_if_one_cannot_be_copied(tiny, monkeypatch):
    models, arms, prompt_BT, ran = _watched(tiny, monkeypatch)
    for work in arms["prefill"]:
        work()
    models[1].lock = threading.Lock()  # which cannot be copied
    assert _counted(models, arms, prompt_BT, monkeypatch)[0].n == 6
    assert ran == {id(model) for model in models}


def test_if_the_copy_of_one_arm_answers_differently_neither_is_timed(tiny):
    model, other = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=1)
    prompt_BT = workloads.random_prompt(model, 1, 16)
    works = tuple(workloads.standard("prefill", each, prompt_BT, 2, 1) for each in (model, other))
    for work in works:
        work()
    same, changed = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=2)
    assert speed._on_copies("prefill", works, (same, changed), prompt_BT, QUICK) == works
    renewed = speed._on_copies("prefill", works, (same, other), prompt_BT, QUICK)
    assert renewed[0] is not works[0] and renewed[1] is not works[1]


def test_a_copy_that_answers_differently_is_not_timed(tiny):
    model, other = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=1)
    prompt_BT = workloads.random_prompt(model, 1, 16)
    work = workloads.standard("decode", model, prompt_BT, 2, 1)
    work()
    assert speed._on_copy("decode", work, other, prompt_BT, QUICK) is work
    again = speed._on_copy("decode", work, tiny("qwen3-4b-instruct-2507"), prompt_BT, QUICK)
    assert again is not work and again.output_BN.equal(work.output_BN)


def test_the_footprint_is_measured_on_saved_models(tiny, monkeypatch):
    folders = []

    def peaks(*arms, turns):
        folders.extend(arm.folder for arm in arms)
        gb = 10**9
        read = [memory.Peak(gb, 2 * gb, (3 - n) * gb, "VmHWM", 1.0, 2.0, weights_bytes=2**30) for n in range(2)]
        return [memory.Peaks([peak] * turns) for peak in read]

    monkeypatch.setattr(memory, "peaks", peaks)
    base = tiny("qwen3-4b-instruct-2507")
    sizes = {m.metric: m for m in footprint(base, base, QUICK)}
    assert measurement.lint(sizes.values()) == [] and len(set(folders)) == 2
    assert sizes["peak_memory_bytes"].verdict == sizes["peak_memory_above_start_bytes"].verdict == "better"
    assert sizes["checkpoint_bytes"].baseline > 0


def test_without_room_for_another_copy_peaks_are_read_in_place(tiny, monkeypatch):
    base, works = tiny("qwen3-4b-instruct-2507"), []

    def allocated(work, model, reason):
        works.append((work.prompt_tokens, model))
        return memory.Peaks([memory.Peak(0, 80, 100, "peak of the CUDA allocator", None, None, reason)], child=False)

    monkeypatch.setattr(saved, "lack_of_room", lambda *models: "no room on the device for another copy")
    monkeypatch.setattr(memory, "allocated", allocated)
    sizes = {m.metric: m for m in footprint(base, base, QUICK)}
    assert works == [(QUICK.prompt_tokens, base)] * 2 and measurement.lint(sizes.values()) == []
    assert sizes["peak_memory_bytes"].source == "peak of the CUDA allocator"
    for name in ("checkpoint_bytes", "load_seconds", "first_call_ms"):
        assert sizes[name].verdict == "unavailable" and sizes[name].reason.startswith("no room on the device")


def test_a_cpu_always_has_room_for_another_copy(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    assert saved.lack_of_room(model, model) is None


def test_an_effort_is_smaller_for_a_slice():
    for name, whole in settings.EFFORTS.items():
        assert settings.read(name) == settings.read(name, "full") == whole
        cut = settings.read(name, "slice")
        assert cut.new_tokens < whole.new_tokens and cut.blocks == whole.blocks and cut.items == whole.items


def test_small_efforts_use_shorter_blocks_and_the_variable_is_reported(monkeypatch):
    monkeypatch.setattr(replication, "BLOCK_SECONDS", 0.5)
    monkeypatch.delenv(replication.VARIABLE, raising=False)
    seconds = [replication.block_seconds(settings.read(effort)) for effort in settings.EFFORTS]
    assert seconds == [0.05, 0.25, 0.5, 0.5] and replication.shortened() == {}
    monkeypatch.setenv(replication.VARIABLE, "0.02")
    assert replication.block_seconds(settings.read("standard")) == 0.02
    (said,) = replication.shortened().values()
    assert said["value"] == 0.02 and replication.VARIABLE in said["source"] and said["provenance"]
    monkeypatch.setenv(replication.VARIABLE, "short")
    with pytest.raises(UserError, match='WORKBENCH_BLOCK_SECONDS: "short" is not a number'):
        replication.block_seconds(settings.read("quick"))


@pytest.mark.parametrize(("moves", "with_energy", "carries"), [(1, True, False), (0, True, True), (1, False, True)])
def test_cpu_seconds_are_judged_unless_energy_is(tiny, monkeypatch, moves, with_energy, carries):
    """A readable counter judges nothing if it stands still or if energy was not requested."""
    joules = lambda: 10.0 * moves * time.perf_counter()  # noqa: E731
    source = energy_source.Counter("rapl", "measured", "RAPL", 0.001, None, joules)
    monkeypatch.setattr(energy, "counter", lambda device="cpu": source)
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT, options = workloads.random_prompt(model, 1, 16), {"names": ("prefill",), "with_energy": with_energy}
    compared = speed.compare(model, model, prompt_BT, QUICK, **options)
    by_metric = {measured.metric: measured for measured in compared.measurements}
    spent, counted = by_metric["cpu_seconds_per_token"], by_metric.get("energy_joules_per_token")
    assert (spent.margin is not None) == carries and (spent.reason == energy.COUNTED) != carries
    assert (counted is not None and counted.margin is not None) != carries


def test_a_full_temporary_disk_makes_sizes_unavailable_and_keeps_the_run(tiny, monkeypatch):
    """Previously the run failed with "OSError: [Errno 28]" once everything else was measured."""

    def failing(number):
        def save(*_, **__):
            raise OSError(number, os.strerror(number))

        return save

    base = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(saved.io, "save", failing(errno.ENOSPC))
    sizes = {m.metric: m for m in footprint(base, base, QUICK)}
    assert measurement.lint(sizes.values()) == [] and {m.verdict for m in sizes.values()} == {"unavailable"}
    assert all("TMPDIR" in m.reason for m in sizes.values())
    monkeypatch.setattr(saved.io, "save", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        footprint(base, base, QUICK)


def test_one_process_counts_once_in_the_floor_of_the_control():
    """Previously the variance between processes was added twice at effort preview."""
    pairs = Pairs([1.0] * 6, [1.0] * 6, ["AB", "BA"] * 3, [None] * 6, 1, process=[0] * 6)
    work = SimpleNamespace(tokens=16, new_tokens=1)
    control = speed.Compared([], {"prefill": speed.Timed(work, work, pairs, pairs, (None, None))}).control()[0]
    assert control.noise_floor == pytest.approx(1.96 * process_variance.between_processes("prefill").sigma)
