"""Policies: the online model finds a planted truth, sizes follow the load, bad values are refused; the real engine."""

import random
from types import SimpleNamespace

import pytest
import torch

from lib.errors import UserError
from lib.measure.serving import policy_comparison, replay, server, slo, traffic
from lib.measure.serving.engine import ModelEngine, prompts
from lib.measure.serving.policy_comparison import CHAT, DOCUMENTS, ServingSetup
from lib.measure.serving.server import Limits, VirtualClock, serve
from lib.measure.serving.slo import Objectives, Single
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, ServingRequest, Trace
from lib.models.decoding import batch_cache
from lib.optimizations.adaptive_batch_sizes import method as batches


def planted(fixed=4e-3, row=0.25e-3, token=1.2e-6, read=(5e-3, 0.12e-3, 2e-8)):
    """Step times of a made-up machine, with jitter of ± 10 %."""
    dense = tuple(tuple(fixed + row * b + token * b * c for c in range(0, 1040, 16)) for b in range(1, 33))
    jitter = (0.9, 0.95, 1.0, 1.05, 1.1)
    return StepTimes(dense, read, (1e-4, 2e-10), jitter, jitter, 6144.0, 0)


def setup_of(times, first=8.0, token=3.0, batching="iteration"):
    single = Single.of(times, DOCUMENTS)
    objective = slo.objectives(single, first, token)
    patience = objective.first_token_seconds - single.prefill_seconds
    return ServingSetup(times, objective, single, Limits(32, None, times.bytes_per_token, patience), batching)


@pytest.fixture(scope="module")
def setup():
    return setup_of(planted())


def test_the_online_model_finds_planted_step_times():
    draw, truth = random.Random(0), (5e-3, 4e-4, 2e-6)
    model = batches.StepModel([0.01, 0.01, 0.0], [(1, 1, 200), (1, 8, 1600)])
    for _ in range(400):
        batch, context = draw.randint(1, 24), draw.randint(30, 500)
        terms = (1, batch, batch * context)
        seconds = sum(w * term for w, term in zip(truth, terms)) * draw.choice((0.95, 1.0, 1.05))
        model.learn(terms, seconds * (20 if draw.random() < 0.01 else 1))  # now and then the machine stands still
    for terms in ((1, 1, 50), (1, 8, 1600), (1, 24, 9600)):
        assert model.predict(terms) == pytest.approx(sum(w * term for w, term in zip(truth, terms)), rel=0.12)


def test_the_online_model_follows_a_machine_that_becomes_slower_and_never_goes_below_zero():
    model = batches.StepModel([0.004, 0.001, 0.0], [(1, 4, 400)])
    for seconds in [0.01] * 200 + [0.03] * 600:
        model.learn((1, 4, 400), seconds)
    # Errors are relative, so the guess of 8 ms holds it back a little: by 0.5·(0.03/0.008)² of some 100 calls.
    assert model.predict((1, 4, 400)) == pytest.approx(0.03, rel=0.06)
    assert min(model.weights) >= 0
    model.learn((1, 4, 400), 0.0)  # a clock that did not move teaches nothing
    assert model.predict((0, 0, 0)) > 0


def test_sizes_follow_the_lengths(setup):
    policy = batches.Adaptive(setup.objective, setup.single)
    setup.run(policy_comparison.trace(setup, "changing", 40, 100), policy)
    per_token = setup.objective.token_seconds
    chat, documents = (policy.largest(per_token, kind.longest, *kind.__dict__.values()) for kind in (CHAT, DOCUMENTS))
    assert documents <= 4 < 8 <= chat
    truth = setup.capacity(CHAT)[1], setup.capacity(DOCUMENTS)[1]
    assert chat == pytest.approx(truth[0], abs=5) and documents == pytest.approx(truth[1], abs=1)


def test_ours_beats_the_best_fixed_size_on_changing_traffic_of_the_planted_machine(setup):
    traces = policy_comparison.traces(setup, "changing", 50, (100, 101, 102))
    sizes = (1, 2, 3, 4, 6, 8, 10, 12, 16)
    best, goodputs = batches.best_fixed(traces, setup.objective, setup.run, sizes)
    ours = policy_comparison.compare(
        setup, traces, {"adaptive": lambda: batches.Adaptive(setup.objective, setup.single)}
    )[0]
    assert set(goodputs) == set(sizes) and goodputs[best] >= goodputs[1]
    assert ours["goodput"] > 1.1 * goodputs[best]


def test_ours_does_not_lose_at_a_constant_rate_of_the_planted_machine(setup):
    for name in ("constant 0.4", "constant 0.9"):
        traces = policy_comparison.traces(setup, name, 80, (100, 101))
        _, goodputs = batches.best_fixed(traces, setup.objective, setup.run, (4, 8, 10, 12, 14))
        ours = policy_comparison.compare(
            setup, traces, {"adaptive": lambda: batches.Adaptive(setup.objective, setup.single)}
        )[0]
        assert ours["goodput"] >= 0.95 * max(goodputs.values()), name


def test_the_oracle_is_no_worse_than_the_fixed_size_it_starts_from(setup):
    trace = policy_comparison.trace(setup, "changing", 20, 7)
    start = slo.goodput(setup.run(trace, batches.FixedSize(4)), setup.objective)
    schedule, value = batches.best_schedule(trace, setup.objective, setup.run, (2, 4, 12), 4, 1)
    assert value >= start and len(schedule.sizes) == 4
    assert slo.goodput(setup.run(trace, batches.Scheduled(trace.starts, schedule.sizes)), setup.objective) == value


def test_time_out_gathers_a_group_but_not_for_ever(setup):
    requests = tuple(ServingRequest(i, at, 8, 2) for i, at in enumerate((0.0, 0.01, 1.0, 1.01, 1.02)))
    trace = Trace("by hand", 0, (traffic.Phase(5.0, 1.0, CHAT),), requests)
    served = setup.run(trace, batches.Timeout(8, 3, 0.1))
    assert [round(outcome.admitted, 3) for outcome in served.outcomes] == [0.1, 0.1, 1.02, 1.02, 1.02]


def test_aimd_climbs_while_objectives_are_kept_and_backs_off_after_a_miss():
    policy = batches.AimdSize(Objectives(1.0, 0.1))
    good, bad = (server.RequestOutcome(ServingRequest(0, 0.0, 4, 3), 0.0, 0.1, end, 3) for end in (0.2, 9.0))
    step = server.ServerStep(0.0, "decode", 1, 4, 0.1, 0, 1)
    for _ in range(10 * batches.WINDOW):
        policy.observe(step, [good])
    assert policy.size == 11
    policy.observe(step, [bad])
    assert policy.size == 9


def test_an_objective_that_no_size_can_meet_is_said_so_and_serving_goes_on(setup):
    assert slo.unattainable(setup.times, setup.objective, CHAT) is None
    impossible = Objectives(1.0, 1e-4)
    assert "no size can meet the objective: a token alone" in slo.unattainable(setup.times, impossible, CHAT)
    assert "a prompt alone" in slo.unattainable(setup.times, Objectives(1e-4, 1.0), CHAT)
    assert setup.times.capacity(CHAT, 1e-4) == (0.0, 0)
    served = setup.run(traffic.constant(5, 4, CHAT), batches.Adaptive(impossible, setup.single))
    assert all(outcome.finished for outcome in served.outcomes) and slo.goodput(served, impossible) == 0


def test_no_capacity_makes_silent_traces_and_measurements_say_so():
    slow = ServingSetup(planted(), Objectives(1.0, 1e-4), Single(0.1, 0.01, 32), Limits(32, None, 6144.0, 1.0))
    traces = policy_comparison.traces(slow, "changing", 10, (0, 1))
    assert all(trace.requests == () for trace in traces)
    judged = policy_comparison.goodput(
        slow, traces, lambda: batches.FixedSize(1), lambda: batches.FixedSize(2), "serve"
    )
    assert judged.verdict == "informative" and judged.baseline == judged.optimized == 0
    latencies = policy_comparison.latencies(slow, traces, lambda: batches.FixedSize(1), lambda: batches.FixedSize(2))
    assert all(item.verdict == "unavailable" for item in latencies if item.metric.startswith("latency"))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: batches.FixedSize(0), "batch size 0"),
        (lambda: batches.FixedSize(2.5), "batch size 2.5"),
        (lambda: batches.Timeout(4, 5, 1.0), "1 <= group <= size"),
        (lambda: batches.Timeout(4, 2, -1.0), "delay >= 0"),
        (lambda: batches.Adaptive(Objectives(1, 1), Single(0.1, 0.01, 32), headroom=0.7), "headroom 0.7"),
        (lambda: slo.objectives(Single(0.1, 0.01, 32), 0.5, 3.0), "first_token_factor 0.5"),
        (lambda: Objectives(0.0, 1.0), "expected more than 0 s"),
    ],
)
def test_values_out_of_range_are_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()


# --- the real engine, on tiny models ---------------------------------------------------------------------------------


def _served(model, policy, requests, text_T):
    trace = Trace("by hand", 0, (traffic.Phase(1.0, 1.0, Lengths(8, 4)),), tuple(requests))
    engine = ModelEngine(model, lambda request: text_T[request.id : request.id + request.prompt_tokens])
    served = serve(trace, policy, engine, VirtualClock(), Limits(8), drain_seconds=float("inf"))
    return served, engine


def test_every_policy_gives_every_request_the_tokens_it_would_get_alone(tiny, name):
    model, draw = tiny(name), random.Random(1)
    text_T = torch.randint(8, 96, (80,), generator=torch.Generator().manual_seed(5))
    requests = [ServingRequest(i, 0.002 * i, draw.randint(3, 24), draw.randint(1, 9)) for i in range(10)]
    objective, single = Objectives(1.0, 0.02), Single(0.01, 0.004, 12)
    policies = (batches.FixedSize(1), batches.FixedSize(5), batches.Adaptive(objective, single))
    outputs = []
    for policy in policies:
        served, engine = _served(model, policy, requests, text_T)
        assert all(len(engine.output[request.id]) == request.new_tokens for request in requests)
        assert engine.rows is None and served.peak_bytes > 0
        outputs.append(engine.output)
    assert outputs[0] == outputs[1] == outputs[2]
    assert replay.same_tokens(outputs[:2])[:2] == (1.0, 1.0)


def test_a_broken_memory_bound_is_an_error_and_changed_answers_are_counted(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    engine = ModelEngine(model, lambda request: torch.arange(8, 8 + request.prompt_tokens), limit_bytes=100)
    with pytest.raises(RuntimeError, match="over its bound of 100"):
        engine.prefill([ServingRequest(0, 0.0, 20, 4)])
    equal, agreement, count = replay.same_tokens([{0: [1, 2], 1: [3, 4]}, {0: [1, 2], 1: [3, 5, 6], 2: [7]}])
    assert (equal, agreement, count) == (0.5, 0.75, 2)


def test_models_whose_cache_keeps_no_whole_rows_are_refused(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    assert batches.applies_to(model) is None
    model.config.layer_types = ["sliding_attention"] * 4
    assert "sliding_attention" in batches.applies_to(model) == batch_cache.joinable(model)
    with pytest.raises(UserError, match="cannot join"):
        ModelEngine(model, lambda request: None)


def test_step_times_are_measured_on_the_real_engine(tiny, monkeypatch):
    from lib.measure.serving import step_times

    model, text_T = tiny("glm-4.7-flash"), torch.randint(8, 96, (64,))
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-6
        return now[0]

    def pass_time(_model, _args, inputs) -> None:
        now[0] += 0.04 * len(inputs["input_ids"])  # on this clock every row of a pass takes 40 ms

    model.register_forward_pre_hook(pass_time, with_kwargs=True)
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=clock))
    times = step_times.measure(model, text_T, (16, 48), repeats=2, most=4)
    assert times.decode(1, 20) == pytest.approx(0.04, rel=1e-3)
    assert times.decode(4, 48) == pytest.approx(0.16, rel=1e-3)
    assert times.prefill(4, 48) / times.prefill(1, 48) == pytest.approx(4, rel=1e-3)
    assert len(times.measured) == 6 and times.samples > 20
    per, rate = times.sustained(2, Lengths(16, 8))
    # Eight steps of two rows, and one prefill of each row meanwhile: (8·0.08 + 2·0.04) s for eight tokens a row.
    assert per == pytest.approx(0.09, rel=0.01) and rate == pytest.approx(2 / (8 * per))
    with pytest.raises(UserError, match="need a text of that length"):
        step_times.measure(model, text_T, (16, 100))


def test_prefill_times_are_those_measured_and_its_edges_beyond():
    from lib.measure.serving import step_times

    # A core whose caches hold short prompts: what lies beyond 300 tokens takes half as long again.
    read = {(n, t): [n * t * (1.5e-4 if t > 300 else 1e-4)] * 2 for n in (1, 4) for t in (32, 128, 320, 600)}
    del read[4, 600]
    decoded = {(count, context): [0.01] for count in (1, 4) for context in (32, 600)}
    times = step_times._assembled(decoded, read, {1.0: [1e-4]}, 1.0, [1, 4], [32, 600])
    for (n, t), seconds in read.items():
        assert times.prefill(n, t) == pytest.approx(seconds[0], rel=0.01)
    for n, t in ((4, 600), (8, 600), (2, 32), (3, 600)):
        assert times.prefill(n, t) == pytest.approx(n * t * (1.5e-4 if t > 300 else 1e-4), rel=0.15)


def test_a_timed_step_follows_one_of_its_own_rows_and_its_rows_differ(tiny, monkeypatch):
    from lib.measure.serving import step_times

    tokens, step = [], batch_cache.step
    monkeypatch.setattr(
        batch_cache, "step", lambda model, rows: (tokens.append(rows.token_B.clone()), step(model, rows))[1]
    )
    step_times.measure(tiny("qwen3-coder-30b"), torch.arange(8, 72), (16, 48), repeats=2, most=4)
    assert [len(token_B) for token_B in tokens] == [1, 1, 2, 2, 4, 4] * 4
    assert all(len(token_B.unique()) == len(token_B) for token_B in tokens)


def test_step_times_around_a_run_are_those_before_and_after_it(tiny, monkeypatch):
    from lib.measure.serving import step_times

    calls, speed = [], [1.0]

    def timed(model, call, *arguments):
        calls.append(speed[0])
        call(*arguments)
        return speed[0]

    monkeypatch.setattr(step_times, "_timed", timed)
    text_T = torch.arange(8, 72)
    times, result = step_times.with_bracketing_step_times(
        tiny("qwen3-4b-instruct-2507"), text_T, (16, 48), lambda: speed.__setitem__(0, 3.0) or "ran", repeats=2, most=4
    )
    assert result == "ran" and calls.count(1.0) == calls.count(3.0) > 20
    assert times.decode(2, 48) == pytest.approx(2.0) and times.prefill(1, 16) == pytest.approx(2.0, rel=0.01)
    assert set(times.decode_ratios) == {0.5, 1.5}


def test_answers_of_random_weights_are_not_compared():
    real = [replay.Replayed(None, {0: [1, 2]}, 1.0, None), replay.Replayed(None, {0: [1, 3]}, 1.0, None)]
    assert [item.optimized for item in replay.answers_alike(real)] == [0.0, 0.5]
    missing = replay.answers_alike(real, "random weights")
    assert [(item.verdict, item.reason) for item in missing] == [("unavailable", "random weights")] * 2


def test_a_simulation_is_compared_with_its_own_spread(setup):
    trial = policy_comparison.trace(setup, "changing", 10, 3)
    make_policy = lambda: batches.FixedSize(8)  # noqa: E731
    real = replay.Replayed(setup.run(trial, make_policy(), 99), {}, 1.0, None)
    rows = replay.beside([[setup.run(trial, make_policy(), jitter) for jitter in range(4)]], [real], setup.objective)
    assert [row["quantity"] for row in rows] == list(slo.COMPARED)
    assert all(row["least"] <= row["simulated"] <= row["most"] for row in rows)
    error = replay.simulation_error(rows)
    assert error.optimized == pytest.approx(sum(row["error"] for row in rows) / len(rows)) and error.optimized < 0.5


def test_prompts_depend_on_id_and_seed_alone(tiny):
    class Loaded:
        model, tokenizer, device, parameters = tiny("qwen3-4b-instruct-2507"), None, "cpu", None

    first, second = prompts(Loaded, 40, 1), prompts(Loaded, 40, 1)
    request = ServingRequest(3, 9.9, 17, 4)
    assert len(first(request)) == 17 and torch.equal(first(request), second(request))
    assert not torch.equal(first(request), first(ServingRequest(4, 9.9, 17, 4)))
