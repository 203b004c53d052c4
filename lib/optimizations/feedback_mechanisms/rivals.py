"""Rivals of the loop, without feedback: a static limit, the fast profile always or in a time span, and routing a fixed
share. Profile 0 is the full one, 1 the fast one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lib.measure.serving.protocol import Decision, RequestOutcome, ServerStep, View


@dataclass
class Static:
    """At most `size` rows with the profile `always`; with `span`, the fast profile in that half-open time span."""

    size: int
    always: int = 0
    span: tuple[float, float] | None = None
    profile: int = 0

    @property
    def name(self) -> str:
        """The name of the setting in tables."""
        kind = "static, fast at times" if self.span else "static, fast" if self.always == 1 else "static"
        return f"{kind} {self.size}"

    def decide(self, view: View) -> Decision:
        """Admit every request that fits within the size."""
        inside = self.span is not None and self.span[0] <= view.now < self.span[1]
        self.profile = 1 if inside else self.always
        return Decision(max(0, min(self.size - len(view.running), view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Learn nothing."""


@dataclass
class Routed:
    """At most `size` rows, with a fixed `share` of the requests routed to the fast profile.

    Against this rival a loop shows the value of feedback itself. The profile changes when routing is more than `run`
    requests ahead of the share or behind it. Rows of both profiles at once cost a step of each, so routing request by
    request (`run` 0) pays that cost all the time.
    """

    size: int
    share: float
    run: int = 0
    profile: int = 0
    routed: int = 0
    fast: int = 0

    @property
    def name(self) -> str:
        """The name of the setting in tables."""
        return f"routed {self.share:.2f}"

    def __post_init__(self) -> None:
        self.profile = int(self.share >= 0.5)

    def decide(self, view: View) -> Decision:
        """Admit every request that fits within the size, with the profile that is behind its share."""
        count = max(0, min(self.size - len(view.running), view.room))
        if count:
            deficit = self.share * (self.routed + count) - (self.fast + 0.5 * count)  # of the fast profile
            self.profile = self.profile if abs(deficit) <= self.run else int(deficit > 0)
        self.routed, self.fast = self.routed + count, self.fast + count * self.profile
        return Decision(count)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Learn nothing."""
