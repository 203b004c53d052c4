"""Traffic: the same seed gives the same requests, rates and spreads are as requested, bad requests are refused."""

import numpy as np
import pytest

from lib.errors import UserError
from lib.measure.serving import traffic
from lib.measure.serving.traffic import Lengths, Phase

CHAT = Lengths(32, 16)


def load_step(seed):
    return traffic.make("load step", [Phase(20, rate, CHAT) for rate in (5, 20, 5)], seed)


def test_a_seed_fixes_the_trace_and_its_description_reproduces_it():
    first, again, another = (load_step(seed) for seed in (3, 3, 4))
    assert first == again and first.requests != another.requests
    description = first.describe()
    phases = [
        Phase(
            phase["seconds"],
            phase["requests_per_second"],
            Lengths(phase["prompt_tokens"], phase["new_tokens"]),
            phase["burstiness"],
        )
        for phase in description["phases"]
    ]
    assert traffic.make(description["name"], phases, description["seed"]) == first
    assert description["requests"] == len(first.requests)


def test_rate_and_burstiness_are_as_requested():
    calm, bursty = traffic.constant(20, 500, CHAT, 1), traffic.bursty(20, 500, CHAT, 1)
    for trace, spread in ((calm, 1.0), (bursty, traffic.BURSTINESS)):
        gaps = np.diff([request.arrival for request in trace.requests])
        assert len(trace.requests) == pytest.approx(20 * 500, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.15)
        assert (gaps >= 0).all() and trace.requests[-1].arrival < trace.seconds


def test_phases_change_rate_and_lengths_at_the_given_times():
    trace = traffic.make("change of lengths", [Phase(50, 5, CHAT), Phase(50, 20, Lengths(200, 8))], 2)
    halves = [[request for request in trace.requests if low <= request.arrival < low + 50] for low in trace.starts]
    assert trace.starts == [0, 50] and len(halves[1]) > 2 * len(halves[0])
    prompts = [[request.prompt_tokens for request in half] for half in halves]
    assert max(prompts[0]) <= 48 < 100 <= min(prompts[1])
    assert max(request.prompt_tokens + request.new_tokens for request in trace.requests) <= Lengths(200, 8).longest


def test_a_rate_of_zero_gives_no_requests():
    trace = traffic.constant(0, 10, CHAT)
    assert trace.requests == () and trace.seconds == 10


@pytest.mark.parametrize(
    "phase, says",
    [
        (Phase(1, -1, CHAT), "rate -1"),
        (Phase(1, float("inf"), CHAT), "rate inf"),
        (Phase(1, float("nan"), CHAT), "rate nan"),
        (Phase(0, 1, CHAT), "0 s long"),
        (Phase(1, 1, Lengths(0, 4)), "at least one token"),
        (Phase(1, 1, CHAT, 0), "burstiness 0"),
    ],
)
def test_impossible_phases_are_refused(phase, says):
    with pytest.raises(UserError, match=says):
        traffic.make("bad", [phase])
    with pytest.raises(UserError, match="at least one phase"):
        traffic.make("empty", [])


def test_a_warm_up_is_part_of_the_trace_and_leaves_requests_to_count():
    trace = traffic.make("warm", [Phase(5, 4, CHAT), Phase(20, 4, CHAT)], 1, 5.0)
    assert trace.counted_seconds == 20 and trace.describe()["warm_up_seconds"] == 5.0
    assert trace.requests == traffic.make("warm", [Phase(5, 4, CHAT), Phase(20, 4, CHAT)], 1).requests
    with pytest.raises(UserError, match="a warm-up of 25 s"):
        traffic.make("warm", [Phase(25, 4, CHAT)], 1, 25)
