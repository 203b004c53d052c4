"""The interface between a server, its policy, its engine and its clock: requests and their outcomes, steps, decisions,
limits. Contains only plain data and protocols.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lib.measure.serving.traffic import ServingRequest, Trace

BATCHINGS = ("iteration", "request")
MOST_ROWS = 32


@dataclass(frozen=True)
class Limits:
    """The server's capacity, and how long a request keeps its place in the queue; the same for every policy.

    `rows` is the largest number of rows at once, `cache_bytes` the largest cache, at `bytes_per_token` (None: no
    bound). A request that has waited longer than `patience_seconds` is served after all others (None: no limit), as by
    a server whose clients have given up (Triton's queue policy, time-out action DELAY).
    """

    rows: int = MOST_ROWS
    cache_bytes: float | None = None
    bytes_per_token: float = 0
    patience_seconds: float | None = None


def kept_of(request: ServingRequest, kept: int) -> int:
    """Return how many tokens of a prompt need not be read because their cache is kept (prefix caching): `kept`, which
    all longer prompts share, or 0 for a shorter prompt. At least one token is always read.
    """
    return kept if request.prompt_tokens > kept else 0


def grouped(requests: Sequence[ServingRequest], kept: int) -> dict[int, list[ServingRequest]]:
    """Return the requests grouped by `kept_of`, in order: one pass reads prompts with equally many cached tokens."""
    groups: dict[int, list[ServingRequest]] = {}
    for request in requests:
        groups.setdefault(kept_of(request, kept), []).append(request)
    return groups


@dataclass
class RequestOutcome:
    """The outcome of a request. Times are in seconds of the trace, None for a stage that was not reached.

    `last` is the time of its newest token, `read` the number of tokens of its prompt that have been read.
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
    """One call of the engine: `prefill`, `decode`, `shared` or `leave` of `batch` rows; or other work (`aside`).

    `tokens` is the longest prompt of a prefill, else the longest context. `waiting` counts requests in the queue and
    `running` rows at the time of the step. `read` counts the prompt tokens that a shared step read while it decoded
    `batch` rows.
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
    """What a policy sees. `waiting` holds the queued requests that are still in time, or the late ones if there are no
    others. `room` is how many from its head the limits would admit now. `context` is the longest context of the running
    rows, in tokens. `reading` holds the admitted requests whose prompts are being read in parts.
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
        """Number of occupied rows: those that decode, and those whose prompts are being read."""
        return len(self.running) + len(self.reading)


@dataclass(frozen=True)
class Decision:
    """How many requests to admit from the head of the queue. With 0 and nothing running, the policy decides again at
    `wait_until`.

    `chunk`: while rows are running, read prompts in parts of at most this many tokens, each in a step that also decodes
    a token of every row (None: at once, while the rows wait). It holds until the next decision.
    """

    admit: int
    wait_until: float | None = None
    chunk: int | None = None


class Policy(Protocol):
    """Decides when requests wait and rows may join (`decide`), and receives every step (`observe`)."""

    @property
    def name(self) -> str: ...

    def decide(self, view: View) -> Decision: ...

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None: ...


class Engine(Protocol):
    """Serves rows. Every method except `clear` returns the seconds that it took; `bytes` is the size of the cache.

    `shared` decodes a token of every row and reads the given number of further tokens of each given prompt. A prompt
    that has been read completely joins the rows with its first token.
    """

    @property
    def bytes(self) -> float: ...

    def clear(self) -> None: ...

    def prefill(self, requests: Sequence[ServingRequest]) -> float: ...

    def decode(self) -> float: ...

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float: ...

    def leave(self, ids: Sequence[int]) -> float: ...


class Clock(Protocol):
    """Gives the time in seconds of the trace; `advance` adds the seconds of work, `wait_until` passes idle time."""

    def now(self) -> float: ...

    def advance(self, seconds: float) -> None: ...

    def wait_until(self, second: float) -> None: ...


@dataclass
class Served:
    """One run: an outcome per request, all steps, and whether the server fell behind for good (`saturated`).

    `gaps` holds the seconds between successive tokens of a row, for requests after the warm-up.
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
