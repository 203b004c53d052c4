"""Runs several servers at the same moment of their traces: the server whose clock is furthest behind steps next.

A machine's speed drifts within a second. Servers that each run a whole trace would meet different phases of this drift,
and near saturation a queue amplifies small differences. With turns, step by step, the same phase affects the same part
of the trace under every policy. Each server has its own thread, which computes while all others sleep. Every step of an
engine runs in the caller's thread, so that no thread pool waits for another. Knows nothing about models.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lib.measure.serving.protocol import Clock, Decision, Engine, Policy, RequestOutcome, ServerStep, View
from lib.measure.serving.traffic import ServingRequest

Result = TypeVar("Result")
Work = Callable[[], Any]


class Turns:
    """Does the servers' work one piece at a time: next comes the server whose clock is furthest behind, ties broken by
    name.
    """

    def __init__(self, clocks: Mapping[str, Clock]) -> None:
        self.clocks = dict(clocks)
        self._requests: queue.SimpleQueue[tuple[str, Work | None]] = queue.SimpleQueue()
        self._answers: dict[str, queue.SimpleQueue[tuple[Any, BaseException | None]]] = {
            name: queue.SimpleQueue() for name in clocks
        }

    def take(self, name: str, work: Callable[[], Result]) -> Result:
        """Run `work` when it is the turn of server `name`, and return its result; called in the server's thread."""
        self._requests.put((name, work))
        result, error = self._answers[name].get()
        if error is not None:
            raise error
        return result

    def finished(self, name: str) -> None:
        """Leave the turns to the other servers."""
        self._requests.put((name, None))

    def lead(self) -> None:
        """Do the work of all servers in the caller's thread until all have finished. An exception of a piece of work is
        raised in its server; an interruption ends all servers.
        """
        waiting: dict[str, Work] = {}
        thinking = set(self.clocks)
        try:
            while thinking or waiting:
                while thinking:
                    name, work = self._requests.get()
                    thinking.remove(name)
                    if work is not None:
                        waiting[name] = work
                if waiting:
                    name = min(waiting, key=lambda each: (self.clocks[each].now(), each))
                    answer = _done(waiting.pop(name))
                    thinking.add(name)
                    self._answers[name].put(answer)
        except BaseException as error:
            for answers in self._answers.values():
                answers.put((None, error))
            raise


def _done(work: Work) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


class EngineInTurn:
    """An engine whose calls wait for their turn. `wall_seconds` and `cpu_seconds` are the totals of its calls, `joules`
    the energy that `read_joules` counted meanwhile (None without it). The seconds that calls return are divided by
    `slowness`, as if the machine were not slowed down.
    """

    def __init__(
        self,
        engine: Engine,
        turns: Turns,
        name: str,
        read_joules: Callable[[], float | None] | None = None,
        slowness: float = 1.0,
    ) -> None:
        self.engine, self.turns, self.name, self.read_joules = engine, turns, name, read_joules
        self.slowness = slowness
        self.wall_seconds = self.cpu_seconds = 0.0
        self.joules: float | None = 0.0 if read_joules else None

    @property
    def bytes(self) -> float:
        """Bytes held by the cache."""
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

    def beside(self, work: Callable[..., float], *arguments: Any) -> float:
        """Do other work of this server in its turn, charged like the engine's calls; return its seconds."""
        return self._call(work, *arguments)

    def _call(self, work: Callable[..., float], *arguments: Any) -> float:
        return self.turns.take(self.name, lambda: self._timed(work, *arguments))

    def _timed(self, work: Callable[..., float], *arguments: Any) -> float:
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
        return seconds / self.slowness


class ChargedPolicy:
    """A policy whose computation advances its server's clock, as in a real server. Like the engine's calls, its seconds
    are divided by `slowness`. `wall_seconds` and `cpu_seconds` are the totals of its computation.
    """

    def __init__(self, policy: Policy, clock: Clock, slowness: float = 1.0) -> None:
        self.policy, self.clock, self.slowness = policy, clock, slowness
        self.wall_seconds = self.cpu_seconds = 0.0

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    def decide(self, view: View) -> Decision:
        return self._charged(self.policy.decide, view)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        self._charged(self.policy.observe, step, finished)

    def _charged(self, think: Callable[..., Result], *arguments: Any) -> Result:
        start, busy = time.perf_counter(), time.thread_time()
        result = think(*arguments)
        seconds = time.perf_counter() - start
        self.wall_seconds, self.cpu_seconds = self.wall_seconds + seconds, self.cpu_seconds + time.thread_time() - busy
        self.clock.advance(seconds / self.slowness)
        return result


def run(servers: Mapping[str, Callable[[], Result]], turns: Turns) -> dict[str, Result]:
    """Run all servers to their end, in turns; return their results by name.

    A server that raises an exception ends alone; the first exception is raised when all servers have ended.
    """
    results: dict[str, Result] = {}
    raised: list[BaseException] = []

    def serve(name: str) -> None:
        try:
            turns.take(name, lambda: None)
            results[name] = servers[name]()
        except BaseException as error:
            raised.append(error)
        finally:
            turns.finished(name)

    threads = [threading.Thread(target=serve, args=(name,), daemon=True) for name in servers]
    for thread in threads:
        thread.start()
    turns.lead()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return results
