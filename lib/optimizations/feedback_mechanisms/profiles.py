"""One server with several profiles of a model: newcomers go to the profile in charge, rows end where they began.

Each profile is an engine of its own (`lib.measure.serving.engine` or `lib.measure.serving.simulator`) with its own
cache; a step of the server is one step of every profile that has rows, one after another. Knows no policy: a
function returns the profile in charge.
"""

from collections.abc import Callable, Sequence

from lib.measure.serving.server import Engine
from lib.measure.serving.traffic import ServingRequest


class Profiles:
    """Serves with `engines`; `current()` is the index of the one that reads the next prompts.

    `owner` maps the id of every request admitted so far to the index of its engine.
    """

    def __init__(self, engines: Sequence[Engine], current: Callable[[], int]):
        self.engines, self.current = list(engines), current
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.owner: dict[int, int] = {}
        self.running: list[set[int]] = [set() for _ in self.engines]
        for engine in self.engines:
            engine.clear()

    @property
    def bytes(self) -> float:
        """Bytes that all caches hold now."""
        return sum(engine.bytes for engine in self.engines)

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Let the profile in charge read the prompts; return the seconds it took."""
        index = self.current()
        for request in requests:
            self.owner[request.id] = index
            self.running[index].add(request.id)
        return self.engines[index].prefill(requests)

    def decode(self) -> float:
        """Produce one token of every row of every profile; return the seconds it took."""
        return sum(engine.decode() for engine, ids in zip(self.engines, self.running) if ids)

    def leave(self, ids: Sequence[int]) -> float:
        """Take rows out of their batches; return the seconds it took."""
        seconds = 0.0
        for engine, running in zip(self.engines, self.running):
            if gone := [name for name in ids if name in running]:
                running.difference_update(gone)
                seconds += engine.leave(gone)
        return seconds
