"""The recipe by which a stand-in is trained: the keys that `proxy.training` of a parameter file may hold."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How to train. Learning rates hold at 1 until `decay_from` of the steps, then fall to 0 in a straight line."""

    steps: int
    seed: int = 0
    start_from: str = ""  # the stand-in whose weights are taken over; by default none
    tokens: int = 2048  # of running text per step
    text_every: int = 1  # steps from one with running text to the next
    questions: int = 8  # per step
    muon_rate: float = 0.015
    adam_rate: float = 0.005
    weight_decay: float = 0.3
    warm_up: int = 20
    decay_from: float = 0.35
    answer_weight: float = 0.5
    repeat_weight: float = 1.0
    guide_weight: float = 2.0
    balance_weight: float = 0.02
    balance_rate: float = 0.01  # of the router's correction bias, where there is one
    copy_until: float = 0.22  # share of the steps in which nothing but copying is learned
    row_lengths: tuple[tuple[float, int], ...] = ((0.5, 256), (0.65, 512), (0.8, 1024), (1.0, 2048))
    joined: float = 0.0  # share of the questions that are about two excerpts joined
    advised: float = 0.0  # share of the questions that are about text of no class, answered by advice
    replaced: float = 0.0  # at most this share of a question's tokens is replaced by others
    dropout: float = 0.0  # of what attention and feed-forward parts add
    average: float = 0.0  # how much of the averaged weights stays at each step; 0: the last weights are kept
    threads: int = 1
    refine: dict | None = None  # the second phase: the keys in which it differs from the first

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates at `step`."""
        progress = step / self.steps
        fall = 1.0 if progress < self.decay_from else (1 - progress) / (1 - self.decay_from)
        return min(1.0, (step + 1) / self.warm_up) * fall

    def refined(self) -> "Recipe":
        """Return the recipe of the second phase. Raises TypeError for a key that no recipe has."""
        return replace(self, **{"refine": None, "start_from": "", "copy_until": 0.0} | (self.refine or {}))
