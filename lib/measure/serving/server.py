"""One server loop: a queue, a batch under way, and a policy that decides who joins it. Clock and engine are injected,
so the same loop serves a real model, a simulation, and the tests.

The loop alone keeps the memory bound: a request is admitted only if the cache fits even when every row under way
reaches its full length, so no policy can run out of memory. A prompt is read at once, while the rows stand still, or,
where the policy says so, in parts that share steps with decoding (chunked prefill: Agrawal et al. 2024, Sarathi-Serve,
OSDI, section 4). Every run ends: requests that still wait when the drain time is over remain unserved, and the run
counts as saturated. Knows nothing of how a policy decides, nor of tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lib.errors import UserError
from lib.measure.serving.protocol import (
    BATCHINGS,
    Clock,
    Decision,
    Engine,
    Limits,
    Policy,
    RequestOutcome,
    Served,
    ServerStep,
    View,
    kept_of,
)
from lib.measure.serving.traffic import ServingRequest, Trace


class VirtualClock:
    """Time that passes only by work and by waiting: hours take seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return the second."""
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds

    def wait_until(self, second: float) -> None:
        self.time = max(self.time, second)


def serve(
    trace: Trace,
    policy: Policy,
    engine: Engine,
    clock: Clock,
    limits: Limits,
    *,
    batching: str = "iteration",
    drain_seconds: float | None = None,
    kept: int = 0,
    aside: Callable[[int, int], float] | None = None,
) -> Served:
    """Serve `trace` and return what happened.

    batching: "iteration", rows join and leave between any two steps; "request", a batch is formed when the one before
    is over, and its finished rows keep their place. `drain_seconds` after the last arrival's phase the run is cut off
    (by default half the trace, at least a second). `kept`: first tokens of longer prompts that the engine need not read
    (`protocol.kept_of`). `aside(waiting, running)`: work beside the requests, asked before each decision; it does what
    is due beside so many requests and rows and returns its seconds (0: nothing was). Raises UserError for an unknown
    batching.
    """
    if batching not in BATCHINGS:
        raise UserError(f'serving: batching "{batching}"; expected one of {", ".join(BATCHINGS)}')
    outcomes = [RequestOutcome(request) for request in trace.requests]
    loop = _Loop(Served(trace, policy.name, outcomes), policy, engine, clock, batching, kept)
    served, running, reading = loop.served, loop.running, loop.reading
    arriving, prompt, late = deque(trace.requests), deque[ServingRequest](), deque[ServingRequest]()
    patience = math.inf if limits.patience_seconds is None else limits.patience_seconds
    last = trace.seconds + (max(1.0, trace.seconds / 2) if drain_seconds is None else drain_seconds)
    engine.clear()
    while True:
        now = clock.now()
        while arriving and arriving[0].arrival <= now:
            request = arriving.popleft()
            if fits(limits, [], [request], batching) == 0:
                served.refused.append(request.id)
            else:
                prompt.append(request)
        while prompt and now - prompt[0].arrival > patience:
            late.append(prompt.popleft())
        waiting = prompt or late
        under_way = bool(running or reading)
        if now > last:
            served.saturated = bool(waiting or under_way or arriving)
            break
        if aside and loop.aside(aside, len(prompt) + len(late)):
            continue
        if not waiting and not under_way:
            if not arriving:
                break
            clock.wait_until(arriving[0].arrival)
            continue
        decision = Decision(0)
        if waiting and not (batching == "request" and under_way):
            room = fits(limits, [*running, *reading], waiting, batching)
            if room:
                context = max((row.request.prompt_tokens + row.produced for row in running), default=0)
                decision = policy.decide(View(now, waiting, running, room, context, batching, reading))
                loop.chunk = decision.chunk
            count = min(decision.admit, room)
            if count > 0:
                chosen = [outcomes[waiting.popleft().id] for _ in range(count)]
                loop.admit(chosen, len(prompt) + len(late))
                continue
        if reading:
            loop.shared(len(prompt) + len(late))
            continue
        if running:
            loop.decode(len(prompt) + len(late))
            continue
        _idle(decision, arriving, clock, now, policy)
    served.end = clock.now()
    return served


def _idle(decision: Decision, arriving: Sequence[ServingRequest], clock: Clock, now: float, policy: Policy) -> None:
    """Let time pass until the policy wants to decide again or another request arrives."""
    times = [arriving[0].arrival] if arriving else []
    times += [decision.wait_until] if decision.wait_until is not None else []
    if not times or min(times) <= now:
        raise UserError(f"{policy.name}: waits for nothing: nothing runs, nothing will arrive, and it admits nobody")
    clock.wait_until(min(times))


def fits(
    limits: Limits, running: Sequence[RequestOutcome], waiting: Sequence[ServingRequest], batching: str = "iteration"
) -> int:
    """Return how many from the head of `waiting` may join so that rows and cache stay within `limits` to the end.

    Rows are padded to the longest: the cache is (rows × columns × bytes per token), and the columns are bounded by the
    longest prompt plus answer of any row; where finished rows stay, by the longest prompt plus the longest answer.
    """
    most = limits.rows - len(running)
    if limits.cache_bytes is None:
        return max(0, min(most, len(waiting)))
    held = [row.request for row in running]
    prompt = max((request.prompt_tokens for request in held), default=0)
    new = max((request.new_tokens for request in held), default=0)
    columns = max((request.prompt_tokens + request.new_tokens for request in held), default=0)
    count = 0
    for request in waiting:
        prompt, new = max(prompt, request.prompt_tokens), max(new, request.new_tokens)
        columns = max(columns, request.prompt_tokens + request.new_tokens)
        wide = columns if batching == "iteration" else prompt + new
        if count >= most or (len(held) + count + 1) * wide * limits.bytes_per_token > limits.cache_bytes:
            break
        count += 1
    return count


@dataclass
class _Loop:
    """A run under way. `done` counts rows of a request-level batch that are over but still hold their place; `reading`
    are the admitted whose prompts are read `chunk` tokens at a time.
    """

    served: Served
    policy: Policy
    engine: Engine
    clock: Clock
    batching: str
    kept: int = 0
    running: list[RequestOutcome] = field(default_factory=list)
    reading: list[RequestOutcome] = field(default_factory=list)
    chunk: int | None = None
    done: int = 0

    def aside(self, work: Callable[[int, int], float], waiting: int) -> bool:
        """Do what is due beside the requests, which rows stand still for; return whether anything was."""
        start = self.clock.now()
        seconds = work(waiting, len(self.running))
        if not seconds:
            return False
        self.clock.advance(seconds)
        step = ServerStep(start, "aside", 0, 0, seconds, waiting, len(self.running))
        self.served.steps.append(step)
        self.policy.observe(step, ())
        return True

    def admit(self, chosen: list[RequestOutcome], waiting: int) -> None:
        """Read the prompts of `chosen`, each of which gets its first token; or begin to read them in parts."""
        start = self.clock.now()
        for outcome in chosen:
            outcome.admitted = start
        if self.reading or (self.chunk and self.running and self.batching == "iteration"):
            for outcome in chosen:
                outcome.read = kept_of(outcome.request, self.kept)
            self.reading.extend(chosen)
            return
        seconds = self.engine.prefill([outcome.request for outcome in chosen])
        self.clock.advance(seconds)
        self._begun(chosen)
        longest = max(outcome.request.prompt_tokens for outcome in chosen)
        step = ServerStep(start, "prefill", len(chosen), longest, seconds, waiting, len(self.running))
        self._after(step, chosen)

    def decode(self, waiting: int) -> None:
        """Produce one token of every row."""
        start = self.clock.now()
        seconds = self.engine.decode()
        self.clock.advance(seconds)
        self._produced(self.running)
        context = max(row.request.prompt_tokens + row.produced for row in self.running)
        rows = len(self.running)
        self._after(ServerStep(start, "decode", rows, context, seconds, waiting, rows), self.running)

    def shared(self, waiting: int) -> None:
        """Read the next part of the prompts, first come, first served, and produce one token of every row, if any."""
        left = self.chunk if self.chunk and self.running else math.inf
        parts: list[tuple[RequestOutcome, int]] = []
        for outcome in self.reading:
            if left <= 0:
                break
            count = int(min(left, outcome.request.prompt_tokens - outcome.read))
            parts.append((outcome, count))
            left -= count
        start, decoding = self.clock.now(), list(self.running)
        seconds = self.engine.shared([(outcome.request, count) for outcome, count in parts])
        self.clock.advance(seconds)
        self._produced(decoding)
        for outcome, count in parts:
            outcome.read += count
        through = [outcome for outcome, _ in parts if outcome.read >= outcome.request.prompt_tokens]
        self.reading[:] = [outcome for outcome in self.reading if outcome.read < outcome.request.prompt_tokens]
        self._begun(through)
        context = max((row.request.prompt_tokens + row.produced for row in decoding), default=0)
        read = sum(count for _, count in parts)
        step = ServerStep(start, "shared", len(decoding), context, seconds, waiting, len(self.running), read)
        self._after(step, [*decoding, *through])

    def _begun(self, chosen: Sequence[RequestOutcome]) -> None:
        """Note the first token of `chosen`, which join the rows."""
        now = self.clock.now()
        for outcome in chosen:
            outcome.first = outcome.last = now
            outcome.produced, outcome.read = 1, outcome.request.prompt_tokens
        self.running.extend(chosen)

    def _produced(self, rows: Sequence[RequestOutcome]) -> None:
        """Note one more token of `rows`, and how long after the one before it came."""
        now, warm_up = self.clock.now(), self.served.trace.warm_up
        for row in rows:
            row.produced += 1
            if row.finished is None:
                if row.last is not None and row.request.arrival >= warm_up:
                    self.served.gaps.append(now - row.last)
                row.last = now

    def _after(self, step: ServerStep, touched: Sequence[RequestOutcome]) -> None:
        """Note the step and let finished rows go: at once, or, in request-level batching, when all are over."""
        self.served.steps.append(step)
        self.served.peak_bytes = max(self.served.peak_bytes, self.engine.bytes)
        now = self.clock.now()
        finished = [row for row in touched if row.finished is None and row.produced >= row.request.new_tokens]
        for row in finished:
            row.finished = now
        self.policy.observe(step, finished)
        self.done += len(finished)
        gone = [row for row in self.running if row.finished is not None] if finished else []
        if gone and (self.batching == "iteration" or self.done == len(self.running)):
            self._leave(gone, step)

    def _leave(self, gone: Sequence[RequestOutcome], step: ServerStep) -> None:
        start = self.clock.now()
        seconds = self.engine.leave([row.request.id for row in gone])
        self.clock.advance(seconds)
        self.running[:] = [row for row in self.running if row.finished is None]
        self.done = 0
        leave = ServerStep(start, "leave", len(gone), step.tokens, seconds, step.waiting, len(self.running))
        self.served.steps.append(leave)
        self.policy.observe(leave, ())
