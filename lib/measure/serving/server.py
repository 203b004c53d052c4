"""The server loop: a queue, a running batch, and a policy that decides which requests join it. Clock and engine are
injected, so the same loop serves a real model, a simulation, and the tests.

The loop itself enforces the memory bound: a request is admitted only if the cache fits even when every running row
reaches its full length, so no policy can run out of memory. A prompt is read at once, while the rows wait, or, if the
policy asks for it, in parts that share steps with decoding (chunked prefill: Agrawal et al. 2024, Sarathi-Serve, OSDI,
section 4). Every run ends: requests that still wait after the drain time remain unserved, and the run counts as
saturated. Knows nothing about tokens or how a policy decides.
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
    """A clock that only work and waiting advance, so that hours of traffic take seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return the time in seconds."""
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
    """Serve `trace` and return the outcome.

    With `batching` "iteration", rows join and leave between any two steps; with "request", a new batch is formed when
    the previous one is finished, and finished rows keep their place until then. `drain_seconds` after the end of the
    trace the run is cut off (by default half the trace, at least a second). `kept` is the number of first tokens of
    longer prompts that the engine need not read (`protocol.kept_of`). `aside(waiting, running)` does other work that is
    due, given the numbers of waiting requests and running rows; it is called before each decision and returns its
    seconds (0: nothing was due). Raises UserError for an unknown batching, and for a policy that waits forever.
    """
    if batching not in BATCHINGS:
        raise UserError(f'serving: batching "{batching}"; expected one of {", ".join(BATCHINGS)}')
    outcomes = [RequestOutcome(request) for request in trace.requests]
    loop = _Loop(Served(trace, policy.name, outcomes), policy, engine, clock, batching, kept)
    served, running, reading = loop.served, loop.running, loop.reading
    arriving, in_time, late = deque(trace.requests), deque[ServingRequest](), deque[ServingRequest]()
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
                in_time.append(request)
        while in_time and now - in_time[0].arrival > patience:
            late.append(in_time.popleft())
        waiting = in_time or late
        busy = bool(running or reading)
        if now > last:
            served.saturated = bool(waiting or busy or arriving)
            break
        if aside and loop.aside(aside, len(in_time) + len(late)):
            continue
        if not waiting and not busy:
            if not arriving:
                break
            clock.wait_until(arriving[0].arrival)
            continue
        decision = Decision(0)
        if waiting and not (batching == "request" and busy):
            room = fits(limits, [*running, *reading], waiting, batching)
            if room:
                context = max((row.request.prompt_tokens + row.produced for row in running), default=0)
                decision = policy.decide(View(now, waiting, running, room, context, batching, reading))
                loop.chunk = decision.chunk
            count = min(decision.admit, room)
            if count > 0:
                chosen = [outcomes[waiting.popleft().id] for _ in range(count)]
                loop.admit(chosen, len(in_time) + len(late))
                continue
        if reading:
            loop.shared(len(in_time) + len(late))
            continue
        if running:
            loop.decode(len(in_time) + len(late))
            continue
        _idle(decision, arriving, clock, now, policy)
    served.end = clock.now()
    return served


def _idle(decision: Decision, arriving: Sequence[ServingRequest], clock: Clock, now: float, policy: Policy) -> None:
    """Pass idle time until the policy wants to decide again or another request arrives. Raises UserError if neither
    will happen.
    """
    times = [arriving[0].arrival] if arriving else []
    times += [decision.wait_until] if decision.wait_until is not None else []
    if not times or min(times) <= now:
        raise UserError(f"{policy.name}: waits for nothing: no row runs, no request will arrive, and it admits none")
    clock.wait_until(min(times))


def fits(
    limits: Limits, running: Sequence[RequestOutcome], waiting: Sequence[ServingRequest], batching: str = "iteration"
) -> int:
    """Return how many requests from the head of `waiting` may join so that rows and cache always stay within `limits`.

    Rows are padded to the longest: the cache takes rows × columns × bytes per token, and the columns are bounded by the
    longest prompt plus answer of any row or, if finished rows keep their place, by the longest prompt plus the longest
    answer.
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
    """The state of a run. `done` counts rows of a request-level batch that are finished but keep their place. `reading`
    holds admitted requests whose prompts are read `chunk` tokens at a time.
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
        """Do other work that is due, while the rows wait; return whether any was due."""
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
        """Admit `chosen`: read their prompts, which gives their first tokens, or begin to read them in parts."""
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
        """Decode one token of every row."""
        start = self.clock.now()
        seconds = self.engine.decode()
        self.clock.advance(seconds)
        self._produced(self.running)
        context = max(row.request.prompt_tokens + row.produced for row in self.running)
        rows = len(self.running)
        self._after(ServerStep(start, "decode", rows, context, seconds, waiting, rows), self.running)

    def shared(self, waiting: int) -> None:
        """Read the next part of the prompts, first come, first served, and decode one token of every row, if any."""
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
        complete = [outcome for outcome, _ in parts if outcome.read >= outcome.request.prompt_tokens]
        self.reading[:] = [outcome for outcome in self.reading if outcome.read < outcome.request.prompt_tokens]
        self._begun(complete)
        context = max((row.request.prompt_tokens + row.produced for row in decoding), default=0)
        read = sum(count for _, count in parts)
        step = ServerStep(start, "shared", len(decoding), context, seconds, waiting, len(self.running), read)
        self._after(step, [*decoding, *complete])

    def _begun(self, chosen: Sequence[RequestOutcome]) -> None:
        """Record the first tokens of `chosen`, which join the running rows."""
        now = self.clock.now()
        for outcome in chosen:
            outcome.first = outcome.last = now
            outcome.produced, outcome.read = 1, outcome.request.prompt_tokens
        self.running.extend(chosen)

    def _produced(self, rows: Sequence[RequestOutcome]) -> None:
        """Record one more token of `rows`, and the seconds since the previous one."""
        now, warm_up = self.clock.now(), self.served.trace.warm_up
        for row in rows:
            row.produced += 1
            if row.finished is None:
                if row.last is not None and row.request.arrival >= warm_up:
                    self.served.gaps.append(now - row.last)
                row.last = now

    def _after(self, step: ServerStep, touched: Sequence[RequestOutcome]) -> None:
        """Record the step and remove finished rows: at once or, in request-level batching, when all are finished."""
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
