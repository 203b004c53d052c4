"""Several servers that work at the same moment of their traces: of all of them, the one whose clock is furthest behind
makes the next step.

A machine's speed wanders within a second. Servers that each run a whole trace meet different spells of it, and near
saturation a queue makes much of a little. In turns, step by step, the same spell falls on the same part of the trace
under every policy. Each server has a thread of its own, of which only one ever runs. Knows nothing of models.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lib.measure.serving.protocol import Clock, Decision, Engine, Policy, RequestOutcome, ServerStep, View
from lib.measure.serving.traffic import ServingRequest

Result = TypeVar("Result")


class Turns:
    """Passes the right to run between servers: to the one whose clock is furthest behind, by name among equals."""

    def __init__(self, clocks: Mapping[str, Clock]) -> None:
        self.clocks, self.owner = dict(clocks), ""
        self.changed = threading.Condition()

    def take(self, name: str) -> None:
        """Let go, and return when it is this server's turn; nothing else runs until it asks again or has finished."""
        with self.changed:
            self.owner = ""
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.owner and name == self._behind())
            self.owner = name

    def finished(self, name: str) -> None:
        """Leave the others to themselves."""
        with self.changed:
            self.clocks.pop(name, None)
            self.owner = ""
            self.changed.notify_all()

    def _behind(self) -> str:
        return min(self.clocks, key=lambda name: (self.clocks[name].now(), name))


class EngineInTurn:
    """An engine whose every call waits for its turn. `wall_seconds` and `cpu_seconds` are those of its calls, `joules`
    what `read_joules` counted meanwhile (None without one).
    """

    def __init__(
        self, engine: Engine, turns: Turns, name: str, read_joules: Callable[[], float | None] | None = None
    ) -> None:
        self.engine, self.turns, self.name, self.read_joules = engine, turns, name, read_joules
        self.wall_seconds = self.cpu_seconds = 0.0
        self.joules: float | None = 0.0 if read_joules else None

    @property
    def bytes(self) -> float:
        """Bytes that the cache holds."""
        return self.engine.bytes

    def clear(self) -> None:
        self.engine.clear()

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        return self._call(self.engine.prefill, requests)

    def decode(self) -> float:
        return self._call(self.engine.decode)

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        return self._call(self.engine.shared, parts)

    def leave(self, ids: Sequence[int]) -> float:
        return self._call(self.engine.leave, ids)

    def _call(self, work: Callable[..., float], *arguments: Any) -> float:
        self.turns.take(self.name)
        before = self.read_joules() if self.read_joules else None
        busy = time.process_time()
        seconds = work(*arguments)
        self.cpu_seconds += time.process_time() - busy
        self.wall_seconds += seconds
        after = self.read_joules() if self.read_joules else None
        if self.joules is None or before is None or after is None:
            self.joules = None
        else:
            self.joules += after - before
        return seconds


class ChargedPolicy:
    """A policy whose thinking takes time of its server's clock, as it does in a real server."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self.policy, self.clock = policy, clock

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    def decide(self, view: View) -> Decision:
        return self._charged(self.policy.decide, view)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        self._charged(self.policy.observe, step, finished)

    def _charged(self, think: Callable[..., Result], *arguments: Any) -> Result:
        start = time.perf_counter()
        result = think(*arguments)
        self.clock.advance(time.perf_counter() - start)
        return result


def run(servers: Mapping[str, Callable[[], Result]], turns: Turns, prepare: Callable[[], object]) -> dict[str, Result]:
    """Run every server in its own thread until all have ended; return what they returned, by name.

    `prepare` is called first in each thread, for what belongs to a thread. A server that raises ends alone; the first
    such exception is raised when all have ended.
    """
    results: dict[str, Result] = {}
    raised: list[BaseException] = []

    def work(name: str) -> None:
        try:
            prepare()
            turns.take(name)
            results[name] = servers[name]()
        except BaseException as error:
            raised.append(error)
        finally:
            turns.finished(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return results
