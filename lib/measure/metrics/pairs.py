"""Timed blocks of two arms: returned by the timer, read by measurements and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.measure.metrics import paired_stats
from lib.measure.metrics.paired_stats import Effect


@dataclass(frozen=True)
class Pairs:
    """Timed blocks, in seconds per call. `disturbed[i]` states what disturbed block i, or is None. `set_aside` holds
    the disturbed blocks that were repeated, as (baseline seconds, optimized seconds, reason).

    `process[i]` numbers the fresh process that timed block i; `process` is None if all were timed in this process.
    `cpu_seconds` are the CPU seconds per call of both arms in the same turns. A turn consisted of `iterations` calls;
    where the number differs between processes, of `iterations` to `most_iterations` calls.
    """

    baseline_seconds: list[float]
    optimized_seconds: list[float]
    order: list[str]
    disturbed: list[str | None]
    iterations: int
    set_aside: list[tuple[float, float, str]] = field(default_factory=list)
    clock: str = "perf_counter"
    process: list[int] | None = None
    cpu_seconds: tuple[list[float], list[float]] | None = None
    most_iterations: int = 0

    @property
    def differences(self) -> np.ndarray:
        """d[n] = ln(t_optimized / t_baseline) per block."""
        return paired_stats.differences(self.baseline_seconds, self.optimized_seconds)

    def effect(self, process_sigma: float = 0.0) -> Effect:
        """The effect of `differences`: see `paired_stats.effect`."""
        return paired_stats.effect(self.differences, self.process, process_sigma)

    def floor(self, process_sigma: float = 0.0) -> float:
        """The noise floor, if these pairs are an A/A control: see `paired_stats.noise_floor`."""
        return paired_stats.noise_floor(self.differences, self.process, process_sigma)

    @property
    def busy(self) -> str | None:
        """What disturbed the blocks that could not be repeated; None where there are none."""
        reasons = [reason for reason in self.disturbed if reason]
        if not reasons:
            return None
        return f"{reasons[-1]}, in {len(reasons)} of {len(self.disturbed)} blocks, more than could be repeated"

    def describe(self) -> str:
        """Return how the pairs were timed, as a phrase: blocks, iterations, clock, disturbed blocks, outliers."""
        parts = [f"{len(self.order)} balanced AB/BA blocks"]
        if self.process is not None:
            parts[0] += f" in {len(set(self.process))} fresh processes"
        if self.most_iterations > self.iterations:
            parts.append(f"{self.iterations} to {self.most_iterations} calls each")
        elif self.iterations > 1:
            parts.append(f"{self.iterations} calls each")
        parts.append(self.clock)
        if self.set_aside:
            parts.append(f"{len(self.set_aside)} disturbed and repeated")
        if disturbed := sum(reason is not None for reason in self.disturbed):
            parts.append(f"{disturbed} disturbed and kept")
        if outlying := paired_stats.outliers(self.differences):
            parts.append(f"{outlying} outlying and kept")
        return ", ".join(parts)


def join(parts: Sequence[Pairs]) -> Pairs:
    """Return the joined pairs of several fresh processes, given as one part per process."""
    first = parts[0]
    return Pairs(
        [second for part in parts for second in part.baseline_seconds],
        [second for part in parts for second in part.optimized_seconds],
        [order for part in parts for order in part.order],
        [reason for part in parts for reason in part.disturbed],
        min(part.iterations for part in parts),
        [repeated for part in parts for repeated in part.set_aside],
        first.clock,
        [number for number, part in enumerate(parts) for _ in part.order],
        _joined_cpu(parts),
        max(part.iterations for part in parts),
    )


def _joined_cpu(parts: Sequence[Pairs]) -> tuple[list[float], list[float]] | None:
    times = [part.cpu_seconds for part in parts if part.cpu_seconds]
    if len(times) < len(parts):
        return None
    base, opt = ([second for arms in times for second in arms[arm]] for arm in (0, 1))
    return base, opt
