"""What the loop is compared with, settings that take no notice of what they measure: a static limit, the fast profile
all the time or in a span of it, and routing a fixed share. Profile 0 is the full one, 1 the fast one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lib.measure.serving.protocol import Decision, RequestOutcome, ServerStep, View


@dataclass
class Static:
    """At most `size` rows, with the profile `always`; or, with `span`, the fast profile in [span)."""

    size: int
    always: int = 0
    span: tuple[float, float] | None = None
    profile: int = 0

    @property
    def name(self) -> str:
        """What the setting is called in tables."""
        kind = "static, fast at times" if self.span else "static, fast" if self.always == 1 else "static"
        return f"{kind} {self.size}"

    def decide(self, view: View) -> Decision:
        """Admit every request that fits below the size."""
        inside = self.span is not None and self.span[0] <= view.now < self.span[1]
        self.profile = 1 if inside else self.always
        return Decision(max(0, min(self.size - len(view.running), view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Learn nothing."""


@dataclass
class Routed:
    """At most `size` rows; `share` of the requests go to the fast profile, whatever happens: compared with this, a loop
    shows what feedback itself is worth.

    The profile changes where routing is more than `run` requests ahead of that share or behind it. Rows of both
    profiles at once cost a step of each, so routing request by request (0) pays for it all the time.
    """

    size: int
    share: float
    run: int = 0
    profile: int = 0
    routed: int = 0
    fast: int = 0

    @property
    def name(self) -> str:
        """What the setting is called in tables."""
        return f"routed {self.share:.2f}"

    def __post_init__(self) -> None:
        self.profile = int(self.share >= 0.5)

    def decide(self, view: View) -> Decision:
        """Admit every request that fits below the size, with the profile that has less than its share."""
        count = max(0, min(self.size - len(view.running), view.room))
        if count:
            lacking = self.share * (self.routed + count) - (self.fast + 0.5 * count)  # by the fast profile
            self.profile = self.profile if abs(lacking) <= self.run else int(lacking > 0)
        self.routed, self.fast = self.routed + count, self.fast + count * self.profile
        return Decision(count)

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Learn nothing."""
