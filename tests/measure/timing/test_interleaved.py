"""Rounds are balanced, disturbed rounds repeated, and only calls are timed, on a clock that the arms advance."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from lib.errors import UserError
from lib.measure.timing import interleaved


class Clock:
    """A clock that advances only while an arm is called."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def arm(self, seconds: float):
        def call():
            self.now += seconds

        return call


def test_orders_are_balanced_and_shuffled():
    orders = [interleaved.balanced_orders("AB", 12, seed) for seed in range(20)]
    assert all(order.count(["A", "B"]) == 6 for order in orders)
    assert len({str(order) for order in orders}) > 10
    assert abs(interleaved.balanced_orders("AB", 7).count(["A", "B"]) * 2 - 7) == 1


def test_rounds_time_every_arm_once_with_balanced_pairwise_order():
    clock = Clock()
    arms = {name: clock.arm(seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    timed = interleaved.rounds(arms, 8, clock=clock)
    np.testing.assert_allclose(timed.contrast({"c": 1, "b": -1}), np.log(2))
    for first, second in itertools.permutations(arms, 2):
        assert sum(timed.before(first, second)) == 4
    pairs = timed.pairs("a", "b")
    assert sorted(pairs.order) == ["AB"] * 4 + ["BA"] * 4 and pairs.optimized_seconds == [2.0] * 8
    assert "3 arms a round" in pairs.describe()


def test_two_arms_form_rounds_of_two():
    clock = Clock()
    arms = clock.arm(1.0), clock.arm(2.0)
    timed = interleaved.rounds(dict(zip(("baseline", "optimized"), arms)), 8, seed=3, clock=clock)
    pairs = interleaved.paired(*arms, blocks=8, seed=3, clock=clock)
    same = [replace(times, cpu_seconds=None) for times in (pairs, timed.pairs("baseline", "optimized"))]
    assert same[0] == same[1] and "a round" not in pairs.describe()


def test_too_few_blocks_are_refused():
    with pytest.raises(UserError, match="at least 6"):
        interleaved.paired(lambda: None, lambda: None, blocks=5)
    with pytest.raises(UserError, match="too few"):
        interleaved.rounds({"a": lambda: None}, 5)


def test_disturbed_blocks_are_repeated_a_bounded_number_of_times_and_counted():
    clock, windows = Clock(), iter(range(1000))

    def watch():
        number = next(windows)
        return lambda: "disturbed" if number in (1, 2, 5) else None

    pairs = interleaved.paired(clock.arm(1), clock.arm(1), blocks=6, clock=clock, disturbance=watch)
    assert len(pairs.baseline_seconds) == 6 and len(pairs.set_aside) == 3 and pairs.disturbed == [None] * 6
    assert "3 disturbed and repeated" in pairs.describe()

    options = {"clock": clock, "disturbance": lambda: lambda: "disturbed"}
    always = interleaved.paired(clock.arm(1), clock.arm(1), blocks=6, **options)
    assert len(always.set_aside) == 6 and always.disturbed == ["disturbed"] * 6
    timed = interleaved.rounds({"a": clock.arm(1), "b": clock.arm(2), "c": clock.arm(3)}, 6, **options)
    assert len(timed.set_aside) == 3 and timed.disturbed == ["disturbed"] * 6
    assert timed.pairs("a", "c").set_aside == [(1, 3, "disturbed")] * 3


def test_preparation_is_not_timed():
    clock = Clock()

    class Arm:
        def __call__(self):
            clock.now += 1

        def prepare(self):
            clock.now += 100

    pairs = interleaved.paired(Arm(), Arm(), blocks=6, iterations=3, clock=clock)
    assert pairs.baseline_seconds == pytest.approx([1.0] * 6)
    assert interleaved.iterations_for(Arm(), 5, clock=clock) == 5


def test_every_clock_reading_waits_for_the_device():
    """Calls return at once; the work that they start ends only when someone waits for it."""
    clock, queued = Clock(), []

    class Arm:
        def __init__(self, seconds: float):
            self.seconds = seconds

        def __call__(self):
            queued.append(self.seconds)

        def synchronize(self):
            clock.now += sum(queued)
            queued.clear()

    pairs = interleaved.paired(Arm(1.0), Arm(2.0), blocks=6, iterations=3, clock=clock)
    assert pairs.baseline_seconds == [1.0] * 6 and pairs.optimized_seconds == [2.0] * 6
    assert interleaved.iterations_for(Arm(1.0), 5, clock=clock) == 5


def test_an_arm_that_cannot_wait_for_the_device_is_waited_for():
    """A plain function next to device work: what it started on the device is its own time, not the next arm's."""
    clock, queued = Clock(), []

    class Arm:
        def __call__(self):
            queued.append(1.0)

        def synchronize(self):
            clock.now += sum(queued)
            queued.clear()

    copy = Arm()
    arms = {"baseline": Arm(), "optimized": lambda: queued.append(2.0)}
    timed = interleaved.rounds(arms, 6, clock=clock)
    assert timed.seconds == {"baseline": [1.0] * 6, "optimized": [2.0] * 6}
    assert interleaved.rounds_for({**arms, "copy": copy}, 400.0, 6, clock=clock) == (100, 1)


def test_cpu_time_is_measured_in_the_same_turns_and_excludes_waiting():
    def busy():
        return sum(range(300_000))

    timed = interleaved.rounds({"busy": busy, "idle": lambda: time.sleep(0.01)}, 2, fewest=2)
    assert [len(timed.cpu_seconds[name]) for name in ("busy", "idle")] == [2, 2]
    assert min(timed.cpu_seconds["busy"]) > max(timed.cpu_seconds["idle"])


def test_short_work_gets_many_short_rounds_and_long_work_the_fewest():
    clock = Clock()

    def chosen(seconds: float, **options) -> tuple[int, int]:
        arms = dict.fromkeys(("baseline", "optimized", "copy"), clock.arm(seconds))
        return interleaved.rounds_for(arms, clock=clock, **options)

    assert chosen(0.0101, total=3.0, least=6) == (100, 1)
    assert chosen(0.004, total=3.0, least=6) == (84, 3)  # three calls a turn
    assert chosen(1.0, total=3.0, least=6) == (6, 1)
    assert chosen(0.00011, total=60.0, least=6) == (interleaved.MOST_ROUNDS, 91)
    assert chosen(0.0101, least=6) == (6, 1)


def test_short_turns_are_less_affected_by_drifting_machine_speed():
    """Speed drifts within a second, as on a shared machine: the same total time in turns of 100 ms and of 10 ms."""

    def half_width(turn: float, seed: int) -> float:
        random, clock, level = np.random.default_rng(seed), Clock(), [0.0]

        def call():
            for _ in range(round(turn / 0.01)):  # the level decorrelates in a few tenths of a second
                level[0] = 0.95 * level[0] + 0.05 * random.normal()
                clock.now += 0.01 * np.exp(level[0])

        return interleaved.paired(call, call, blocks=round(3 / turn), clock=clock, seed=seed).effect().half_width

    short, long = (np.mean([half_width(turn, seed) for seed in range(20)]) for turn in (0.01, 0.1))
    assert short < 0.6 * long
