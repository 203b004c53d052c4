"""The rivals of the adaptive policy, and the oracle. All serve first come, first served.

- `FixedSize`: admit up to a size at once; the baseline is the best such size, chosen on other traffic.
- `Timeout`: gather a group first, but let no request wait longer than a delay (NVIDIA Triton's dynamic batcher).
- `AimdSize`: one more row after a batch that kept the objective, a tenth fewer after one that missed it (Crankshaw et
  al. 2017, Clipper, NSDI, section 4.3.1), with a slow start.
- `Chunked`: admit every request that fits (the default of vLLM), or up to a size, and read prompts in parts that share
  steps with decoding, up to a number of tokens per step (Agrawal et al. 2024, Sarathi-Serve, OSDI).
- `Scheduled`: sizes by the clock; with sizes chosen in hindsight it is the oracle.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lib.errors import UserError
from lib.measure.metrics import catalogue
from lib.measure.serving.protocol import MOST_ROWS, Decision, Policy, RequestOutcome, Served, ServerStep, View
from lib.measure.serving.slo import Objectives, goodput
from lib.measure.serving.traffic import Trace

BACKOFF, START = 0.9, 8  # AIMD: factor after a miss; initial rows
CHUNK = 64  # prompt tokens that share a step
MARGIN = catalogue.metric("goodput_requests_per_second").margin or 0.0  # of goodput, within which sizes are near-ties

Run = Callable[[Trace, Policy], Served]


class FixedSize:
    """Admit at once every request that fits below `size`."""

    def __init__(self, size: int, name: str | None = None):
        _check_size(size)
        self.size, self.name = size, name or f"fixed {size}"

    def decide(self, view: View) -> Decision:
        return Decision(max(0, min(self.size - view.rows, view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        pass


class Timeout(FixedSize):
    """Admit when `group` requests wait, or the oldest has waited for `delay` seconds; at most `size` rows."""

    def __init__(self, size: int, group: int, delay: float):
        super().__init__(size, f"time-out {group} of {size}")
        if not 1 <= group <= size or delay < 0:
            raise UserError(f"time-out policy: group {group}, delay {delay} s; expected 1 <= group <= size, delay >= 0")
        self.group, self.delay = group, delay

    def decide(self, view: View) -> Decision:
        due = view.waiting[0].arrival + self.delay
        if len(view.waiting) < self.group and view.now < due:
            return Decision(0, due)
        return super().decide(view)


class AimdSize(FixedSize):
    """Add one row after a batch that finished in time, remove a tenth of the rows after a miss.

    In Clipper a batch finishes at once. Here its rows finish one by one, so each adds its share of a row. Until the
    first miss every group of rows that finishes in time adds a whole row, or the size would not converge within a phase
    (slow start: Jacobson 1988, *Congestion avoidance and control*, SIGCOMM). Later that would double the size within
    one batch, while a miss removes only a tenth. The size grows only while it is what keeps requests waiting, or it
    would wind up in calm periods. Rows admitted before the last reduction are ignored, or each of them would reduce the
    size again.
    """

    def __init__(self, objectives: Objectives, most: int = MOST_ROWS):
        super().__init__(min(START, most), "AIMD")
        self.objectives, self.most, self.exact, self.bound = objectives, most, float(self.size), False
        self.since = -math.inf  # the time of the last reduction, s
        self.starting = True  # slow start: no miss yet

    def decide(self, view: View) -> Decision:
        self.bound |= self.size - view.rows < len(view.waiting)
        return super().decide(view)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        recent = [outcome for outcome in finished if outcome.admitted is None or outcome.admitted >= self.since]
        if not recent:
            return
        if any((outcome.token_seconds or 0.0) > self.objectives.token_seconds for outcome in recent):
            self.exact, self.since = max(1.0, self.exact * BACKOFF), step.start + step.seconds
            self.starting = False
        elif self.bound:
            increase = 1.0 if self.starting else len(recent) / self.size
            self.exact = min(float(self.most), self.exact + increase)
        self.size, self.bound = math.floor(self.exact), False


class Chunked(FixedSize):
    """Admit every request that fits below `size`, reading prompts `chunk` tokens at a time in steps shared with
    decoding.
    """

    def __init__(self, chunk: int = CHUNK, size: int = MOST_ROWS, name: str | None = None):
        super().__init__(size, name or f"chunked {chunk}")
        if not (isinstance(chunk, int) and chunk >= 1):
            raise UserError(f"chunked prefill: {chunk} tokens; expected a whole number of at least 1")
        self.chunk = chunk

    def decide(self, view: View) -> Decision:
        return Decision(super().decide(view).admit, chunk=self.chunk)


class Scheduled(FixedSize):
    """Use size `sizes[i]` from time `starts[i]`, in seconds."""

    def __init__(self, starts: Sequence[float], sizes: Sequence[int], name: str = "oracle schedule"):
        super().__init__(sizes[0], name)
        for size in sizes:
            _check_size(size)
        self.starts, self.sizes = list(starts), list(sizes)

    def decide(self, view: View) -> Decision:
        self.size = self.sizes[max(0, sum(start <= view.now for start in self.starts) - 1)]
        return super().decide(view)


def _check_size(size: int) -> None:
    if not (isinstance(size, int) and 1 <= size <= 4096):
        raise UserError(f"batch size {size}; expected a whole number of at least 1")


# --- hindsight --------------------------------------------------------------------------------------------------------


def best_fixed(
    traces: Sequence[Trace], objective: Objectives, run: Run, sizes: Sequence[int], margin: float = MARGIN
) -> tuple[int, dict[int, float]]:
    """Return the best fixed size on `traces`, and the mean goodput of every size.

    Sizes whose goodput lies within `margin` of the highest are near-ties: such a difference means nothing. Among them,
    those within the same margin of the lowest processor time per token are kept: small batches take more of it, and the
    choice must not put the baseline at a disadvantage. Of these the smallest is chosen, since it holds the least
    memory. So noise does not decide between near-ties.
    """
    runs = {size: [run(trace, FixedSize(size)) for trace in traces] for size in sizes}
    means = {size: float(np.mean([goodput(each, objective) for each in served])) for size, served in runs.items()}
    tied = [size for size, value in means.items() if value >= (1 - margin) * max(means.values())]
    busy = {size: _seconds_per_token(runs[size]) for size in tied}
    return min(size for size in tied if busy[size] <= (1 + margin) * min(busy.values())), means


def _seconds_per_token(runs: Sequence[Served]) -> float:
    """Return the busy seconds of the server per token produced; infinite if it produced none."""
    tokens = sum(outcome.produced for served in runs for outcome in served.outcomes)
    return sum(step.seconds for served in runs for step in served.steps) / tokens if tokens else math.inf


def best_schedule(
    trace: Trace, objective: Objectives, run: Run, sizes: Sequence[int], start: int, rounds: int = 2
) -> tuple[Scheduled, float]:
    """Return the oracle: a size per phase, chosen in hindsight by coordinate ascent from the fixed size `start`.

    It knows the phases and the future. As the result of a search it is a lower bound for a true oracle.
    """
    chosen = [start] * len(trace.phases)
    best = goodput(run(trace, Scheduled(trace.starts, chosen)), objective)
    for _ in range(rounds):
        before = best
        for phase in range(len(chosen)):
            for size in sizes:
                tried = [*chosen[:phase], size, *chosen[phase + 1 :]]
                value = goodput(run(trace, Scheduled(trace.starts, tried)), objective)
                if value > best:
                    best, chosen = value, tried
        if best == before:
            break
    return Scheduled(trace.starts, chosen), best
