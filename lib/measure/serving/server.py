"""One server loop: a queue, a batch under way, and a policy that decides who joins it. Clock and engine are injected,
so the same loop serves a real model in real time, a simulation, and the tests.

The loop alone keeps the memory bound: a request is admitted only if the cache fits even when every row under way
reaches its full length, so no policy can run out of memory. Every run ends: requests that still wait when the drain
time is over stay unserved, and the run counts as saturated. Knows nothing of how a policy decides, nor of tokens.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lib.errors import UserError
from lib.measure.serving.traffic import ServingRequest, Trace

BATCHINGS = ("iteration", "request")
MOST_ROWS = 32


@dataclass(frozen=True)
class Limits:
    """What the server can hold, and for how long a request keeps its place in the queue; the same for every policy.

    rows: at once; cache_bytes: of cache at `bytes_per_token` (None: no bound). A request that has waited for more than
    `patience_seconds` is served after all others (None: never), as by a server whose clients have given up (Triton's
    queue policy, time-out action DELAY).
    """

    rows: int = MOST_ROWS
    cache_bytes: float | None = None
    bytes_per_token: float = 0
    patience_seconds: float | None = None


@dataclass
class RequestOutcome:
    """What became of a request; times in seconds of the trace, None for a stage that was not reached."""

    request: ServingRequest
    admitted: float | None = None
    first: float | None = None
    finished: float | None = None
    produced: int = 0

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first is None else self.first - self.request.arrival

    @property
    def latency_seconds(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finished is None else self.finished - self.request.arrival

    @property
    def token_seconds(self) -> float | None:
        """Mean seconds per output token behind the first; None while unfinished, 0 for an answer of one token."""
        if self.first is None or self.finished is None:
            return None
        return (self.finished - self.first) / max(1, self.request.new_tokens - 1)


class ServerStep(NamedTuple):
    """One call of the engine: `prefill`, `decode` or `leave` of `batch` rows.

    `tokens` is the longest prompt of a prefill, else the longest context. `waiting`, `running`: rows then.
    """

    start: float
    kind: str
    batch: int
    tokens: int
    seconds: float
    waiting: int
    running: int


@dataclass(frozen=True)
class View:
    """What a policy sees. `waiting`: the requests still in time, or the late ones where there are no others; `room`:
    how many from its head the limits would admit now; `context`: the longest of the rows under way, in tokens.
    """

    now: float
    waiting: Sequence[ServingRequest]
    running: Sequence[RequestOutcome]
    room: int
    context: int
    batching: str


@dataclass(frozen=True)
class Decision:
    """How many to admit from the head of the queue; with 0 and nothing running, decide again at `wait_until`."""

    admit: int
    wait_until: float | None = None


class Policy(Protocol):
    """Decides while requests wait and rows may join (`decide`), and is shown every step (`observe`)."""

    @property
    def name(self) -> str: ...

    def decide(self, view: View) -> Decision: ...

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None: ...


class Engine(Protocol):
    """Serves rows; `prefill`, `decode` and `leave` return the seconds they took, `bytes` is what the cache holds."""

    @property
    def bytes(self) -> float: ...

    def clear(self) -> None: ...

    def prefill(self, requests: Sequence[ServingRequest]) -> float: ...

    def decode(self) -> float: ...

    def leave(self, ids: Sequence[int]) -> float: ...


class Clock(Protocol):
    """Tells the second of the trace; `advance` is for the seconds of work, `wait_until` for idle time."""

    def now(self) -> float: ...

    def advance(self, seconds: float) -> None: ...

    def wait_until(self, second: float) -> None: ...


@dataclass
class Served:
    """One run: an outcome per request, every step, and whether the server fell behind for good (`saturated`)."""

    trace: Trace
    policy: str
    outcomes: list[RequestOutcome]
    steps: list[ServerStep] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    saturated: bool = False
    end: float = 0.0
    peak_bytes: float = 0.0


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


class RealClock:
    """The wall clock from the moment it is made. Work has already taken its time when it is reported."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def advance(self, seconds: float) -> None:
        pass

    def wait_until(self, second: float) -> None:
        time.sleep(max(0.0, second - self.now()))


def serve(
    trace: Trace,
    policy: Policy,
    engine: Engine,
    clock: Clock,
    limits: Limits,
    *,
    batching: str = "iteration",
    drain_seconds: float | None = None,
) -> Served:
    """Serve `trace` and return what happened.

    batching: "iteration", rows join and leave between any two steps; "request", a batch is formed when the one before
    is over, and its finished rows keep their place. `drain_seconds` after the last arrival's phase the run is cut off
    (by default half the trace, at least a second). Raises UserError for an unknown batching.
    """
    if batching not in BATCHINGS:
        raise UserError(f'serving: batching "{batching}"; expected one of {", ".join(BATCHINGS)}')
    outcomes = [RequestOutcome(request) for request in trace.requests]
    loop = _Loop(Served(trace, policy.name, outcomes), policy, engine, clock, batching)
    served, running = loop.served, loop.running
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
        if now > last:
            served.saturated = bool(waiting or running or arriving)
            break
        if not waiting and not running:
            if not arriving:
                break
            clock.wait_until(arriving[0].arrival)
            continue
        decision = Decision(0)
        if waiting and not (batching == "request" and running):
            room = fits(limits, running, waiting, batching)
            if room:
                context = max((row.request.prompt_tokens + row.produced for row in running), default=0)
                decision = policy.decide(View(now, waiting, running, room, context, batching))
            count = min(decision.admit, room)
            if count > 0:
                chosen = [outcomes[waiting.popleft().id] for _ in range(count)]
                loop.admit(chosen, len(prompt) + len(late))
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
    """A run under way. `done` counts rows of a request-level batch that are over but still hold their place."""

    served: Served
    policy: Policy
    engine: Engine
    clock: Clock
    batching: str
    running: list[RequestOutcome] = field(default_factory=list)
    done: int = 0

    def admit(self, chosen: list[RequestOutcome], waiting: int) -> None:
        """Read the prompts of `chosen`; each gets its first token."""
        start = self.clock.now()
        seconds = self.engine.prefill([outcome.request for outcome in chosen])
        self.clock.advance(seconds)
        now = self.clock.now()
        for outcome in chosen:
            outcome.admitted, outcome.first, outcome.produced = start, now, 1
        self.running.extend(chosen)
        longest = max(outcome.request.prompt_tokens for outcome in chosen)
        step = ServerStep(start, "prefill", len(chosen), longest, seconds, waiting, len(self.running))
        self._after(step, chosen)

    def decode(self, waiting: int) -> None:
        """Produce one token of every row."""
        start = self.clock.now()
        seconds = self.engine.decode()
        self.clock.advance(seconds)
        for row in self.running:
            row.produced += 1
        context = max(row.request.prompt_tokens + row.produced for row in self.running)
        rows = len(self.running)
        self._after(ServerStep(start, "decode", rows, context, seconds, waiting, rows), self.running)

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
