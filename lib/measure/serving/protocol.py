"""The interface between a server, its policy, its engine and its clock: requests and their outcomes, steps, decisions,
limits. Plain data and the methods that each side has; nothing here acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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


def kept_of(request: ServingRequest, kept: int) -> int:
    """Return how many tokens of a prompt need not be read, where the cache of the first `kept` ones, which all longer
    prompts share, is kept (prefix caching); at least one token is always read.
    """
    return kept if request.prompt_tokens > kept else 0


def grouped(requests: Sequence[ServingRequest], kept: int) -> dict[int, list[ServingRequest]]:
    """Return the requests by `kept_of`, in order: a pass reads prompts that have as many tokens behind them."""
    groups: dict[int, list[ServingRequest]] = {}
    for request in requests:
        groups.setdefault(kept_of(request, kept), []).append(request)
    return groups


@dataclass
class RequestOutcome:
    """The outcome of a request; times in seconds of the trace, None for a stage that was not reached.

    `last` is the second of its newest token, `read` how many tokens of its prompt have been read.
    """

    request: ServingRequest
    admitted: float | None = None
    first: float | None = None
    finished: float | None = None
    produced: int = 0
    read: int = 0
    last: float | None = None

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
        """Mean seconds per output token after the first; None while unfinished, 0 for an answer of one token."""
        if self.first is None or self.finished is None:
            return None
        return (self.finished - self.first) / max(1, self.request.new_tokens - 1)


class ServerStep(NamedTuple):
    """One call of the engine: `prefill`, `decode`, `shared` or `leave` of `batch` rows; or work `aside` from them.

    `tokens` is the longest prompt of a prefill, else the longest context. `waiting`, `running`: rows then. `read`: the
    prompt tokens that a shared step read beside decoding `batch` rows.
    """

    start: float
    kind: str
    batch: int
    tokens: int
    seconds: float
    waiting: int
    running: int
    read: int = 0


@dataclass(frozen=True)
class View:
    """What a policy sees. `waiting`: the requests still in time, or the late ones where there are no others; `room`:
    how many from its head the limits would admit now; `context`: the longest of the rows under way, in tokens;
    `reading`: the admitted whose prompts are read in parts and not through yet.
    """

    now: float
    waiting: Sequence[ServingRequest]
    running: Sequence[RequestOutcome]
    room: int
    context: int
    batching: str
    reading: Sequence[RequestOutcome] = ()

    @property
    def rows(self) -> int:
        """Rows that are taken: those that decode, and those whose prompts are being read."""
        return len(self.running) + len(self.reading)


@dataclass(frozen=True)
class Decision:
    """How many to admit from the head of the queue; with 0 and nothing running, decide again at `wait_until`.

    `chunk`: where rows are under way, read the prompts in parts of at most so many tokens, each in one step with a
    token of every row (None: at once, while the rows stand still). It holds until the next decision.
    """

    admit: int
    wait_until: float | None = None
    chunk: int | None = None


class Policy(Protocol):
    """Decides while requests wait and rows may join (`decide`), and is shown every step (`observe`)."""

    @property
    def name(self) -> str: ...

    def decide(self, view: View) -> Decision: ...

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None: ...


class Engine(Protocol):
    """Serves rows; every method but `clear` returns the seconds it took, `bytes` is what the cache holds.

    `shared` decodes a token of every row and reads so many further tokens of each prompt named; a prompt that is read
    to its end joins the rows with its first token.
    """

    @property
    def bytes(self) -> float: ...

    def clear(self) -> None: ...

    def prefill(self, requests: Sequence[ServingRequest]) -> float: ...

    def decode(self) -> float: ...

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float: ...

    def leave(self, ids: Sequence[int]) -> float: ...


class Clock(Protocol):
    """Tells the second of the trace; `advance` is for the seconds of work, `wait_until` for idle time."""

    def now(self) -> float: ...

    def advance(self, seconds: float) -> None: ...

    def wait_until(self, second: float) -> None: ...


@dataclass
class Served:
    """One run: an outcome per request, every step, and whether the server fell behind for good (`saturated`).

    `gaps`: seconds between two tokens of a row, of the requests that count.
    """

    trace: Trace
    policy: str
    outcomes: list[RequestOutcome]
    steps: list[ServerStep] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    saturated: bool = False
    end: float = 0.0
    peak_bytes: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def counted(self) -> list[RequestOutcome]:
        """The outcomes of the requests that arrived after the warm-up."""
        return [outcome for outcome in self.outcomes if outcome.request.arrival >= self.trace.warm_up]
