"""Adaptive batch sizes: decide at every step how many requests a server decodes together.

A larger batch produces more tokens per second, but each of them later. The right size depends on the load and on the
lengths of requests, and both change. The policy learns an online model of step time T(rows, context) and of prefill
time while serving. It takes the largest batch predicted to keep the time per token, with hysteresis (the *cap*), and
admits no request whose prompt would push more rows beyond their objective than it saves (the *admission rule*). A
variant also reads prompts in parts that share steps with decoding, if that pushes fewer rows; parts take longer than
the whole prompt, and all waiting requests pay for it. The idea is that of Pang et al. 2025, arXiv 2503.05248: memory-
and latency-aware dynamic batching. The other policies are in `rivals`.

The model's weights do not change, and it produces the same tokens, up to the rounding of a different batch size. The
server loop enforces the memory bound for every policy.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lib.errors import UserError
from lib.measure.serving.protocol import MOST_ROWS, Decision, RequestOutcome, ServerStep, View
from lib.measure.serving.slo import FACTORS, Objectives, Single
from lib.measure.serving.traffic import ServingRequest
from lib.models.decoding import batch_cache
from lib.optimizations.adaptive_batch_sizes.step_model import StepModel

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
LOOK_AHEAD = 8  # waiting requests whose lengths count
PATIENCE = 3  # decisions in a row that must ask for a larger batch before it grows
SOON = 8  # steps: a request that would be late after this many more is saved by being admitted now
CHUNKS = (32, 64, 128)  # prompt tokens that may share a step
MOST_OVERHEAD = 1.25  # largest time of reading in parts ÷ at once: later requests wait for it too
GUESSED, LEARNED = 32.0, 1 / 16  # a blind policy's first guess of the answer length; weight of each new length


def applies_to(model: nn.Module) -> str | None:
    """Return None if rows can join this model's running batch, else the reason why not."""
    return batch_cache.joinable(model)


class Adaptive:
    """A policy that takes the largest batch predicted to keep the objective per token, and no prompt that costs more
    than it saves.

    `single` holds the times of one request alone (seconds of its prefill and of a step, prompt tokens), the first guess
    of the step-time model. `size` is the present limit. blind: the length of an answer is unknown until it ends, and
    estimated as the running mean of finished answers. cap, admission, chunked: which parts of the policy are active;
    without `cap` it admits up to `most` rows, without `admission` as many as the cap allows.
    """

    def __init__(
        self,
        objectives: Objectives,
        single: Single,
        *,
        headroom: float = 0.1,
        most: int = MOST_ROWS,
        blind: bool = False,
        cap: bool = True,
        admission: bool = True,
        chunked: bool = False,
        name: str = "adaptive",
    ):
        if not 0 <= headroom <= SEARCH_SPACE["headroom"]["range"][1]:
            raise UserError(f"adaptive_batch_sizes: headroom {headroom}; expected 0 <= headroom <= 0.5")
        self.objectives, self.headroom, self.most, self.name = objectives, headroom, most, name
        self.blind, self.cap, self.admission, self.chunks = blind, cap, admission, CHUNKS if chunked else ()
        step, prompt = single.step_seconds, single.prompt_tokens
        # First guess: 15 % of a one-row step scales with the rows, and a prefill is proportional to its tokens.
        self.steps = StepModel([0.85 * step, 0.15 * step, 0.0], [(1, batch, batch * prompt) for batch in (1, 4, 16)])
        self.reads = StepModel([0.0, single.prefill_seconds / prompt, 0.0], [_read_terms(1, prompt), _read_terms(4, 1)])
        self.leaving = 0.0  # seconds to remove a row
        self.size, self.requested = 1, 0
        self.answer = GUESSED  # mean tokens of the answers that have ended
        self.chunk: int | None = None  # prompt tokens per shared step, for the prompts being read

    def decide(self, view: View) -> Decision:
        near = list_head(view.waiting, LOOK_AHEAD)
        prompt = sum(request.prompt_tokens for request in near) / len(near)
        lengths = [self._length(row.request, row.produced) for row in view.running] + [self._length(r) for r in near]
        answer = sum(lengths) / len(lengths)
        context = max(view.context, max(request.prompt_tokens for request in near)) + answer / 2
        if self.cap:
            self._resize(context, prompt, answer, view.batching)
        else:
            self.size = self.most
        count = min(self.size - view.rows, view.room)
        if count <= 0:
            return Decision(0, chunk=self.chunk)
        if not self.admission or not view.running:
            return Decision(count, chunk=self.chunk)
        admitted, self.chunk = self._worthwhile(view, count, context)
        return Decision(admitted, chunk=self.chunk)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        for outcome in finished:
            self.answer += LEARNED * (outcome.request.new_tokens - self.answer)
        if step.kind == "decode":
            self.steps.learn((1, step.batch, step.batch * step.tokens), step.seconds)
        elif step.kind == "leave":
            self.leaving += 0.1 * (step.seconds - self.leaving)
        elif step.kind == "prefill":
            self.reads.learn(_read_terms(step.batch, step.tokens), step.seconds)
        elif step.read:  # a shared step: its seconds beyond decoding
            decoding = self.step_seconds(step.batch, step.tokens) if step.batch else 0.0
            self.reads.learn(_read_terms(1, step.read), step.seconds - decoding)

    def step_seconds(self, batch: int, context: float) -> float:
        """Return the predicted seconds of a decode step."""
        return self.steps.predict((1, batch, batch * context))

    def largest(self, budget: float, context: float, prompt: float, answer: float, batching: str = "iteration") -> int:
        """Return the largest batch whose predicted seconds per token stay within `budget`; at least 1.

        context: tokens of context in the batch; prompt, answer: mean tokens of the requests at hand.

        While a row is decoded, about as many others join as the batch has rows, and the prefill of each stalls it.
        """
        fixed = self.step_seconds(0, context)
        each = self.step_seconds(1, context) - fixed
        if batching == "iteration":
            each += (self.reads.predict(_read_terms(1, prompt)) + self.leaving) / answer
        return int(min(self.most, max(1.0, (budget - fixed) / max(each, 1e-9))))

    def _length(self, request: ServingRequest, produced: int = 0) -> float:
        """Return the number of tokens that the policy expects of an answer."""
        return max(self.answer, produced + 1.0) if self.blind else request.new_tokens

    def _resize(self, context: float, prompt: float, answer: float, batching: str) -> None:
        """Shrink if the present size is predicted to miss the objective, grow if a larger one leaves the headroom."""
        objective = self.objectives.token_seconds
        if self.size > (most := self.largest(objective, context, prompt, answer, batching)):
            self.size, self.requested = most, 0
            return
        target = self.largest(objective * (1 - self.headroom), context, prompt, answer, batching)
        self.requested = self.requested + 1 if target > self.size else 0
        if self.requested >= PATIENCE:
            self.size, self.requested = min(target, 2 * self.size), 0

    def _worthwhile(self, view: View, count: int, context: float) -> tuple[int, int | None]:
        """Return how many requests, at most `count`, to admit so that most keep their objectives, and the tokens per
        part in which their prompts are read (None: at once).

        Every admission stalls the running rows for one prefill; if it is read in parts, a row waits for at most as many
        parts as it has tokens left. A row is pushed over its objective if this wait exceeds its slack. The gain is the
        number of waiting requests that would miss their time to first token by waiting a little longer.
        """
        seconds = self.step_seconds(view.rows + count, context)
        rows = [(self._slack(row, view.now, seconds), self._left(row)) for row in view.running]
        rows = [(rest, left) for rest, left in rows if rest >= 0]  # the others are late already
        unread = sum(row.request.prompt_tokens - row.read for row in view.reading)
        options: Sequence[int | None] = (self.chunk,) if view.reading else (None, *self.chunks)
        if view.batching != "iteration":
            options = (None,)
        best: tuple[int, int | None] = 0, self.chunk if view.reading else None
        gained, longest, tokens = 0.0, 0, unread
        for admitted, request in enumerate(list_head(view.waiting, count), start=1):
            longest, tokens = max(longest, request.prompt_tokens), tokens + request.prompt_tokens
            due = [
                waiting.arrival + self.objectives.first_token_seconds - view.now
                for waiting in list_head(view.waiting, admitted)
            ]
            values: list[float] = []
            whole = self.reads.predict(_read_terms(admitted, longest))
            for chunk in options:
                parts = math.ceil(tokens / chunk) if chunk else 1
                read = self.reads.predict(_read_terms(1, chunk)) if chunk else whole
                if chunk and not view.reading and read * tokens / chunk > MOST_OVERHEAD * whole:
                    values.append(-math.inf)
                    continue
                first = parts * (read + seconds) if chunk else read
                pushed = sum(rest < min(left, parts) * read for rest, left in rows)
                values.append(sum(first <= rest < first + SOON * seconds for rest in due) - pushed)
            if max(values) >= gained:
                gained = max(values)
                best = admitted, options[values.index(gained)]
        return best

    def _left(self, row: RequestOutcome) -> float:
        """Return the number of tokens that a row has yet to produce."""
        return self._length(row.request, row.produced) - row.produced

    def _slack(self, row: RequestOutcome, now: float, seconds: float) -> float:
        """Return the seconds for which a row can be stalled and still keep its objective."""
        length, first = self._length(row.request, row.produced), now if row.first is None else row.first
        return (length - 1) * self.objectives.token_seconds - (now - first) - (length - row.produced) * seconds


def list_head(items: Sequence, count: int) -> list:
    """Return the first `count` items of a sequence that cannot be sliced (a deque)."""
    return [items[index] for index in range(min(count, len(items)))]


def _read_terms(count: int, tokens: float) -> tuple[float, float, float]:
    return 1.0, count * tokens, count * tokens**2
