"""The server loop with a stub clock and a stub engine: order of service, memory bound, and end of a run."""

import random

import pytest

from lib.errors import UserError
from lib.measure.serving import protocol, slo, traffic
from lib.measure.serving.protocol import Decision, Limits
from lib.measure.serving.server import VirtualClock
from lib.measure.serving.simulator import SimulatedEngine, simulate
from lib.measure.serving.slo import Objectives
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths, ServingRequest, Trace


def stub_times(step=1.0, per_row=0.0, read=0.5, per_byte=0.0):
    """Return times: decode = step + per_row·rows seconds, prefill = read seconds per prompt; ten bytes per token."""
    dense = tuple((step + per_row * rows,) * 200 for rows in range(1, 33))
    return StepTimes(dense, (read, 0.0, 0.0), (0.0, per_byte), (1.0,), (1.0,), 10.0, 0)


class Greedy:
    """Admits as many requests as there is room for."""

    name = "greedy"

    def __init__(self, most=32):
        self.most, self.views = most, []

    def decide(self, view):
        self.views.append(view)
        return Decision(min(view.room, self.most - len(view.running)))

    def observe(self, step, finished):
        pass


class InParts(Greedy):
    """As `Greedy`, but reads prompts `chunk` tokens at a time."""

    def __init__(self, chunk, most=32):
        super().__init__(most)
        self.chunk = chunk

    def decide(self, view):
        return Decision(super().decide(view).admit, chunk=self.chunk)


def trace_of(*requests, seconds=100.0, warm_up=0.0):
    listed = tuple(ServingRequest(index, *request) for index, request in enumerate(requests))
    return Trace("by hand", 0, (traffic.Phase(seconds, 1.0, Lengths(4, 4)),), listed, warm_up)


def test_times_match_a_hand_computed_trace():
    # Prefill 0.5 s, then two steps of 1 s. The second request arrives meanwhile and joins between steps.
    trace = trace_of((0.0, 4, 3), (0.7, 4, 2))
    served = simulate(trace, Greedy(), stub_times(), Limits())
    first, second = served.outcomes
    assert (first.first, first.finished) == (0.5, 3.0)  # prefill 0.5, step to 1.5, other prefill to 2.0, step to 3.0
    assert (second.admitted, second.first, second.finished) == (1.5, 2.0, 3.0)
    assert second.first_token_seconds == pytest.approx(1.3) and second.token_seconds == pytest.approx(1.0)
    assert [step.kind for step in served.steps] == ["prefill", "decode", "prefill", "decode", "leave"]
    assert not served.saturated and served.end == 3.0


def test_request_level_batches_wait_for_the_previous_one_and_keep_their_width():
    trace = trace_of((0.0, 4, 2), (0.0, 4, 4), (0.6, 4, 1))
    served = simulate(trace, Greedy(), stub_times(), Limits(), batching="request")
    assert [outcome.finished for outcome in served.outcomes[:2]] == [1.5, 3.5]
    assert served.outcomes[2].admitted == 3.5
    assert [step.batch for step in served.steps if step.kind == "decode"] == [2, 2, 2]
    with pytest.raises(UserError, match="expected one of iteration, request"):
        simulate(trace, Greedy(), stub_times(), Limits(), batching="token")


@pytest.mark.parametrize("batching", protocol.BATCHINGS)
@pytest.mark.parametrize("seed", range(4))
def test_the_cache_stays_within_its_bound_and_no_request_is_lost(batching, seed):
    draw = random.Random(seed)
    trace = trace_of(*sorted((draw.uniform(0, 20), draw.randint(1, 60), draw.randint(1, 20)) for _ in range(60)))
    limits = Limits(8, 10.0 * draw.choice([90, 150, 300]), 10.0)
    served = simulate(trace, Greedy(), stub_times(0.1, 0.01, 0.02), limits, batching=batching, drain_seconds=1000)
    assert 0 < served.peak_bytes <= limits.cache_bytes
    assert max(step.batch for step in served.steps) <= 8
    for outcome in served.outcomes:
        assert outcome.finished is not None and outcome.produced >= outcome.request.new_tokens


def test_a_request_that_never_fits_is_refused_immediately():
    trace = trace_of((0.0, 500, 3), (0.0, 4, 3))
    served = simulate(trace, Greedy(), stub_times(), Limits(8, 100.0, 10.0))
    assert served.refused == [0] and served.outcomes[0].finished is None and served.outcomes[1].finished is not None
    assert slo.goodput_share(served, Objectives(10, 10)) == 0.5


def test_a_run_without_traffic_ends_at_once():
    served = simulate(traffic.constant(0, 10, Lengths(4, 4)), Greedy(), stub_times(), Limits())
    assert served.steps == [] and not served.saturated
    numbers = slo.summary(served, Objectives(1, 1))
    assert numbers["goodput"] == 0 and numbers["goodput share"] is None and numbers["latency p50"] is None


def test_a_saturated_run_ends_and_reports_saturation():
    trace = traffic.constant(50, 20, Lengths(4, 8), 1)
    served = simulate(trace, Greedy(4), stub_times(0.2), Limits(), drain_seconds=5)
    assert served.saturated and served.end < trace.seconds + 5 + 10
    numbers = slo.summary(served, Objectives(1, 1))
    assert numbers["saturated"] and numbers["unfinished"] > 100 and numbers["goodput share"] < 0.2


def test_overdue_requests_are_served_last():
    trace = trace_of((0.0, 4, 10), (0.1, 4, 1), (7.0, 4, 1))
    served = simulate(trace, Greedy(1), stub_times(), Limits(patience_seconds=3.0))
    early, late, prompt = served.outcomes
    assert prompt.admitted == early.finished and late.admitted == prompt.finished
    patient = simulate(trace, Greedy(1), stub_times(), Limits())
    assert patient.outcomes[1].admitted < patient.outcomes[2].admitted


def test_a_policy_that_waits_without_reason_is_an_error():
    class Idle(Greedy):
        def decide(self, view):
            return Decision(0)

    with pytest.raises(UserError, match="waits for nothing"):
        simulate(trace_of((0.0, 4, 2)), Idle(), stub_times(), Limits())


def test_a_policy_may_wait_until_a_given_time():
    class Patient(Greedy):
        def decide(self, view):
            return Decision(1) if view.now >= 2 else Decision(0, 2.0)

    served = simulate(trace_of((0.0, 4, 2)), Patient(), stub_times(), Limits())
    assert served.outcomes[0].admitted == 2.0


def test_the_simulated_cache_is_as_wide_as_its_longest_row():
    engine = SimulatedEngine(stub_times(), jitter=False)
    engine.prefill([ServingRequest(0, 0, 10, 9), ServingRequest(1, 0, 4, 9)])
    engine.decode()
    assert engine.bytes == 2 * 11 * 10
    engine.leave([0])
    assert engine.bytes == 5 * 10
    engine.clear()
    assert engine.bytes == 0


def test_goodput_needs_both_objectives_and_settling_finds_the_last_bad_stretch():
    # A server that is slow between seconds 10 and 20, in which one request a second is late.
    requests = [(float(second), 4, 2) for second in range(40)]
    served = simulate(trace_of(*requests, seconds=40.0), Greedy(), stub_times(0.1, 0.0, 0.1), Limits())
    for outcome in served.outcomes:
        if 10 <= outcome.request.arrival < 20:
            outcome.first = outcome.finished = outcome.finished + 5
    objective = Objectives(1.0, 1.0)
    assert slo.goodput(served, objective) == 30 / 40
    assert slo.goodput(served, Objectives(1.0, 1e-6)) == 0
    settled = slo.settling_seconds(served, objective, 10.0, 40.0)
    # The last window of ten with two bad ones ends at request 27: one bad request of ten is still settled.
    assert settled == pytest.approx(17.0)
    assert slo.settling_seconds(served, objective, 21.0, 40.0) == 0.0
    assert slo.settling_seconds(served, objective, 0.0, 20.0) is None
    assert slo.settling_seconds(served, objective, 35.0, 40.0) is None


def test_padding_of_finished_rows_is_not_output():
    trace = trace_of((0.0, 4, 2), (0.0, 4, 8))  # the first finishes after one of the seven steps
    served = simulate(trace, Greedy(), stub_times(), Limits(), batching="request")
    assert served.end == 0.5 + 7 and [outcome.produced for outcome in served.outcomes] == [8, 8]
    assert slo.summary(served, Objectives(10.0, 10.0))["output tokens/s"] == (2 + 8) / 7.5


def test_a_chunked_prompt_shares_steps_with_decoding():
    # The first is alone: read at once, 0.5 s. The second (ten tokens) arrives: chunks of 4, 4 and 2,
    # each alongside one token of the first (1 s) plus its own call (0.5 s).
    trace = trace_of((0.0, 4, 9), (0.2, 10, 2))
    served = simulate(trace, InParts(4), stub_times(), Limits())
    first, second = served.outcomes
    kinds = [(step.kind, step.batch, step.read) for step in served.steps[:4]]
    assert kinds == [("prefill", 1, 0), ("shared", 1, 4), ("shared", 1, 4), ("shared", 1, 2)]
    assert second.admitted == 0.5 and second.first == pytest.approx(0.5 + 3 * 1.5)
    assert second.finished == pytest.approx(6.0) and first.produced == 9
    assert served.gaps[:3] == pytest.approx([1.5] * 3)  # first row; without chunks it would wait for the whole prompt
    whole = simulate(trace, Greedy(), stub_times(), Limits())
    assert whole.outcomes[1].first == pytest.approx(1.0)


def test_a_chunked_prompt_is_finished_when_the_decoding_rows_leave():
    served = simulate(trace_of((0.0, 4, 2), (0.2, 20, 2)), InParts(4), stub_times(), Limits())
    assert all(outcome.finished is not None for outcome in served.outcomes)
    # One chunk alongside the first row's only step; then no row decodes and the rest is read at once.
    assert [step.read for step in served.steps if step.kind == "shared"] == [4, 16]


@pytest.mark.parametrize("seed", range(3))
def test_chunked_prompts_stay_within_the_cache_and_get_all_their_tokens(seed):
    draw = random.Random(seed)
    trace = trace_of(*sorted((draw.uniform(0, 20), draw.randint(1, 60), draw.randint(1, 20)) for _ in range(60)))
    limits = Limits(8, 10.0 * 300, 10.0)
    served = simulate(trace, InParts(16), stub_times(0.1, 0.01, 0.02), limits, drain_seconds=1000)
    assert 0 < served.peak_bytes <= limits.cache_bytes
    assert sum(step.read for step in served.steps) > 0
    for outcome in served.outcomes:
        assert outcome.finished is not None and outcome.produced == outcome.request.new_tokens


def test_the_warm_up_is_served_but_not_counted():
    requests = [(float(second), 4, 2) for second in range(20)]
    served = simulate(trace_of(*requests, seconds=20.0, warm_up=5.0), Greedy(), stub_times(0.1), Limits())
    objective = Objectives(10, 10)
    assert all(outcome.finished is not None for outcome in served.outcomes)
    assert slo.summary(served, objective)["requests"] == len(served.counted) == 15
    assert slo.goodput(served, objective) == 15 / 15 and len(served.gaps) == 15


def test_unfinished_requests_count_and_have_infinite_latency():
    """Leaving them out made a slow server look fast: with two of five answered, the median was that of the two."""
    # One row at a time, 10 s each. The run ends at 25 s: two done, the third under way, two waiting.
    requests = [(float(second), 4, 10) for second in range(4)] + [(19.0, 4, 10)]
    served = simulate(trace_of(*requests, seconds=20.0), Greedy(1), stub_times(), Limits(), drain_seconds=5)
    numbers = slo.summary(served, Objectives(12.0, 2.0))
    assert numbers["unfinished"] == 3 and numbers["latency p50"] is None
    # Three of five have a first token: the median is the last of these, the third request's.
    assert numbers["first token p50"] == pytest.approx(19.5 - 2.0)
    # The last one is still undecided: it has waited for less than the objective.
    assert numbers["first token late"] == pytest.approx(2 / 4)
    assert numbers["goodput share"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(("unfinished", "p95"), [(0, 94.05), (4, 94.05), (5, None), (60, None)])
def test_a_percentile_is_infinite_if_too_many_requests_are_unfinished(unfinished, p95):
    """A hundred requests that take 0 to 99 seconds; the slowest are the unfinished ones."""
    times = [float(second) if second < 100 - unfinished else None for second in range(100)]
    found = slo.percentiles(times)
    assert found["p95"] == (None if p95 is None else pytest.approx(p95))
    assert found["p50"] == (pytest.approx(49.5) if unfinished < 50 else None)
    assert (found["p99"] is None) is (unfinished > 0) and slo.percentiles([None, None]) == {}


def test_the_highest_rate_with_90_percent_in_time():
    assert slo.attained_rate([1.0, 2.0, 3.0], [1.0, 0.95, 0.85]) == pytest.approx(2.5)
    assert slo.attained_rate([1.0, 2.0], [1.0, 0.9]) == 2.0
    assert slo.attained_rate([1.0, 2.0, 3.0], [0.5, 0.95, 0.95]) is None
    assert slo.attained_rate([], []) is None


def test_the_virtual_clock_never_goes_backwards():
    clock = VirtualClock()
    clock.advance(2.0)
    clock.wait_until(1.0)
    assert clock.now() == 2.0
