"""Times several things against each other: in each round every arm once, in shuffled order, and the next round in the
reverse of that order, so that of any two arms each comes first equally often. Knows nothing of what the arms are.

Any contrast of the arms (a pair, an interaction, an attribution) is formed within each round, where the machine was the
same for all of them, and judged over the rounds by `lib.measure.metrics.paired_stats`.

Shapes: R rounds.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lib.errors import UserError
from lib.measure.metrics import paired_stats
from lib.measure.metrics.paired_stats import Pairs
from lib.measure.timing import interleaved

LONG_SECONDS = 0.2  # a call that lasts longer is warm after one, and none is made that can be spared


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of every arm in every round, of `iterations` calls; `disturbed` says what disturbed a round."""

    seconds: dict[str, list[float]]
    iterations: int
    disturbed: list[str | None]
    orders: list[list[str]]

    def logs(self, arm: str) -> np.ndarray:
        """Return ln(seconds) of one arm, [R]."""
        return np.log(np.asarray(self.seconds[arm], dtype=float))

    def contrast(self, weights: Mapping[str, float]) -> np.ndarray:
        """Return Σ weight · ln(seconds of the arm) of each round, [R]."""
        return sum(weight * self.logs(arm) for arm, weight in weights.items())

    def pairs(self, baseline: str, optimized: str) -> Pairs:
        """Return two of the arms as paired blocks, for `lib.measure.metrics.measurement.from_pairs`."""
        order = ["AB" if first else "BA" for first in self.before(baseline, optimized)]
        arms = self.seconds[baseline], self.seconds[optimized]
        clock = f"perf_counter, {len(self.seconds)} arms a round"
        return Pairs(*arms, order, self.disturbed, self.iterations, [], clock)

    def before(self, one: str, other: str) -> list[bool]:
        """Return whether `one` had its turn before `other`, round by round."""
        return [order.index(one) < order.index(other) for order in self.orders]


def rounds(
    arms: Mapping[str, Callable[[], object]],
    count: int,
    *,
    iterations: int = 1,
    warmup: int = 1,
    seed: int = 0,
    disturbance: Callable[[], Callable[[], str | None]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time every arm once in each of `count` rounds. An arm's `prepare` and `synchronize` are used as in `timing`.

    A disturbed round is repeated, at most `count` // 2 of them in all; later ones are kept and marked. Raises UserError
    for fewer than six rounds.
    """
    if count < paired_stats.MINIMUM_BLOCKS:
        raise UserError(
            f"{count} rounds are too few to tell noise from effect: give {paired_stats.MINIMUM_BLOCKS} or more"
        )
    shuffle, names = random.Random(seed), list(arms)
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    kept: dict[str, list[float]] = {name: [] for name in names}
    disturbed: list[str | None] = []
    orders: list[list[str]] = []
    repeats, collecting = count // 2, gc.isenabled()
    gc.disable()
    try:
        for index in range(count):
            if index % 2 == 0:
                shuffle.shuffle(names)
            order = names if index % 2 == 0 else names[::-1]
            found, reason = _round(arms, order, iterations, disturbance, clock)
            while reason is not None and repeats > 0:
                repeats -= 1
                found, reason = _round(arms, order, iterations, disturbance, clock)
            for name, seconds in found.items():
                kept[name].append(seconds)
            disturbed.append(reason)
            orders.append(list(order))
    finally:
        if collecting:
            gc.enable()
    return Rounds(kept, iterations, disturbed, orders)


def with_control(
    baseline: Callable[[], object],
    optimized: Callable[[], object],
    *,
    lasted: float,
    blocks: int,
    seconds: float = 0.03,
    seed: int = 0,
    disturbance: Callable[[], Callable[[], str | None]] | None = None,
) -> tuple[Pairs, Pairs]:
    """Time two arms, called once already and `lasted` seconds then, and the baseline against itself; return both pairs.

    Each in blocks of its own, of as many calls as last `seconds`; or, where calls are long, in the same rounds, with
    the baseline's second turn as the third arm.
    """
    options = {"iterations": interleaved.iterations_for(baseline, seconds, warm=True), "disturbance": disturbance}
    if lasted > LONG_SECONDS and options["iterations"] == 1:
        three = {"baseline": baseline, "optimized": optimized, "again": baseline}
        timed = rounds(three, blocks, warmup=0, seed=seed, **options)
        return timed.pairs("baseline", "optimized"), timed.pairs("baseline", "again")
    options |= {"blocks": blocks, "warmup": 1}
    pairs = interleaved.paired(baseline, optimized, seed=seed, **options)
    return pairs, interleaved.a_a(baseline, seed=seed + 1, **options)


def called(*arms: Callable[[], object]) -> float:
    """Call every arm once, to warm it, and return the fewest seconds that one took."""
    return min(_seconds(arm, 1, time.perf_counter) for arm in arms)


def _round(arms: Mapping, order: list[str], iterations: int, disturbance, clock) -> tuple[dict[str, float], str | None]:
    close = disturbance() if disturbance else None
    found = {name: _seconds(arms[name], iterations, clock) for name in order}
    return found, close() if close else None


def _seconds(arm: Callable[[], object], iterations: int, clock: Callable[[], float]) -> float:
    prepare, synchronize = getattr(arm, "prepare", None), getattr(arm, "synchronize", None)
    elapsed = 0.0
    for _ in range(iterations):
        if prepare:
            prepare()
        if synchronize:
            synchronize()
        start = clock()
        arm()
        if synchronize:
            synchronize()
        elapsed += clock() - start
    return elapsed / iterations
