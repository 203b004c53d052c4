"""Chooses the profile for new requests by trying both: a bandit in place of a fixed rule for high load.

Discounted UCB (Garivier and Moulines 2011, *On upper-confidence bound policies for switching bandit problems*).
Independent of clocks and servers.
"""

import math

from lib.measure.serving.slo import Objectives

SPAN = 8.0  # time between two choices, in first-token objectives
REMEMBERED = 0.9  # discount of earlier spans, per span
CURIOSITY = 0.05  # weight of the exploration bonus
PRICE = 0.1  # of the fast profile, as a share of a span's reward
PRESSED = 0.2  # wait that counts as pressure, as a share of the first-token objective


class ProfileBandit:
    """Chooses after every span the profile (0 full, 1 fast) with the best recent reward, trying each often enough.

    The reward of a span is the share of its looks without pressure (no wait beyond PRESSED, tokens within their
    objective), minus PRICE for the fast profile, whose answers are worse. `course` holds (second, profile) of every
    change. Has the interface of `Switch`.
    """

    def __init__(self, objectives: Objectives):
        self.objectives, self.profile = objectives, 0
        self.reward, self.weight = [0.0, 0.0], [0.0, 0.0]
        self.began: float | None = None
        self.looks = self.eased = 0
        self.course: list[tuple[float, int]] = []

    def look(self, now: float, wait: float, signal: float) -> None:
        """Register the longest wait and the filtered seconds per token; at the end of a span, choose again."""
        self.began = now if self.began is None else self.began
        first, token = self.objectives.first_token_seconds, self.objectives.token_seconds
        self.looks += 1
        self.eased += wait <= PRESSED * first and signal <= token
        if now - self.began < SPAN * first:
            return
        self._learn(self.eased / self.looks - PRICE * self.profile)
        self.began, self.looks, self.eased = now, 0, 0
        best = max((0, 1), key=self._promise)
        if best != self.profile:
            self.profile = best
            self.course.append((now, best))

    def _learn(self, reward: float) -> None:
        self.reward = [REMEMBERED * value for value in self.reward]
        self.weight = [REMEMBERED * value for value in self.weight]
        self.reward[self.profile] += reward
        self.weight[self.profile] += 1.0

    def _promise(self, profile: int) -> float:
        """Return the upper confidence bound of a profile's reward; infinite if it was never tried."""
        if not self.weight[profile]:
            return math.inf
        bonus = math.sqrt(math.log(1 + sum(self.weight)) / self.weight[profile])
        return self.reward[profile] / self.weight[profile] + CURIOSITY * bonus
