"""Times arms against each other: in every round each arm has one turn, in random but balanced order. Knows nothing
about models: an arm is any callable.

Of any two arms each comes first equally often. A fixed order (all of the baseline first, or the baseline first in every
pair) would create spurious effects. Warm-up takes place before the rounds. A round during which the machine was
disturbed is set aside and repeated, a bounded number of times; its times never decide this. Two arms, baseline and
optimized, are the usual case (`paired`), and their rounds are called blocks. A contrast of more arms (an interaction,
an attribution) is formed within each round, where the machine was the same for all arms, and judged over the rounds by
`lib.measure.metrics.paired_stats`.

Shapes: R rounds.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.errors import UserError
from lib.measure.metrics import paired_stats
from lib.measure.metrics.pairs import Pairs

Arm = Callable[[], object]
Clock = Callable[[], float]
Watch = Callable[[], Callable[[], str | None]]  # like `lib.measure.timing.disturbance.watch`

BASELINE_FIRST, OPTIMIZED_FIRST = "AB", "BA"
TURN_SECONDS = 0.01  # least length of a turn
MOST_ROUNDS, STEP = 200, 4  # numbers of rounds are multiples of STEP, so that they can be averaged in equal groups
LONG_SECONDS = 0.2  # a longer call is warm after one call, and unnecessary further calls are avoided


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of every arm in every round; a turn consisted of `iterations` calls.

    `orders` holds the arms of each round in the order of their turns, `disturbed` what disturbed each round (or None),
    `set_aside` the disturbed rounds that were repeated: seconds per call of each arm, and the reason. `cpu_seconds` is
    this process's CPU time per call (user and system, all threads). `process[i]` numbers the fresh process that timed
    round i; `process` is None if all were timed in this process. `copied`: the arms were copied just for these rounds.
    """

    seconds: dict[str, list[float]]
    iterations: int
    disturbed: list[str | None]
    orders: list[list[str]]
    set_aside: list[tuple[dict[str, float], str]] = field(default_factory=list)
    clock: str = "perf_counter"
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    process: list[int] | None = None
    copied: bool = False

    def logs(self, arm: str) -> np.ndarray:
        """Return ln(seconds) of one arm, [R]."""
        return np.log(np.asarray(self.seconds[arm], dtype=float))

    def contrast(self, weights: Mapping[str, float]) -> np.ndarray:
        """Return Σ weight · ln(seconds of the arm) of each round, [R]."""
        return np.asarray(sum(weight * self.logs(arm) for arm, weight in weights.items()))

    def before(self, first: str, second: str) -> list[bool]:
        """Return, for each round, whether the arm `first` had its turn before `second`."""
        return [order.index(first) < order.index(second) for order in self.orders]

    def pairs(self, baseline: str, optimized: str) -> Pairs:
        """Return two of the arms as paired blocks, for `lib.measure.metrics.paired_samples.from_pairs`."""
        order = [BASELINE_FIRST if first else OPTIMIZED_FIRST for first in self.before(baseline, optimized)]
        repeated = [(seconds[baseline], seconds[optimized], reason) for seconds, reason in self.set_aside]
        clock = self.clock if len(self.seconds) == 2 else f"{self.clock}, {len(self.seconds)} arms a round"
        arms = self.seconds[baseline], self.seconds[optimized]
        cpu_seconds = (self.cpu_seconds[baseline], self.cpu_seconds[optimized]) if self.cpu_seconds else None
        options: dict[str, Any] = {"process": self.process, "cpu_seconds": cpu_seconds}
        return Pairs(*arms, order, self.disturbed, self.iterations, repeated, clock, **options)


def balanced_orders(arms: Sequence[str], count: int, seed: int = 0, mirrored: bool = False) -> list[list[str]]:
    """Return `count` shuffled orders of the arms. Every order comes with its reverse, so that of any two arms each is
    first equally often (one of them once more if `count` is odd).

    `mirrored` reverses each order. The mirrored and unmirrored orders of a seed are balanced together for any `count`.
    """
    shuffle = random.Random(seed)
    orders: list[list[str]] = []
    while len(orders) < count:
        order = shuffle.sample(list(arms), len(arms))
        orders += [order, order[::-1]]
    orders = orders[:count]
    shuffle.shuffle(orders)
    return [order[::-1] for order in orders] if mirrored else orders


def rounds(
    arms: Mapping[str, Arm],
    count: int,
    *,
    iterations: int = 1,
    warmup: int = 1,
    seed: int = 0,
    mirrored: bool = False,
    repeats: int | None = None,
    fewest: int = paired_stats.MINIMUM_BLOCKS,
    clock: Clock = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    disturbance: Watch | None = None,
) -> Rounds:
    """Time one turn (`iterations` calls) of every arm in each of `count` rounds and return all times.

    If an arm has an attribute `prepare`, it is called before each call of that arm, untimed. `synchronize` is called
    before each reading of the clock. By default it is the attribute of that name of the first arm that has one, for all
    arms: a plain function next to a workload on a device starts work there too, and would otherwise seem to end at
    once. `seed` and `mirrored` are those of `balanced_orders`. `disturbance` opens a watch and returns the function
    that closes it with a reason or None. At most `repeats` disturbed rounds are repeated (by default half of `count`);
    later ones are kept and marked. Raises UserError for fewer than `fewest` rounds: six, unless several processes are
    timed.
    """
    if count < fewest:
        raise UserError(f"{count} blocks are too few to tell noise from effect: give at least {fewest}")
    synchronize = synchronize or _waiting(arms)
    for arm in {id(arm): arm for arm in arms.values()}.values():
        for _ in range(warmup):
            arm()

    def timed(order: Sequence[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        close = disturbance() if disturbance else None
        turns = {name: _turn(arms[name], iterations, clock, synchronize) for name in order}
        return turns, close() if close else None

    allowed = count // 2 if repeats is None else repeats
    orders = balanced_orders(list(arms), count, seed, mirrored)
    times: dict[str, list[float]] = {name: [] for name in arms}
    cpu_times: dict[str, list[float]] = {name: [] for name in arms}
    disturbed: list[str | None] = []
    set_aside: list[tuple[dict[str, float], str]] = []
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one arm's turn would be charged to that arm
    try:
        for order in orders:
            turns, reason = timed(order)
            while reason is not None and len(set_aside) < allowed:
                set_aside.append(({name: seconds for name, (seconds, _) in turns.items()}, reason))
                turns, reason = timed(order)
            for name in arms:
                times[name].append(turns[name][0])
                cpu_times[name].append(turns[name][1])
            disturbed.append(reason)
    finally:
        if collecting:
            gc.enable()
    return Rounds(times, iterations, disturbed, orders, set_aside, getattr(clock, "__name__", "clock"), cpu_times)


def paired(
    baseline: Arm,
    optimized: Arm,
    *,
    blocks: int,
    iterations: int = 1,
    warmup: int = 2,
    seed: int = 0,
    fewest: int = paired_stats.MINIMUM_BLOCKS,
    clock: Clock = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    disturbance: Watch | None = None,
) -> Pairs:
    """Time two arms in `blocks` balanced blocks and return all times; the options are those of `rounds`.

    By default the baseline's own `synchronize` serves both arms. At most `blocks` disturbed blocks are repeated. Raises
    UserError for fewer than `fewest` blocks; fewer than six give no interval.
    """
    return rounds(
        {"baseline": baseline, "optimized": optimized},
        blocks,
        iterations=iterations,
        warmup=warmup,
        seed=seed,
        repeats=blocks,
        fewest=fewest,
        clock=clock,
        synchronize=synchronize or getattr(baseline, "synchronize", None),
        disturbance=disturbance,
    ).pairs("baseline", "optimized")


def with_control(
    baseline: Arm,
    optimized: Arm,
    copy: Arm,
    *,
    blocks: int,
    seconds: float = TURN_SECONDS,
    total: float = 0.0,
    seed: int = 0,
    disturbance: Watch | None = None,
) -> tuple[Pairs, Pairs]:
    """Time two warm arms and, as a third arm of the same rounds, the A/A control `copy`: the baseline's work on a
    separately allocated copy of its model. Return the pairs (baseline, optimized) and (baseline, copy).

    A turn consists of as many calls as take `seconds`. Rounds are added to `blocks` until they take `total` seconds
    together. The baseline object itself must not serve as copy: it cannot show how two copies differ.
    """
    arms = {"baseline": baseline, "optimized": optimized, "copy": copy}
    count, iterations = rounds_for(arms, total, blocks, seconds)
    timed = rounds(arms, count, iterations=iterations, warmup=0, seed=seed, repeats=count, disturbance=disturbance)
    return timed.pairs("baseline", "optimized"), timed.pairs("baseline", "copy")


def rounds_for(
    arms: Mapping[str, Arm],
    total: float = 0.0,
    least: int = 1,
    turn_seconds: float = TURN_SECONDS,
    clock: Clock = time.perf_counter,
) -> tuple[int, int]:
    """Return (rounds, calls per turn) for warm arms: turns of `turn_seconds`, and a multiple of STEP rounds that take
    about `total` seconds together, at least `least` and at most MOST_ROUNDS.

    Many short rounds are more informative than few long ones of the same total time: a machine's speed drifts within a
    second, and only changes between neighbouring turns are noise.
    """
    synchronize = _waiting(arms)
    seconds = {name: _turn(arm, 1, clock, synchronize)[0] for name, arm in arms.items()}
    iterations = max(1, math.ceil(turn_seconds / max(min(seconds.values()), 1e-9)))
    count = math.ceil(total / max(iterations * sum(seconds.values()), 1e-9))
    return least if count <= least else min(STEP * math.ceil(count / STEP), MOST_ROUNDS), iterations


def iterations_for(arm: Arm, seconds: float = 0.03, *, warm: bool = False, clock: Clock = time.perf_counter) -> int:
    """Return how many calls of `arm` take at least `seconds`, estimated from one call, so that a block is not all
    noise. An arm that is not `warm` is called once before.
    """
    if not warm:
        arm()
    elapsed, _ = _turn(arm, 1, clock)
    return max(1, math.ceil(seconds / elapsed)) if elapsed > 0 else 1


def warm_up(*arms: Arm) -> float:
    """Call every arm once and return the seconds of the fastest call."""
    return min(_turn(arm, 1, time.perf_counter)[0] for arm in arms)


def _waiting(arms: Mapping[str, Arm]) -> Callable[[], object] | None:
    """Return `synchronize` of the first arm that has it, which waits for all work on the device; None without any."""
    return next((wait for arm in arms.values() if (wait := getattr(arm, "synchronize", None))), None)


def _turn(
    arm: Arm, iterations: int, clock: Clock, synchronize: Callable[[], object] | None = None
) -> tuple[float, float]:
    """Return wall and CPU seconds per call of one turn. Without `prepare` between the calls, they are timed in one
    stretch.
    """
    prepare = getattr(arm, "prepare", None)
    synchronize = synchronize or getattr(arm, "synchronize", None)
    calls = 1 if prepare else iterations
    elapsed = busy = 0.0
    for _ in range(iterations // calls):
        if prepare:
            prepare()
        if synchronize:
            synchronize()
        start_busy, start = time.process_time(), clock()
        for _ in range(calls):
            arm()
        if synchronize:
            synchronize()
        elapsed += clock() - start
        busy += time.process_time() - start_busy
    return elapsed / iterations, busy / iterations
