"""One server loop: a queue, a batch under way, and a policy that decides who joins it. Clock and engine are injected,
so the same loop serves a real model in real time, a simulation, and the tests.

The loop alone keeps the memory bound: a request is admitted only if the cache fits even when every row under way
reaches its full length, so no policy can run out. It never runs on without end: what is still waiting when the drain
time is over stays unserved, and the run counts as saturated. Knows nothing of how a policy decides, nor of tokens.

A policy has `decide(view) -> Decision`, called while requests wait and rows may join, and `observe(step, finished)`,
called after every step. An engine has `prefill(requests)`, `decode()`, `leave(ids)` and `clear()`, each returning the
seconds it took, and `bytes`. A clock has `now()`, `advance(seconds)` (of work) and `wait_until(second)`.
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

    rows: at once; cache_bytes: of cache at `bytes_per_token` (None: no bound). Who has waited for more than
    `patience_seconds` is served after all others (None: never), as a server does whose clients have given up (Triton's
    queue policy, time-out action DELAY).
    """

    rows: int = MOST_ROWS
    cache_bytes: float | None = None
    bytes_per_token: float = 0
    patience_seconds: float | None = None


@dataclass
class RequestOutcome:
    """What became of a request; times in seconds of the trace, None where it did not come to that."""

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
    """What a policy sees. `waiting` are those still in time; the late, where there is nobody else. `room`
    is how many from its head the limits would admit now."""

    now: float
    waiting: Sequence[ServingRequest]
    running: Sequence[RequestOutcome]
    room: int
    context: int
    batching: str


@dataclass(frozen=True)
class Decision:
    """Admit so many from the head of the queue; or none, and (with nothing running) look again at `wait_until`."""

    admit: int
    wait_until: float | None = None


class Policy(Protocol):
    name: str

    def decide(self, view: View) -> Decision: ...

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None: ...


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
    engine: object,
    clock: object,
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
    served = Served(trace, policy.name, outcomes)
    arriving, prompt, late = deque(trace.requests), deque(), deque()
    patience = math.inf if limits.patience_seconds is None else limits.patience_seconds
    running: list[RequestOutcome] = []
    done = 0  # rows of a request-level batch that are over but still hold their place
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
                context = max((one.request.prompt_tokens + one.produced for one in running), default=0)
                decision = policy.decide(View(now, waiting, running, room, context, batching))
            count = min(decision.admit, room)
            if count > 0:
                chosen = [outcomes[waiting.popleft().id] for _ in range(count)]
                done = _admit(served, chosen, running, policy, engine, clock, len(prompt) + len(late), batching)
                continue
        if running:
            done = _decode(served, running, done, policy, engine, clock, len(prompt) + len(late), batching)
            continue
        _idle(decision, arriving, clock, now, policy)
    served.end = clock.now()
    return served


def _idle(decision: Decision, arriving: deque, clock: object, now: float, policy: Policy) -> None:
    """Let time pass until the policy wants to look again or another request arrives."""
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
    held = [one.request for one in running]
    prompt = max((one.prompt_tokens for one in held), default=0)
    new = max((one.new_tokens for one in held), default=0)
    columns = max((one.prompt_tokens + one.new_tokens for one in held), default=0)
    count = 0
    for request in waiting:
        prompt, new = max(prompt, request.prompt_tokens), max(new, request.new_tokens)
        columns = max(columns, request.prompt_tokens + request.new_tokens)
        wide = columns if batching == "iteration" else prompt + new
        if count >= most or (len(held) + count + 1) * wide * limits.bytes_per_token > limits.cache_bytes:
            break
        count += 1
    return count


def _admit(served, chosen, running, policy, engine, clock, waiting, batching) -> int:
    """Read the prompts of `chosen`; each gets its first token. Returns how many are over with that."""
    start = clock.now()
    seconds = engine.prefill([one.request for one in chosen])
    clock.advance(seconds)
    now = clock.now()
    for one in chosen:
        one.admitted, one.first, one.produced = start, now, 1
    running.extend(chosen)
    longest = max(one.request.prompt_tokens for one in chosen)
    step = ServerStep(start, "prefill", len(chosen), longest, seconds, waiting, len(running))
    return _after(served, step, chosen, running, 0, policy, engine, clock, batching)


def _decode(served, running, done, policy, engine, clock, waiting, batching) -> int:
    """Produce one token of every row. Returns how many rows of a request-level batch are over."""
    start = clock.now()
    seconds = engine.decode()
    clock.advance(seconds)
    for one in running:
        one.produced += 1
    context = max(one.request.prompt_tokens + one.produced for one in running)
    step = ServerStep(start, "decode", len(running), context, seconds, waiting, len(running))
    return _after(served, step, running, running, done, policy, engine, clock, batching)


def _after(served, step, touched, running, done, policy, engine, clock, batching) -> int:
    """Note the step and let finished rows go: at once, or, in request-level batching, when all are over."""
    served.steps.append(step)
    served.peak_bytes = max(served.peak_bytes, engine.bytes)
    now = clock.now()
    finished = [one for one in touched if one.finished is None and one.produced >= one.request.new_tokens]
    for one in finished:
        one.finished = now
    policy.observe(step, finished)
    done += len(finished)
    gone = [one for one in running if one.finished is not None] if finished else []
    if gone and (batching == "iteration" or done == len(running)):
        start = clock.now()
        seconds = engine.leave([one.request.id for one in gone])
        clock.advance(seconds)
        running[:] = [one for one in running if one.finished is None]
        done = 0
        left = ServerStep(start, "leave", len(gone), step.tokens, seconds, step.waiting, len(running))
        served.steps.append(left)
        policy.observe(left, ())
    return done
