"""Simulates the server loop without a model: steps take measured times (`lib.measure.serving.step_times`), with jitter.

The simulated engine tracks the size of the same padded cache as the real engine, without its contents, so that hours of
traffic take seconds; a test compares the two call by call. All draws are seeded. Knows nothing about policies.
"""

import random
from collections.abc import Sequence
from typing import Any

from lib.measure.serving.protocol import Limits, Policy, Served, grouped, kept_of
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import ServingRequest, Trace


class SimulatedEngine:
    """Returns the measured time of each call; without `jitter`, always the mean. `kept` is the number of first tokens
    of longer prompts whose cache is kept: it is copied, and they are not read (`protocol.kept_of`).
    """

    def __init__(self, times: StepTimes, seed: int = 0, jitter: bool = True, kept: int = 0):
        self.times, self.jitter, self.kept = times, jitter, kept
        self.random = random.Random(seed)
        self.clear()

    def clear(self) -> None:
        """Remove all rows."""
        self.base: dict[int, int] = {}  # a row's context minus the steps so far
        self.steps = 0
        self.longest = 0
        self.columns = 0
        self.reading: dict[int, int] = {}  # tokens read so far, for prompts that are read in parts

    @property
    def bytes(self) -> float:
        """Bytes that the padded cache would hold now, including prompts that are being read in parts."""
        return self._rows_bytes + sum(self.reading.values()) * self.times.bytes_per_token

    @property
    def _rows_bytes(self) -> float:
        return len(self.base) * self.columns * self.times.bytes_per_token

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Add the requests' rows; return the seconds of reading their prompts and of moving the cache."""
        joining = bool(self.base)
        for request in requests:
            self.base[request.id] = request.prompt_tokens - self.steps
        self._widen()
        seconds = sum(self._read(group, kept) for kept, group in grouped(requests, self.kept).items())
        return seconds + (self.times.move(self._rows_bytes) if joining else 0.0)

    def _read(self, requests: Sequence[ServingRequest], kept: int) -> float:
        """Return the seconds of reading prompts in one pass, after copying the cache of the `kept` tokens."""
        tokens, copied = max(request.prompt_tokens for request in requests), len(requests) * kept
        seconds = self.times.behind(len(requests), kept, tokens) * self._deviation(self.times.prefill_ratios)
        return seconds + (self.times.move(copied * self.times.bytes_per_token) if kept else 0.0)

    def decode(self) -> float:
        """Make every row one token longer; return the seconds of a step."""
        self.steps += 1
        self.columns = self.longest + self.steps
        return self.times.decode(len(self.base), self.columns) * self._deviation(self.times.decode_ratios)

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        """Make every row one token longer and read further tokens of each prompt; return the seconds of both."""
        seconds = self.decode() if self.base else 0.0
        for request, count in parts:
            begun = request.id in self.reading
            done = self.reading.pop(request.id, kept_of(request, self.kept))
            seconds += 0.0 if begun or not done else self.times.move(done * self.times.bytes_per_token)
            seconds += self.times.part(done, count) * self._deviation(self.times.prefill_ratios)
            if done + count < request.prompt_tokens:
                self.reading[request.id] = done + count
                continue
            joining = bool(self.base)
            self.base[request.id] = request.prompt_tokens - self.steps
            self._widen()
            seconds += self.times.move(self._rows_bytes) if joining else 0.0
        return seconds

    def leave(self, ids: Sequence[int]) -> float:
        """Remove rows; return the seconds of moving the cache."""
        for request in ids:
            del self.base[request]
        self._widen()
        return self.times.move(self._rows_bytes) if self.base else 0.0

    def _widen(self) -> None:
        self.longest = max(self.base.values(), default=0)
        self.columns = self.longest + self.steps if self.base else 0

    def _deviation(self, ratios: Sequence[float]) -> float:
        return self.random.choice(ratios) if self.jitter else 1.0


def simulate(
    trace: Trace,
    policy: Policy,
    times: StepTimes,
    limits: Limits,
    *,
    seed: int = 0,
    jitter: bool = True,
    kept: int = 0,
    **options: Any,
) -> Served:
    """Serve `trace` in virtual time and return the outcome; `options` are those of `server.serve`."""
    engine = SimulatedEngine(times, seed, jitter, kept)
    return serve(trace, policy, engine, VirtualClock(), limits, kept=kept, **options)
