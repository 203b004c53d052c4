"""Tests the simulated server against the real one on the same trace: cache sizes match in every call and, on a clock
with known costs, so do the times of every request.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from lib.measure.serving import engine as engines
from lib.measure.serving import policy_comparison, replay, step_timing, traffic
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.protocol import Decision, Limits
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.simulator import SimulatedEngine, simulate
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, ServingRequest, Trace
from lib.models.decoding import batch_cache

TEXT_T = torch.randint(8, 96, (400,), generator=torch.Generator().manual_seed(3))


class Upto:
    """Admits at most `most` rows; reads prompts in chunks of `chunk` tokens if `chunk` is set."""

    name = "by hand"

    def __init__(self, most, chunk=None):
        self.most, self.chunk = most, chunk

    def decide(self, view):
        return Decision(max(0, min(view.room, self.most - view.rows)), chunk=self.chunk)

    def observe(self, step, finished):
        pass


POLICIES = {"one": lambda: Upto(1), "five": lambda: Upto(5), "in parts": lambda: Upto(5, 6)}


def trace(seed=0, spacing=0.01):
    draw = random.Random(seed)
    requests = [ServingRequest(i, spacing * i, draw.randint(3, 40), draw.randint(1, 9)) for i in range(16)]
    return Trace("by hand", seed, (traffic.Phase(1.0, 1.0, Lengths(20, 5)),), tuple(requests))


def prompt_of(request):
    return TEXT_T[request.id : request.id + request.prompt_tokens]


KEPT = 8  # length of the prefix that longer prompts share


def alike(request):
    """Return a prompt as `prompt_of` does, but longer ones share their first KEPT tokens."""
    prompt_T = prompt_of(request)
    return torch.cat([TEXT_T[-KEPT:], prompt_T[KEPT:]]) if request.prompt_tokens > KEPT else prompt_T


class Both:
    """Runs the real engine and the simulated one on the same calls: real work, simulated seconds, bytes compared."""

    def __init__(self, real, simulated):
        self.real, self.simulated, self.compared = real, simulated, 0

    @property
    def bytes(self):
        assert self.real.bytes == self.simulated.bytes
        self.compared += 1
        return self.simulated.bytes

    def clear(self):
        self.real.clear()
        self.simulated.clear()

    def _both(self, name, *arguments):
        getattr(self.real, name)(*arguments)
        return getattr(self.simulated, name)(*arguments)

    def prefill(self, requests):
        return self._both("prefill", requests)

    def decode(self):
        return self._both("decode")

    def shared(self, parts):
        return self._both("shared", parts)

    def leave(self, ids):
        return self._both("leave", ids)


MACHINE = {"slowness": 1.0}  # read by `planted_clock`, set by a test


@pytest.fixture
def planted_clock(tiny, monkeypatch):
    """Model and step times of a machine where a pass takes 1 ms plus 0.2 ms per token, whatever the tokens."""
    now = [0.0]
    monkeypatch.setitem(MACHINE, "slowness", 1.0)

    def clock():
        now[0] += 1e-9
        return now[0]

    def pass_time(_model, _args, inputs):
        now[0] += MACHINE["slowness"] * (1e-3 + 2e-4 * inputs["input_ids"].numel())

    model = tiny("qwen3-4b-instruct-2507")
    handle = model.register_forward_pre_hook(pass_time, with_kwargs=True)
    for module in (step_timing, engines):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    yield model, step_timing.measure(model, TEXT_T, (16, 32, 48), repeats=2, most=8)
    handle.remove()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("batching", "kept"), [("iteration", 0), ("request", 0), ("iteration", KEPT)])
def test_the_simulated_cache_equals_the_real_one_in_every_call(tiny, name, policy, batching, kept):
    model = tiny(name)
    beginning = batch_cache.prefill(model, [TEXT_T[-KEPT:]]) if kept else None
    real = ModelEngine(model, alike, kept=beginning)
    times = step_timing.measure(model, TEXT_T, (16, 48), repeats=1, most=4, rows_measured=(1, 4))
    both = Both(real, SimulatedEngine(times, jitter=False, kept=kept))
    options = {"batching": batching, "kept": kept, "drain_seconds": float("inf")}
    served = serve(trace(), POLICIES[policy](), both, VirtualClock(), Limits(8), **options)
    assert both.compared > 20 and all(outcome.finished is not None for outcome in served.outcomes)
    assert all(len(real.output[request.id]) == request.new_tokens for request in served.trace.requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("spacing", "kept"), [(0.002, 0), (0.03, 0), (0.002, KEPT)])
def test_real_and_simulated_server_give_every_request_the_same_times(planted_clock, policy, spacing, kept):
    model, times = planted_clock
    beginning = batch_cache.prefill(model, [TEXT_T[-KEPT:]]) if kept else None
    requests = trace(spacing=spacing)
    make = POLICIES[policy]
    options = {"kept": kept, "drain_seconds": 100.0}
    real = serve(requests, make(), ModelEngine(model, alike, kept=beginning), VirtualClock(), Limits(8), **options)
    simulated = simulate(requests, make(), times, Limits(8), **options)
    assert [step.kind for step in real.steps] == [step.kind for step in simulated.steps]
    for measured, predicted in zip(real.outcomes, simulated.outcomes):
        assert predicted.first == pytest.approx(measured.first, rel=0.01, abs=2e-4)
        assert predicted.finished == pytest.approx(measured.finished, rel=0.01, abs=2e-4)
    assert simulated.gaps == pytest.approx(real.gaps, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_kept_prefix_changes_no_token(tiny, name, policy):
    """Includes prompts of several lengths read together after the prefix, and prompts shorter than it."""
    model, outputs = tiny(name), []
    beginning = batch_cache.prefill(model, [TEXT_T[-KEPT:]])
    before = [part.clone() for layer in beginning.cache.layers for part in (layer.keys, layer.values)]
    for kept in (None, beginning):
        engine, read = ModelEngine(model, alike, kept=kept), 0 if kept is None else KEPT
        options = {"kept": read, "drain_seconds": float("inf")}
        served = serve(trace(1, 0.001), POLICIES[policy](), engine, VirtualClock(), Limits(8), **options)
        outputs.append(engine.output)
        assert all(len(engine.output[request.id]) == request.new_tokens for request in served.trace.requests)
    assert outputs[0] == outputs[1]
    after = [part for layer in beginning.cache.layers for part in (layer.keys, layer.values)]
    assert all(map(torch.equal, before, after)), "what is kept is copied and never changed"


def test_chunked_prompts_give_the_same_tokens_as_whole_prompts(tiny, name):
    model, outputs = tiny(name), []
    for policy in POLICIES.values():
        engine = ModelEngine(model, prompt_of)
        serve(trace(1), policy(), engine, VirtualClock(), Limits(8), drain_seconds=float("inf"))
        outputs.append(engine.output)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("batch, new", [(1, 4), (4, 16), (8, 8), (8, 48)])
def test_a_full_batch_serves_the_computed_capacity(batch, new):
    """Previously every token counted as a step, but the first comes from the prefill: servers did up to 1/8 more."""
    decode = tuple((0.004 + 0.0005 * rows,) for rows in range(1, 33))
    times = StepTimes(decode, (0.0, 1.5e-4, 0.0), (1e-4, 0.0), (1.0,), (1.0,), 1.0, 1)
    per, rate = times.sustained(batch, Lengths(40, new))
    draw, count = random.Random(1), 100 * batch
    lengths = [draw.randint(new // 2, new + new // 2) for _ in range(count)]
    requests = tuple(ServingRequest(i, 0.0, 40, length) for i, length in enumerate(lengths))
    waiting = Trace("full", 0, (traffic.Phase(1.0, 1.0, Lengths(40, new)),), requests)
    served = simulate(waiting, Upto(batch), times, Limits(), jitter=False, drain_seconds=1e9)
    ends = sorted(outcome.finished for outcome in served.outcomes)
    few, many = count // 10, count - count // 10
    assert (many - few) / (ends[many] - ends[few]) == pytest.approx(rate, rel=0.03)
    seconds = sum(outcome.finished - outcome.first for outcome in served.outcomes)
    # Rows that join together do not wait for each other: less than one-at-a-time prefills predict.
    assert seconds / sum(length - 1 for length in lengths) == pytest.approx(per, rel=0.08)
    assert times.sustained(batch, Lengths(40, 1))[0] == 0  # nothing comes after the first token


def test_jitter_seeds_of_different_traces_are_distinct():
    """Traces and jitters are both numbered consecutively, so sums of the two numbers would collide."""
    jitters = [*range(10), policy_comparison.NEW_JITTER]
    seeds = [policy_comparison.seed_of(trace(seed), jitter) for seed in [*range(12), *range(1000, 1012)] for jitter in
             jitters]  # fmt: skip
    assert len(set(seeds)) == len(seeds) == 24 * 11
    assert policy_comparison.seed_of(trace(7), 0) == 7


def test_the_load_is_unchanged_when_a_round_starts_on_a_slower_machine(planted_clock):
    """Planted: a machine twice as slow. In its own seconds the trace would load it twice as much."""
    model, times = planted_clock

    def served(**options):
        arms = {"each": POLICIES["five"]}
        rounds = replay.in_turn(model, [trace(spacing=0.03)], arms, Limits(8), prompt_of, **options)
        return rounds, sum(outcome.latency_seconds for outcome in rounds.served("each")[0].outcomes)

    def slowness() -> float:
        return step_timing.slowness(model, TEXT_T, times)

    first, expected = served(slowness=slowness)
    assert first.slowness == (pytest.approx(1.0, rel=1e-3),)
    MACHINE["slowness"] = 2.0
    second, corrected = served(slowness=slowness)
    assert second.slowness == (pytest.approx(2.0, rel=1e-3),) and "divided by" in second.source
    assert corrected == pytest.approx(expected, rel=0.05), "policies' own thinking is of this machine"
    plain, late = served()
    assert plain.slowness == () and late > 1.5 * expected


def test_a_disturbed_round_is_repeated_a_bounded_number_of_times(tiny, monkeypatch):
    watched = iter(["busy", None, None, "busy", "busy", "busy"])
    made = []
    monkeypatch.setattr(replay.disturbance, "watch", lambda: lambda: next(watched))

    def policy():
        made.append(Upto(5))
        return made[-1]

    traces = [trace(seed, spacing=0.001) for seed in range(4)]
    rounds = replay.in_turn(tiny("qwen3-4b-instruct-2507"), traces, {"each": policy}, Limits(8), prompt_of)
    assert rounds.repeated == 2, "half as many as there are rounds"
    assert [run.disturbed for run in rounds.runs["each"]] == [None, None, "busy", "busy"]
    assert len(rounds.busy) == 2 and len(made) == 6 and "2 disturbed rounds served again" in rounds.source
    watched = iter(["busy", None, None, None])
    none = {"repeated_share": 0.0}
    once = replay.in_turn(tiny("qwen3-4b-instruct-2507"), traces, {"each": policy}, Limits(8), prompt_of, **none)
    assert once.repeated == 0 and len(once.busy) == 1 and len(made) == 10
