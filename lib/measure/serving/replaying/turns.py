"""Several servers that work at the same moment of their traces: of all of them, the one whose clock is furthest behind
makes the next step.

A machine's speed wanders within a second. Servers that each run a whole trace meet different spells of it, and near
saturation a queue amplifies small differences. In turns, step by step, the same spell falls on the same part of the
trace under every policy. Each server has a thread of its own, which thinks while all others sleep; every step of an
engine is made in the caller's thread, so that no pool of threads waits for another. Knows nothing of models.
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
    """Does the servers' work one piece at a time: that of the server whose clock is furthest behind, by name among
    equals.
    """

    def __init__(self, clocks: Mapping[str, Clock]) -> None:
        self.clocks = dict(clocks)
        self._requests: queue.SimpleQueue[tuple[str, Work | None]] = queue.SimpleQueue()
        self._answers: dict[str, queue.SimpleQueue[tuple[Any, BaseException | None]]] = {
            name: queue.SimpleQueue() for name in clocks
        }

    def take(self, name: str, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, done when it is this server's turn; called in the server's thread."""
        self._requests.put((name, work))
        result, error = self._answers[name].get()
        if error is not None:
            raise error
        return result

    def finished(self, name: str) -> None:
        """Leave the others to themselves."""
        self._requests.put((name, None))

    def lead(self) -> None:
        """Do the work of all servers, in the caller's thread, until all have finished. What a piece of work raises is
        raised in its server; an interruption ends them all.
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
    """An engine whose every call waits for its turn. `wall_seconds` and `cpu_seconds` are those of its calls, `joules`
    what `read_joules` counted meanwhile (None without one). Calls are reported as they were on a machine without
    `slowness`: their seconds divided by it.
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

    def beside(self, work: Callable[..., float], *arguments: Any) -> float:
        """Do other work of this server in its turn, charged like its calls; return its seconds."""
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
    """A policy whose thinking takes time of its server's clock, as it does in a real server: what it would take on a
    machine without `slowness`, as the engine's calls. `wall_seconds` and `cpu_seconds` are those of its thinking.
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
    """Run every server to its end, in turns; return what they returned, by name.

    A server that raises ends alone; the first such exception is raised when all have ended.
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
