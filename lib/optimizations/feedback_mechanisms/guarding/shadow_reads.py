"""Reading answers again in a server: which ones, when, and what follows for the profile that gave them.

An answer that is to be read waits until it costs the requests least: until nobody waits, in groups, or until too many
are pending. Whatever is read is charged to the server. Knows no engine.
"""

import random
from collections.abc import Callable, Sequence

from lib.measure.serving.traffic import ServingRequest
from lib.optimizations.feedback_mechanisms.guarding.net_saving import AT_ONCE
from lib.optimizations.feedback_mechanisms.method import Guard

MOST_PENDING = 16  # answers after a clean start, before it a group: as many are read whoever waits

Read = Callable[[Sequence[ServingRequest]], tuple[float, Sequence[float]]]


class ShadowReads:
    """The answers of the fast profile that the full one reads again, for a `guard` that takes the profile back.

    Which ones is drawn by `seed`, the request's id and the guard's share alone, so that settings meet the same draws.
    `read(requests)` reads a group in one pass and returns its seconds and each answer's loss; `now()` is the second.
    """

    def __init__(self, guard: Guard, read: Read, now: Callable[[], float], seed: int = 0):
        self.guard, self.read, self.now, self.seed = guard, read, now, seed
        self.pending: list[ServingRequest] = []
        self.count, self.seconds = 0, 0.0

    def allows(self) -> bool:
        """Return whether the fast profile may answer now: it is trusted, or is on trial again after its cool-down."""
        return self.guard.trusted or self.guard.ready(self.now())

    def finished(self, request: ServingRequest) -> None:
        """Take in an answer of the fast profile that is done."""
        if self.guard.wants(random.Random(f"{self.seed} {request.id}").random()):
            self.pending.append(request)

    def work(self, waiting: int, running: int) -> float:
        """Read a group where that is due, beside so many requests that wait and rows that decode; return its seconds,
        0 where nothing is due.
        """
        if not self.guard.trusted:
            self.pending = []  # nothing more is to be learnt about it
        calm = not waiting and (not running or len(self.pending) >= AT_ONCE)
        most = AT_ONCE if self.guard.fresh else MOST_PENDING
        if not self.pending or not (calm or len(self.pending) >= most):
            return 0.0
        group, self.pending = self.pending[:AT_ONCE], self.pending[AT_ONCE:]
        start = self.now()
        seconds, losses = self.read(group)
        self.count, self.seconds = self.count + len(group), self.seconds + seconds
        for loss in losses:
            self.guard.add(start + seconds, loss)
        return seconds
