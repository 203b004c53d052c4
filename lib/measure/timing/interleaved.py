"""Times two things against each other: paired, balanced, interleaved. It knows nothing of models: an arm is anything
callable.

The unit is a block: both arms once, or `iterations` times each, in random but balanced order (AB and BA equally often).
"Base first, then head" invents effects, and so does a fixed order inside the pair. Warm-up lies outside the blocks. A
block during which the machine was disturbed is set aside and repeated, a bounded number of times; which block that is
never depends on its times.
"""

import gc
import math
import random
import time
from collections.abc import Callable

from lib.errors import UserError
from lib.measure.metrics import paired_stats
from lib.measure.metrics.paired_stats import Pairs

BASELINE_FIRST, OPTIMIZED_FIRST = "AB", "BA"


def balanced_order(blocks: int, seed: int = 0) -> list[str]:
    """Return `blocks` orders, AB and BA equally often (one more of either where the number is odd), shuffled."""
    shuffle = random.Random(seed)
    first = shuffle.choice([BASELINE_FIRST, OPTIMIZED_FIRST])
    second = OPTIMIZED_FIRST if first == BASELINE_FIRST else BASELINE_FIRST
    order = [first] * math.ceil(blocks / 2) + [second] * (blocks // 2)
    shuffle.shuffle(order)
    return order


def iterations_for(
    arm: Callable[[], object],
    seconds: float = 0.03,
    *,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return how many calls of `arm` last at least `seconds`, by one call, so that a block is not all noise. Where it
    is not `warm` yet, it is called once before.
    """
    prepare = getattr(arm, "prepare", None) or (lambda: None)
    if not warm:
        arm()
    prepare()
    start = clock()
    arm()
    elapsed = clock() - start
    return max(1, math.ceil(seconds / elapsed)) if elapsed > 0 else 1


def paired(
    baseline: Callable[[], object],
    optimized: Callable[[], object],
    *,
    blocks: int,
    iterations: int = 1,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    disturbance: Callable[[], Callable[[], str | None]] | None = None,
) -> Pairs:
    """Time both arms in `blocks` balanced blocks and return every time.

    An arm's attribute `prepare`, where it has one, is called before each call of that arm and not timed. `synchronize`
    is called before each reading of the clock (a workload's own `synchronize` attribute is used where none is given).
    `disturbance` opens a watch and returns the function that closes it with a reason or None
    (`lib.measure.timing.disturbance.watch`). At most as many blocks are repeated as were asked for. Raises UserError
    for fewer than six blocks.
    """
    if blocks < paired_stats.MINIMUM_BLOCKS:
        raise UserError(
            f"{blocks} blocks are too few to tell noise from effect: give at least {paired_stats.MINIMUM_BLOCKS}"
        )
    synchronize = synchronize or getattr(baseline, "synchronize", None)
    for _ in range(warmup):
        for arm in (baseline,) if optimized is baseline else (baseline, optimized):
            arm()

    def seconds(arm: Callable[[], object]) -> float:
        prepare = getattr(arm, "prepare", None)
        calls = 1 if prepare else iterations
        elapsed = 0.0
        for _ in range(iterations // calls):
            if prepare:
                prepare()
            if synchronize:
                synchronize()
            start = clock()
            for _ in range(calls):
                arm()
            if synchronize:
                synchronize()
            elapsed += clock() - start
        return elapsed / iterations

    def block(order: str) -> tuple[float, float, str | None]:
        close = disturbance() if disturbance else None
        if order == BASELINE_FIRST:
            base, opt = seconds(baseline), seconds(optimized)
        else:
            opt, base = seconds(optimized), seconds(baseline)
        return base, opt, close() if close else None

    orders, kept, set_aside = balanced_order(blocks, seed), [], []
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one arm's turn would be charged to that arm
    try:
        for order in orders:
            found = block(order)
            while found[2] is not None and len(set_aside) < blocks:
                set_aside.append(found)
                found = block(order)
            kept.append(found)
    finally:
        if collecting:
            gc.enable()
    base, opt, reasons = (list(column) for column in zip(*kept))
    return Pairs(base, opt, orders, reasons, iterations, set_aside, getattr(clock, "__name__", "clock"))


def a_a(baseline: Callable[[], object], **options) -> Pairs:
    """Time the baseline against itself through the same path as `paired` and return the pairs: their `floor` is the
    noise floor.
    """
    return paired(baseline, baseline, **options)
