"""Measures the energy per token of both arms, and the CPU seconds that decide efficiency where no energy was counted.

Joules are judged only if they come from a counter (`lib.measure.trackers.energy_source`). An estimate is CPU time
multiplied by values from a table of unknown error: it is shown with that label and never judged. The CPU time itself,
measured in the same windows, is judged instead. Unknown energy is never 0, and measured and estimated joules are never
added.

Knows nothing about models. No window includes loading or start-up.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from lib.measure.metrics import measurement, paired_samples, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.timing.interleaved import Watch, balanced_orders
from lib.measure.trackers.energy_source import Counter, counter

GROSS, ABOVE_IDLE, INVERSE = "energy_joules_per_token", "energy_above_idle_joules_per_token", "tokens_per_joule"
CPU = "cpu_seconds_per_token"
ESTIMATED = "estimated from processor time: shown, never judged"
COUNTED = "energy is judged, by its counter"
BESIDE_A_GPU = "a GPU does the work, and this is only the CPU's time"


class CountedArm(Protocol):
    """An arm with the number of `tokens` that one call processes; `prepare` and `synchronize` are optional."""

    @property
    def tokens(self) -> int: ...

    def __call__(self) -> object: ...


class Window(NamedTuple):
    """Energy and times of one window of an arm, per token."""

    joules: float
    wall_seconds: float
    cpu_seconds: float


Windows = dict[str, list[Window]]  # of the arms baseline, control and optimized


def per_token(
    baseline: CountedArm,
    optimized: CountedArm,
    *,
    workload: str,
    blocks: int,
    device: str = "cpu",
    seconds: float | None = None,
    seed: int = 0,
    source: Counter | None = None,
    with_cpu_seconds: bool = True,
    disturbance: Watch | None = None,
    control: CountedArm | None = None,
    process_sigma: float | None = None,
) -> list[Measurement]:
    """Return gross joules per token, joules above idle per token, tokens per joule and, with `with_cpu_seconds`, CPU
    seconds per token of two workloads.

    In each of `blocks` blocks, both arms and the A/A control run for one window each, in random but balanced order. A
    window takes `seconds`, by default as long as the counter needs. `control` is the baseline's work on a copy of it,
    by default the baseline a second time. Idle power is read before and after, if possible. The joules are judged if
    they come from a counter, else the CPU seconds.

    `disturbance` opens a watch, as for `interleaved.rounds`: blocks in which other programs used energy as well are
    repeated (at most `blocks` of them); if disturbed blocks remain, nothing is decided. Joules are not judged if the
    counter included the work of others on cores that this process does not use (`Counter.beside`). `process_sigma`: as
    in `paired_samples.from_samples`, for parts of models, whose times vary more between processes.
    """
    source = source or counter(device)
    window = seconds or source.window_seconds
    before = source.idle() if source.idle else source.idle_watts
    arms = {"baseline": baseline, "control": baseline if control is None else control, "optimized": optimized}
    for arm in (baseline, optimized) if control is None else arms.values():
        arm()
    windows: Windows = {name: [] for name in arms}
    disturbed: list[str] = []
    repeated = 0
    others = source.beside() if source.beside else None
    for order in balanced_orders(list(arms), blocks, seed):
        taken, reason = _block(order, arms, source, window, disturbance)
        while reason and repeated < blocks:
            taken, reason = _block(order, arms, source, window, disturbance)
            repeated += 1
        disturbed += [reason] if reason else []
        for name, used in taken.items():
            windows[name].append(used)
    shared = others() if others else None
    after = source.idle() if source.idle else before
    source = replace(source, idle_watts=None if before is None or after is None else (before + after) / 2)
    how = f"{blocks} windows of {window:g} s per arm in random, balanced order"
    how += f", {repeated} blocks disturbed and repeated" if repeated else ""
    options: dict[str, Any] = {"disturbed": disturbed, "process_sigma": process_sigma}
    measurements = _joules(windows, source, workload, f"{source.scope}, {how}", shared=shared, **options)
    if with_cpu_seconds:
        samples = [[taken.cpu_seconds for taken in windows[arm]] for arm in ("baseline", "optimized", "control")]
        options |= {"workload": workload, "source": how, "counted": is_judged(measurements)}
        measurements.append(cpu_seconds(*samples, **options))
    return measurements


def _block(
    order: Sequence[str],
    arms: Mapping[str, CountedArm],
    source: Counter,
    seconds: float,
    disturbance: Watch | None,
) -> tuple[dict[str, Window], str | None]:
    """Return one window of every arm, measured in `order`, and what disturbed them (or None)."""
    close = disturbance() if disturbance else None
    taken = {name: _window(arms[name], source, seconds) for name in order}
    return taken, close() if close else None


def of_turns(pairs: Pairs, control: Pairs, tokens: int, *, workload: str, source: Counter) -> list[Measurement]:
    """Return the measurements of `per_token`, except CPU seconds, from turns that are already timed. Only for an
    estimate, which is computed from times alone. `tokens` is the number that one call processes. The pairs must have
    CPU seconds.
    """
    assert source.of_times and pairs.cpu_seconds and control.cpu_seconds, "an estimate from wall and processor time"
    seconds = {
        "baseline": (pairs.baseline_seconds, pairs.cpu_seconds[0]),
        "control": (control.optimized_seconds, control.cpu_seconds[1]),
        "optimized": (pairs.optimized_seconds, pairs.cpu_seconds[1]),
    }
    windows: Windows = {
        arm: [
            Window(source.of_times(wall, busy) / tokens, wall / tokens, busy / tokens)
            for wall, busy in zip(walls, cpu_times)
        ]
        for arm, (walls, cpu_times) in seconds.items()
    }
    return _joules(windows, source, workload, f"{source.scope}, {pairs.describe()}", pairs.process)


def cpu_seconds(
    baseline: Sequence[float],
    optimized: Sequence[float],
    control: Sequence[float],
    *,
    workload: str,
    source: str,
    counted: bool = False,
    process: Sequence[int] | None = None,
    disturbed: Sequence[str] = (),
    process_sigma: float | None = None,
) -> Measurement:
    """Return CPU seconds per token (user and system time of the measuring process, all threads), from samples of the
    baseline, the optimized arm and the A/A control that were taken in the same rounds.

    `source` states how they were taken; `process[i]` is the process of sample i, if there are several; `disturbed` and
    `process_sigma` are as in `paired_samples.from_samples`. With `counted`, the result is informative, since the
    counted energy is judged instead.
    """
    how = f"user + system time, {source}"
    if min(*baseline, *optimized, *control) <= 0:
        return measurement.unavailable(CPU, workload, "the processor's clock did not move within a window", how)
    floor = paired_stats.noise_floor(paired_stats.differences(baseline, control), process)
    options: dict[str, Any] = {"process": process, "disturbed": disturbed, "process_sigma": process_sigma}
    judged = paired_samples.from_samples(CPU, workload, baseline, optimized, source=how, floor=floor, **options)
    return measurement.unjudged(judged, COUNTED) if counted else judged


def counted_too(others: str) -> str:
    """Return why joules are not judged if the counter included what `others` did (`Counter.beside`), and what to do."""
    return f"{others}, and the counter counts every core: energy is judged only in a run by itself (--jobs 1)"


def is_judged(joules: Sequence[Measurement]) -> bool:
    """Whether gross energy is judged in these measurements: its counter moved, over sufficiently many windows."""
    return any(m.metric == GROSS and m.margin is not None for m in joules)


def judge_once(joules: Sequence[Measurement], measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurements, with CPU seconds made informative if `joules` are judged."""
    if not is_judged(joules):
        return [*measurements]
    return [measurement.unjudged(m, COUNTED) if m.metric == CPU and m.margin is not None else m for m in measurements]


def _window(arm: CountedArm, source: Counter, seconds: float) -> Window:
    """Run `arm` for at least `seconds`; return energy and times per token, not counting `prepare`."""
    prepare, synchronize = getattr(arm, "prepare", None), getattr(arm, "synchronize", None)
    joules = wall = busy = 0.0
    tokens = 0
    while wall < seconds:
        if prepare:
            prepare()
        if synchronize:
            synchronize()
        start, start_busy, before = time.perf_counter(), time.process_time(), source.joules()
        # Without `prepare` the window is one stretch, so that a slow counter is read as rarely as possible.
        while True:
            arm()
            tokens += arm.tokens
            if synchronize:
                synchronize()
            if prepare or time.perf_counter() - start >= seconds:
                break
        joules += source.joules() - before
        busy += time.process_time() - start_busy
        wall += time.perf_counter() - start
    return Window(joules / tokens, wall / tokens, busy / tokens)


def _joules(
    windows: Windows,
    source: Counter,
    workload: str,
    how: str,
    process: Sequence[int] | None = None,
    disturbed: Sequence[str] = (),
    shared: str | None = None,
    process_sigma: float | None = None,
) -> list[Measurement]:
    gross = {arm: [taken.joules for taken in values] for arm, values in windows.items()}
    if min(min(values) for values in gross.values()) <= 0:
        reason = "the counter did not move within a window"
        return [measurement.unavailable(name, workload, reason, how) for name in (GROSS, ABOVE_IDLE, INVERSE)]

    def compared(metric: str, values: dict[str, list[float]], how: str, samples: bool = False) -> Measurement:
        # The floor is that of these values: energy above idle varies by larger shares than gross energy.
        floor = paired_stats.noise_floor(paired_stats.differences(values["baseline"], values["control"]), process)
        options: dict[str, Any] = {"source": how, "floor": floor, "provenance": source.provenance, "samples": samples}
        options |= {"process": process, "disturbed": disturbed}
        options |= {"process_sigma": process_sigma if source.provenance == "measured" else None}
        judged = paired_samples.from_samples(metric, workload, values["baseline"], values["optimized"], **options)
        if source.provenance == "estimated":
            return measurement.unjudged(judged, f"{ESTIMATED}; no counter: {source.missing or 'not requested'}")
        if shared:
            return measurement.unjudged(judged, counted_too(shared))
        return measurement.unjudged(judged, f"the inverse of {GROSS}, which is judged") if metric == INVERSE else judged

    inverse = {arm: [1 / joules for joules in values] for arm, values in gross.items()}
    above: Measurement
    if source.idle_watts is None:
        above = measurement.unavailable(ABOVE_IDLE, workload, "idle power could not be read", how)
    else:
        idle = source.idle_watts
        rest = {arm: [taken.joules - idle * taken.wall_seconds for taken in windows[arm]] for arm in windows}
        if min(min(values) for values in rest.values()) > 0:
            above = compared(ABOVE_IDLE, rest, f"{how}, less {idle:.3g} W idle")
        else:
            reason = "a window took no more energy than idling"
            above = measurement.unavailable(ABOVE_IDLE, workload, reason, how)
    return [compared(GROSS, gross, how, samples=True), above, compared(INVERSE, inverse, how)]
