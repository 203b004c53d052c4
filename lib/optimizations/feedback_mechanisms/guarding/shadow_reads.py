"""Rereading answers in a server: which answers, when, and the consequence for the profile that gave them.

An answer to be reread waits until that costs the requests least: until no request waits, in groups, or until too many
answers are pending. Rereading is charged to the server. Independent of engines.
"""

import random
from collections.abc import Callable, Sequence

from lib.measure.serving.traffic import ServingRequest
from lib.optimizations.feedback_mechanisms.guarding.net_saving import AT_ONCE
from lib.optimizations.feedback_mechanisms.method import Guard

MOST_PENDING = 16  # pending answers, after a clean start, at which a group is reread even if requests wait

Read = Callable[[Sequence[ServingRequest]], tuple[float, Sequence[float]]]


class ShadowReads:
    """Rereads answers of the fast profile with the full one, for a `guard` that may roll the fast profile back.

    The draw of answers depends only on `seed`, the request's id and the guard's share, so that all settings meet the
    same draws. `read(requests)` reads a group in one pass and returns its seconds and the loss of each answer; `now()`
    returns the current second.
    """

    def __init__(self, guard: Guard, read: Read, now: Callable[[], float], seed: int = 0):
        self.guard, self.read, self.now, self.seed = guard, read, now, seed
        self.pending: list[ServingRequest] = []
        self.count, self.seconds = 0, 0.0

    def allows(self) -> bool:
        """Return whether the fast profile may answer now: it is trusted, or on trial again after its cool-down."""
        return self.guard.trusted or self.guard.ready(self.now())

    def finished(self, request: ServingRequest) -> None:
        """Register a finished answer of the fast profile; it becomes pending if the guard wants it."""
        if self.guard.wants(random.Random(f"{self.seed} {request.id}").random()):
            self.pending.append(request)

    def work(self, waiting: int, running: int) -> float:
        """Reread a group if one is due, given the number of `waiting` requests and `running` rows; return its seconds.

        0 if none is due.
        """
        if not self.guard.trusted:
            self.pending = []  # the profile is rolled back already
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
