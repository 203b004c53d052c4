"""Adaptive batch sizes: how many requests a server decodes together, decided anew at every step.

A larger batch makes more tokens per second and each of them later. The right size depends on the load and on the
lengths, which change. Policies for the server loop of `lib.measure.serving.server`, all of them first come, first
served:

- `fixed`: admit up to a size at once; the baseline is the best such size in hindsight.
- `timeout`: gather a group first, but let nobody wait longer than a delay (NVIDIA Triton's dynamic batcher).
- `aimd`: one row more while the objectives are kept, a tenth fewer when one is missed (Crankshaw et al. 2017, Clipper,
  NSDI, section 4.3.1).
- `adaptive`: ours. An online model of step time T(rows, context) and of prefill time, learned by recursive least
  squares while serving; the largest batch that is predicted to keep the time per token, with hysteresis; and nobody
  is admitted whose prefill would push a row under way beyond its objective (the idea of Pang et al. 2025, arXiv
  2503.05248: memory- and latency-aware dynamic batching).
- `scheduled`: sizes by the clock; with sizes found in hindsight it is the oracle.

The model's weights are left alone: nothing is applied to them, and the same tokens come out, up to the rounding of
another batch size. The memory bound is kept by the loop for every policy. Knows nothing of clocks or engines.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from lib.errors import UserError
from lib.measure.serving.server import MOST_ROWS, Decision, Policy, RequestOutcome, Served, ServerStep, View
from lib.measure.serving.slo import FACTORS, Objectives, Single, goodput
from lib.measure.serving.traffic import Trace
from lib.models.decoding import batch_cache

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "batching": {"type": "categorical", "choices": ("iteration", "request"), "default": "iteration"},
    "first_token_factor": {
        "type": "float",
        "range": FACTORS,
        "default": 8.0,
        "help": "objective of the time to first token, in single-request times",
    },
    "token_factor": {
        "type": "float",
        "range": FACTORS,
        "default": 3.0,
        "help": "objective of the time per output token, in single-request times",
    },
    "headroom": {
        "type": "float",
        "range": (0.0, 0.5),
        "default": 0.1,
        "help": "share of the objective per token that is kept free",
    },
}
FORGETTING = 0.99  # of the step-time model, per step
TRUST, SWEEPS = 0.5, 4  # see StepModel
LOOK_AHEAD = 8  # waiting requests whose lengths count
PATIENCE = 3  # decisions in a row that must ask for a larger batch before it grows
FINALISTS = 5  # fixed sizes that serve every trace
BACKOFF, WINDOW = 0.9, 8  # AIMD: factor after a miss; finished requests between two changes


def applies_to(model: nn.Module) -> str | None:
    """Return None where rows can join this model's running batch, else the reason why not."""
    return batch_cache.joinable(model)


# --- policies to compare with ----------------------------------------------------------------------------------------


class FixedSize:
    """Admit at once every request that fits below `size`."""

    def __init__(self, size: int, name: str | None = None):
        _check_size(size)
        self.size, self.name = size, name or f"fixed {size}"

    def decide(self, view: View) -> Decision:
        return Decision(max(0, min(self.size - len(view.running), view.room)))

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
    """One row more after a window of requests that kept the objectives, a tenth fewer after one that did not."""

    def __init__(self, objectives: Objectives, most: int = MOST_ROWS):
        super().__init__(1, "AIMD")
        self.objectives, self.most, self.exact = objectives, most, 1.0
        self.count = self.missed = 0

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        for outcome in finished:
            self.count += 1
            self.missed += (outcome.token_seconds or 0.0) > self.objectives.token_seconds
        if self.count >= WINDOW or self.missed:
            self.exact = max(1.0, self.exact * BACKOFF) if self.missed else min(float(self.most), self.exact + 1)
            self.size, self.count, self.missed = math.floor(self.exact), 0, 0


class Scheduled(FixedSize):
    """Size `sizes[i]` from second `starts[i]` on."""

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


# --- ours ------------------------------------------------------------------------------------------------------------


class StepModel:
    """Seconds of a call as a weighted sum of its terms, learned online: least squares in relative error, forgetting
    (Åström and Wittenmark 2008, *Adaptive control*, section 2.2, in information form), no weight below zero.

    guess: weights to begin with; `likely`: terms of a few likely calls, at which the guess keeps counting as `TRUST`
    measured calls each, so that terms without new measurements stay near it instead of drifting off.
    """

    def __init__(self, guess: Sequence[float], likely: Sequence[Sequence[float]]):
        # Every term is brought to about one, or the sweeps below would crawl.
        self.scale = [max(terms[index] for terms in likely) for index in range(len(guess))]
        self.weights = [weight * scale for weight, scale in zip(guess, self.scale)]
        count = range(len(guess))
        self.prior = [[0.0] * len(guess) for _ in count], [0.0] * len(guess)
        self.sums = [[0.0] * len(guess) for _ in count], [0.0] * len(guess)
        for terms in likely:
            self._add(self.prior, terms, self.predict(terms), TRUST)

    def predict(self, terms: Sequence[float]) -> float:
        """Return the seconds expected; never below a microsecond."""
        seconds = 0.0
        for weight, term, scale in zip(self.weights, terms, self.scale):
            seconds += weight * term / scale
        return max(1e-6, seconds)

    def learn(self, terms: Sequence[float], seconds: float) -> None:
        """Take in one measured call."""
        if seconds <= 0:
            return
        matrix, vector = self.sums
        for index, row in enumerate(matrix):
            matrix[index] = [FORGETTING * value for value in row]
            vector[index] *= FORGETTING
        self._add(self.sums, terms, seconds, 1.0)
        self._sweep()

    def _add(self, sums: tuple[list, list], terms: Sequence[float], seconds: float, weight: float) -> None:
        # Divided by what was measured: a prefill must not outweigh a hundred steps, nor a call in which the machine
        # stood still a hundred others.
        x = [term / scale / seconds for term, scale in zip(terms, self.scale)]
        for row, left in enumerate(x):
            for column, right in enumerate(x):
                sums[0][row][column] += weight * left * right
            sums[1][row] += weight * left

    def _sweep(self) -> None:
        """Move each weight in turn to its best value of at least zero, from where they stand."""
        rows = [[p + s for p, s in zip(*pair)] for pair in zip(self.prior[0], self.sums[0])]
        goals = [p + s for p, s in zip(self.prior[1], self.sums[1])]
        for _ in range(SWEEPS):
            for index, (row, goal) in enumerate(zip(rows, goals)):
                rest = -row[index] * self.weights[index]
                for value, weight in zip(row, self.weights):
                    rest += value * weight
                self.weights[index] = max(0.0, (goal - rest) / row[index])


class Adaptive:
    """The largest batch predicted to keep the objective per token, and no prefill that costs more than it saves.

    `single` are the times of one request alone (seconds of its prefill and of a step, prompt tokens): the first guess
    of the step-time model, and what the objectives were set from. `size` is the present limit.
    """

    name = "adaptive"

    def __init__(self, objectives: Objectives, single: Single, *, headroom: float = 0.1, most: int = MOST_ROWS):
        if not 0 <= headroom <= SEARCH_SPACE["headroom"]["range"][1]:
            raise UserError(f"adaptive_batch_sizes: headroom {headroom}; expected 0 <= headroom <= 0.5")
        self.objectives, self.headroom, self.most = objectives, headroom, most
        step, prompt = single.step_seconds, single.prompt_tokens
        # Before anything is seen: a step of one row, a seventh of it per row; a prefill in proportion to its tokens.
        self.steps = StepModel([0.85 * step, 0.15 * step, 0.0], [(1, batch, batch * prompt) for batch in (1, 4, 16)])
        self.reads = StepModel([0.0, single.prefill_seconds / prompt, 0.0], [_read_terms(1, prompt), _read_terms(4, 1)])
        self.leaving = 0.0  # seconds that taking a row out takes
        self.size, self.requested = 1, 0

    def decide(self, view: View) -> Decision:
        near = list_head(view.waiting, LOOK_AHEAD)
        requests = [outcome.request for outcome in view.running] + near
        prompt = sum(request.prompt_tokens for request in near) / len(near)
        answer = sum(request.new_tokens for request in requests) / len(requests)
        context = max(view.context, max(request.prompt_tokens for request in near)) + answer / 2
        self._resize(context, prompt, answer, view.batching)
        count = min(self.size - len(view.running), view.room)
        if count <= 0:
            return Decision(0)
        return Decision(self._worthwhile(view, count, context) if view.running else count)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        if step.kind == "decode":
            self.steps.learn((1, step.batch, step.batch * step.tokens), step.seconds)
        elif step.kind == "leave":
            self.leaving += 0.1 * (step.seconds - self.leaving)
        else:
            self.reads.learn(_read_terms(step.batch, step.tokens), step.seconds)

    def step_seconds(self, batch: int, context: float) -> float:
        """Return the predicted seconds of a decode step."""
        return self.steps.predict((1, batch, batch * context))

    def largest(self, budget: float, context: float, prompt: float, answer: float, batching: str = "iteration") -> int:
        """Return the largest batch whose predicted seconds per token stay within `budget`; at least 1.

        context: of the batch; prompt, answer: mean tokens of the requests at hand.

        While a row lives, about as many others join as the batch has rows, and each join's prefill stops it.
        """
        fixed = self.step_seconds(0, context)
        each = self.step_seconds(1, context) - fixed
        if batching == "iteration":
            each += (self.reads.predict(_read_terms(1, prompt)) + self.leaving) / answer
        return int(min(self.most, max(1.0, (budget - fixed) / max(each, 1e-9))))

    def _resize(self, context: float, prompt: float, answer: float, batching: str) -> None:
        """Shrink when the present size is predicted to miss the objective, grow when a larger one keeps some room."""
        objective = self.objectives.token_seconds
        if self.size > (most := self.largest(objective, context, prompt, answer, batching)):
            self.size, self.requested = most, 0
            return
        target = self.largest(objective * (1 - self.headroom), context, prompt, answer, batching)
        self.requested = self.requested + 1 if target > self.size else 0
        if self.requested >= PATIENCE:
            self.size, self.requested = min(target, 2 * self.size), 0

    def _worthwhile(self, view: View, count: int, context: float) -> int:
        """Return how many of at most `count` to admit so that most requests keep their objectives.

        Every admission stops the rows under way for one prefill; a row is pushed over when that takes more than what it
        has left. Against it stand the waiting whose time to first token would be missed by waiting a little longer.
        """
        seconds = self.step_seconds(len(view.running) + count, context)
        slack = sorted(self._slack(outcome, view.now, seconds) for outcome in view.running)
        slack = [rest for rest in slack if rest >= 0]  # what is lost already cannot be lost again
        best, gained = 0, 0
        longest = 0
        for admitted, request in enumerate(list_head(view.waiting, count), start=1):
            longest = max(longest, request.prompt_tokens)
            read = self.reads.predict(_read_terms(admitted, longest))
            pushed = sum(rest < read for rest in slack)
            due = [
                request.arrival + self.objectives.first_token_seconds - view.now
                for request in list_head(view.waiting, admitted)
            ]
            saved = sum(read <= rest < read + 8 * seconds for rest in due)
            if saved - pushed >= gained:
                best, gained = admitted, saved - pushed
        return best

    def _slack(self, outcome: RequestOutcome, now: float, seconds: float) -> float:
        """Return the seconds for which a row can still be stopped and keep its objective."""
        length, first = outcome.request.new_tokens, now if outcome.first is None else outcome.first
        return (length - 1) * self.objectives.token_seconds - (now - first) - (length - outcome.produced) * seconds


def list_head(items: Sequence, count: int) -> list:
    """Return the first `count` items of a sequence that cannot be sliced (a deque)."""
    return [items[index] for index in range(min(count, len(items)))]


def _read_terms(count: int, tokens: float) -> tuple[float, float, float]:
    return 1.0, count * tokens, count * tokens**2


def rivals(size: int, ours: Callable[[], Policy], objective: Objectives) -> dict[str, Callable[[], Policy]]:
    """Return the policies to compare, as functions that make a new one: the fixed `size` first, `ours` last.

    The time-out policy gathers up to four requests for at most a quarter of the first-token objective.
    """
    return {
        f"fixed {size}": lambda: FixedSize(size),
        "time-out": lambda: Timeout(size, min(4, size), objective.first_token_seconds / 4),
        "AIMD": lambda: AimdSize(objective),
        "adaptive": ours,
    }


# --- hindsight --------------------------------------------------------------------------------------------------------


def best_fixed(
    traces: Sequence[Trace], objective: Objectives, run: Callable[[Trace, Policy], Served], sizes: Sequence[int]
) -> tuple[int, dict[int, float]]:
    """Return the fixed size with the highest mean goodput over `traces` in hindsight, and the goodput of every size.

    Every size serves the first two traces, the five best of them all the others too; of equals the smaller one wins,
    since it holds less memory. The goodput of the other sizes is that of two traces.
    """
    first, rest = traces[:2], traces[2:]
    goodputs = {size: [goodput(run(trace, FixedSize(size)), objective) for trace in first] for size in sizes}
    for size in sorted(goodputs, key=lambda size: (-float(np.mean(goodputs[size])), size))[:FINALISTS]:
        goodputs[size] += [goodput(run(trace, FixedSize(size)), objective) for trace in rest]
    finalists = [size for size in goodputs if len(goodputs[size]) == len(traces)]
    means = {size: float(np.mean(values)) for size, values in goodputs.items()}
    return max(finalists, key=lambda size: (means[size], -size)), means


def best_schedule(
    trace: Trace,
    objective: Objectives,
    run: Callable[[Trace, Policy], Served],
    sizes: Sequence[int],
    start: int,
    rounds: int = 2,
) -> tuple[Scheduled, float]:
    """Return the oracle: a size for each phase, found in hindsight by coordinate ascent from the fixed size `start`.

    It knows the phases and the future; being a search, it is a lower bound of what an oracle could do.
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
