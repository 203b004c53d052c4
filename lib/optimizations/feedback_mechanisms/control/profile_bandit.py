"""Which profile answers new requests, by trying both: a bandit in the place of a rule that names what a rush is.

Discounted UCB (Garivier and Moulines 2011, *On upper-confidence bound policies for switching bandit problems*). Knows
neither clock nor server.
"""

import math

from lib.measure.serving.slo import Objectives

SPAN = 8.0  # first-token objectives between two choices
REMEMBERED = 0.9  # of earlier spans, per span
CURIOSITY = 0.05  # weight of what is not known; a tenth of a span's reward is the price of the fast profile
PRICE = 0.1
PRESSED = 0.2  # a wait, as share of the first-token objective, that counts as pressure


class ProfileBandit:
    """Chooses anew after every span the profile (0 full, 1 fast) that has paid best lately, each tried often enough.

    The reward of a span is the share of its looks without pressure (no wait beyond PRESSED, tokens within their
    objective), less PRICE for the fast profile, whose answers are the worse ones. `course` keeps (second, profile) of
    every change. It takes the place of a `Switch`.
    """

    def __init__(self, objectives: Objectives):
        self.objectives, self.profile = objectives, 0
        self.reward, self.weight = [0.0, 0.0], [0.0, 0.0]
        self.began: float | None = None
        self.looks = self.eased = 0
        self.course: list[tuple[float, int]] = []

    def look(self, now: float, wait: float, signal: float) -> None:
        """Take in the longest wait and the filtered seconds per token; at the end of a span choose again."""
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
        """Return what a profile may pay; without end where it was never tried."""
        if not self.weight[profile]:
            return math.inf
        bonus = math.sqrt(math.log(1 + sum(self.weight)) / self.weight[profile])
        return self.reward[profile] / self.weight[profile] + CURIOSITY * bonus
