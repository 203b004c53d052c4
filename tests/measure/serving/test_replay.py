"""Measurements from replays of two policies, and when they are judged."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib.measure.metrics import busy as busy_machine
from lib.measure.serving import replay
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.traffic import Lengths, Phase, ServingRequest, make
from lib.measure.trackers.energy_source import Counter

PEAKS = {"fixed": [4, 4, 4, 4, 4, 4], "again": [4, 4, 4, 4, 4, 4], "adaptive": [2, 2, 2, 2, 2, 2]}


@pytest.fixture
def rounds() -> replay.ServingRounds:
    """Six rounds in which the second arm's cache peaks at half and its time is half."""
    traces = tuple(SimpleNamespace(requests=()) for _ in range(6))
    counter = Counter("estimate", "estimated", "test", 0.1, None, lambda: 0.0)
    runs = {
        name: [
            replay.Replayed(SimpleNamespace(peak_bytes=peak), {0: [1]}, 1.0, None, peak / 4, peak / 4) for peak in peaks
        ]
        for name, peaks in PEAKS.items()
    }
    return replay.ServingRounds(traces, runs, counter)


def test_the_cache_peak_follows_from_the_chosen_size_and_is_not_judged(rounds):
    measured = {item.metric: item for item in replay.costs(rounds, "fixed", "again", "adaptive")}
    peak = measured["kv_cache_peak_bytes"]
    assert (peak.baseline, peak.optimized, peak.ratio) == (4, 2, 0.5)
    assert peak.verdict == "informative" and "chosen" in peak.reason
    assert measured["cpu_seconds_per_token"].verdict == "better", "the time of the same replays is judged"


@pytest.mark.parametrize("kind, joules", [("estimate", 12.0), ("rapl", 10.0)])
def test_policy_time_is_part_of_the_replay_cost(kind, joules):
    """Previously a policy was charged only for its engine's steps: seconds, and joules estimated from them."""
    of_times = (lambda seconds, busy: 2.0 * seconds + 5.0 * busy) if kind == "estimate" else None
    counter = Counter(kind, "estimated", "test", 0.1, None, lambda: 0.0, of_times=of_times)
    engine, policy = (SimpleNamespace(wall_seconds=w, cpu_seconds=c, joules=10.0) for w, c in ((4.0, 3.0), (0.5, 0.2)))
    run = replay.replayed(None, {0: [1, 2]}, engine, policy, None, counter)
    assert run.cpu_seconds == pytest.approx(3.2) and run.joules == pytest.approx(joules)
    assert run.utilisation == pytest.approx(3.2 / (4.5 * replay.disturbance.cores_given()))


def test_a_cache_with_room_for_one_row_is_warmed_up_and_bounded_afterwards(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    engine = ModelEngine(model, lambda request: torch.arange(8, 8 + request.prompt_tokens))
    engine.prefill([ServingRequest(0, 0.0, 20, 8)])
    engine.limit_bytes = 1.3 * engine.bytes
    replay.warm_up(engine, make("one", [Phase(10.0, 1.0, Lengths(20, 8))]))
    assert engine.bytes == 0 and engine.output == {}
    engine.prefill([ServingRequest(0, 0.0, 20, 8)])
    with pytest.raises(RuntimeError, match="over its bound"):
        engine.prefill([ServingRequest(1, 0.0, 20, 8)])


def test_two_rounds_give_no_verdict_and_say_so(rounds):
    few = replace(rounds, traces=rounds.traces[:2], runs={name: runs[:2] for name, runs in rounds.runs.items()})
    seconds = next(item for item in replay.costs(few, "fixed", "again", "adaptive") if "cpu" in item.metric)
    assert (seconds.ratio, seconds.verdict) == (0.5, "informative")
    assert seconds.reason == "2 pairs are too few for an interval"


def test_a_counter_slower_than_the_turns_judges_no_energy(rounds):
    """NVML's counter stands still for many steps: its increase falls on whichever arm steps next."""
    nvml, rapl = (Counter(kind, "measured", kind, 2.0, None, lambda: 0.0) for kind in ("nvml", "rapl"))

    def judged(counter, stepwise) -> str:
        costs = replay.costs(replace(rounds, counter=counter, stepwise=stepwise), "fixed", "again", "adaptive")
        return next(item.verdict for item in costs if item.metric == "energy_joules_per_token")

    assert judged(nvml, True) == "informative"
    assert judged(nvml, False) == judged(rapl, True) == "better"


def test_a_real_time_replay_says_so_and_judges_no_energy_shared_with_others(rounds):
    """Live replays wait between requests, and the counter includes the process that shares their cores."""
    stepwise, real = replace(rounds, stepwise=True).source, rounds.source
    assert "waiting left out" in stepwise and "waiting left out" not in real
    assert "in real time, waiting included" in real

    def judged(kind, **fields):
        counter = Counter(kind, "measured", kind, 2.0, None, lambda: 0.0)
        each = replay.costs(replace(rounds, counter=counter, **fields), "fixed", "again", "adaptive")
        return {item.metric: item for item in each}

    alone, shared = judged("rapl"), judged("rapl", planned=True)
    assert alone["energy_joules_per_token"].verdict == "better"
    assert alone["cpu_seconds_per_token"].reason == "energy is judged, by its counter"
    assert shared["energy_joules_per_token"].verdict == "informative"
    assert "other process" in shared["energy_joules_per_token"].reason
    # If energy is not judged, nothing says that it is: our own CPU time is judged instead.
    assert shared["cpu_seconds_per_token"].verdict == "better"
    on_gpu = judged("nvml", planned=True)
    assert on_gpu["energy_joules_per_token"].verdict == "better", "a process on the cores takes nothing of the GPU's"
    blurred = judged("nvml", stepwise=True)["cpu_seconds_per_token"]
    assert blurred.verdict == "informative" and "energy is judged" not in blurred.reason


def test_energy_used_by_others_on_other_cores_is_not_judged(rounds):
    """A neighboring run of the build, on its own cores, disturbs no round, but the socket's counter includes it."""
    rapl = Counter("rapl", "measured", "rapl", 2.0, None, lambda: 0.0)
    others = "other programs kept the processor busy 1.1 times as long as this one"
    shared = replace(rounds, counter=rapl, shared=others)
    measured = {item.metric: item for item in replay.costs(shared, "fixed", "again", "adaptive")}
    joules = measured["energy_joules_per_token"]
    assert joules.verdict == "informative" and joules.ratio == 0.5 and "--jobs 1" in joules.reason
    assert measured["cpu_seconds_per_token"].verdict == "better"


def test_rates_set_on_a_disturbed_machine_give_no_verdict(rounds):
    assert rounds.busy == []
    calibrated = replace(rounds, calibration="other processes took 60% of our cores", planned=True)
    assert len(calibrated.busy) == 6 and all("while step times were measured" in reason for reason in calibrated.busy)


def test_planned_load_is_not_a_disturbance_and_similar_reasons_are_merged(rounds):
    reasons = [f"our threads waited for a core {share} % of the time" for share in (15, 17, 16)]
    reasons += ["2 % of the time was stolen by the hypervisor", None, None]
    runs = {
        name: [replace(run, disturbed=why) for run, why in zip(each, reasons)] for name, each in rounds.runs.items()
    }
    busy = replace(rounds, runs=runs)
    stolen = "2 % of the time was stolen by the hypervisor"
    assert busy.disturbed == f"{stolen}; our threads waited for a core 15 % to 17 % of the time"
    assert "12 of 18 replays disturbed" in busy.source
    planned = replace(busy, planned=True)
    assert planned.disturbed == stolen and rounds.disturbed == "nothing"
    assert "on purpose" in planned.source and "3 of 18 replays disturbed" in planned.source
    # Planned load explains neither theft by the hypervisor nor heat: such a round counts as disturbed.
    assert planned.busy == [stolen] and len(busy.busy) == 4


@pytest.mark.parametrize("why", ["3% of the time was stolen by the hypervisor", "throttled"])
def test_unplanned_disturbances_withhold_the_verdict_despite_planned_ones(rounds, monkeypatch, why):
    goodput = {"fixed": 1.0, "again": 1.0, "adaptive": 2.0}
    served = {
        name: [
            replace(run, served=SimpleNamespace(counted=range(50), value=goodput[name]), disturbed=why) for run in each
        ]
        for name, each in rounds.runs.items()
    }
    monkeypatch.setattr(replay.slo, "goodput", lambda run, _: run.value)

    def judged(runs):
        return replay.goodput(replace(rounds, runs=runs, planned=True), None, "fixed", "again", "adaptive")

    shared = {
        name: [replace(run, disturbed="our threads waited for a core 40% of the time") for run in each]
        for name, each in served.items()
    }
    assert judged(shared).verdict == "better"
    assert judged(served).verdict == "inconclusive" and why in judged(served).reason
    # The control is not judged either: "worse" on a busy machine says nothing about these runs.
    own = replay.control(replace(rounds, runs=served, planned=True), None, "fixed", "again")
    assert own.verdict == "inconclusive" and own.disturbed == 6 and why in own.reason
    # Without a ratio for every round the others are withheld for the same reason.
    monkeypatch.setattr(replay.slo, "goodput", lambda run, _: run.value if run.value > 1 else 0.0)
    none = judged(served)
    seconds = next(item for item in replay.costs(rounds, "fixed", "again", "adaptive") if "cpu" in item.metric)
    assert none.verdict == "informative" and none.ratio is None and seconds.verdict == "better"
    withheld = busy_machine.withhold_if_busy([none, seconds])[1]
    assert withheld.verdict == "inconclusive" and withheld.reason == none.reason and why in none.reason
