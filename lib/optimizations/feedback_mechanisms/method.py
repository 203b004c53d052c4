"""Feedback: a running model is measured and adjusted while it serves: signal → filter → law → actuator.

Three loops, each of which stands alone:

- `LatencyLoop`: the batch limit follows the measured time per token to its objective, by a PI law with anti-windup or
  by AIMD (Åström and Hägglund 2006, *Advanced PID control*, chapters 3 and 13; Chiu and Jain 1989); where the limit is
  not enough, a `Switch` lets a faster profile answer newcomers; a return to the full one that does not last delays the
  next one.
- `DraftLength` and `Bandit`: how many tokens a pruned draft proposes follows the measured acceptance and the measured
  times (Leviathan et al. 2023, section 3.5), or is found by trying (discounted UCB: Garivier and Moulines 2011).
- `Guard`: a share of the answers is read again by the baseline; a sequential test signals when a profile answers worse
  than it may, then the last good profile comes back, and each further trial of the faulty one waits longer.

No weight is changed; there is no `apply`. Knows neither clock nor engine, and no other optimization: profiles and
drafts are models that the caller has made.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lib.errors import UserError
from lib.measure.serving.server import MOST_ROWS, Decision, RequestOutcome, ServerStep, View
from lib.measure.serving.slo import Objectives
from lib.models.decoding import batch_cache
from lib.optimizations.feedback_mechanisms.betting_test import BreachTest
from lib.optimizations.feedback_mechanisms.speculative import Round

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "setpoint": {
        "type": "float",
        "range": (0.3, 1.0),
        "default": 0.8,
        "help": "share of the latency objective that the limit aims at",
    },
    "shadow_share": {
        "type": "float",
        "range": (0.01, 1.0),
        "default": 0.25,
        "help": "share of the answers that the baseline reads again",
    },
    "quality_margin": {
        "type": "float",
        "range": (0.01, 0.5),
        "default": 0.1,
        "help": "share of tokens by which a profile may differ from the baseline more than it did when it was chosen",
    },
}
PERIOD_STEPS = 4  # decode steps between two decisions of a law: the bounded rate of the actuator
FILTER = 1 / 16  # weight of a new decode step in the filtered signal
MOST_CHANGE = math.log(2)  # of the limit, per decision
PRESSED, EASY = 0.2, 0.1  # waits, as shares of the first-token objective, at which the fast profile comes and may go
HOLD, MOST_HOLD = 32.0, 128.0  # first-token objectives that the fast profile stays at least, at most before a try
FULL, FAST = 0, 1  # profiles
START_ROWS, LEAST_ROWS = 16.0, 4.0  # limit before anything is known, and at least
FALSE_ALARM = 0.01  # of the guard, per watch
LONGEST_DRAFT = 8
REMEMBERED = 0.97  # of earlier rounds, per round
PROBE_EVERY = 16  # plain steps after which a single token is drafted, to see whether drafting pays again


def applies_to(model: nn.Module) -> str | None:
    """Return None where rows can join this model's running batch, else the reason why not."""
    return batch_cache.joinable(model)


def check(**knobs: float) -> None:
    """Raise UserError for a knob out of its range."""
    for name, value in knobs.items():
        low, high = SEARCH_SPACE[name]["range"]
        if not low <= value <= high:
            raise UserError(f"feedback_mechanisms: {name} {value}; expected a value in [{low:g}, {high:g}]")


# --- laws: from an error to a move -----------------------------------------------------------------------------------


@dataclass
class PI:
    """Proportional-integral law in velocity form, so nothing winds up at a bound.

    A move is gain·(Δerror + error/reset). The error is ln(setpoint / signal): positive, there is room. `reset` in
    decisions.
    """

    gain: float = 0.2
    reset: float = 8.0
    name: str = "PI"
    last: float | None = None

    def move(self, error: float) -> float:
        """Return by how much ln(limit) should change."""
        change = error - (error if self.last is None else self.last)
        self.last = error
        return self.gain * (change + error / self.reset)


@dataclass
class Aimd:
    """One more while there is room, a fifth fewer when there is none. `limit` is where the actuator stands."""

    name: str = "AIMD"
    backoff: float = 0.8

    def move(self, error: float, limit: float) -> float:
        """Return by how much ln(limit) should change."""
        return math.log(1 + 1 / limit) if error > 0 else math.log(self.backoff)


# --- loop 1: latency by the batch limit and by the profile -----------------------------------------------------------


@dataclass
class Switch:
    """Which profile answers newcomers: FULL, or FAST once the first in the queue has waited for a fifth of what it may.

    saving: how many times as long a request takes with the full profile as with the fast one. Back to FULL after `hold`
    seconds without pressure, if the time per token would then be within the objective too; a return that does not last
    doubles the next hold. `course` keeps (second, profile) of every change.
    """

    objectives: Objectives
    saving: float
    profile: int = FULL
    since: float = 0.0
    factor: float = HOLD
    course: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now: float, wait: float, signal: float) -> None:
        """Take in the longest wait and the filtered seconds per token; change the profile where that is due."""
        pressed = wait > PRESSED * self.objectives.first_token_seconds or signal > self.objectives.token_seconds
        hold = self.factor * self.objectives.first_token_seconds
        if self.profile == FULL and pressed:
            lasted = now - self.since > 2 * hold or not self.course
            self.factor = HOLD if lasted else min(2 * self.factor, MOST_HOLD)
            self._change(FAST, now)
        elif self.profile == FAST:
            if pressed or wait > EASY * self.objectives.first_token_seconds:
                self.since = now
            elif now - self.since >= hold and signal * self.saving <= self.objectives.token_seconds:
                self._change(FULL, now)

    def _change(self, profile: int, now: float) -> None:
        self.profile, self.since = profile, now
        self.course.append((now, profile))


class LatencyLoop:
    """A policy of the server loop whose batch limit follows the measured seconds per token to setpoint × objective.

    Signal: seconds between a row's tokens, prefills of others included; filter: exponential, over about 1/FILTER decode
    steps, since a single prefill takes as long as several of them. The limit rises only while it is what keeps requests
    waiting: otherwise it would wind up in calm hours and overshoot with the first rush. With a `switch` the loop also
    sets the `profile`. `course` keeps (second, limit, signal) of every decision.
    """

    def __init__(
        self,
        law: PI | Aimd,
        objectives: Objectives,
        *,
        setpoint: float = 0.8,
        most: int = MOST_ROWS,
        switch: Switch | None = None,
    ):
        check(setpoint=setpoint)
        self.law, self.target, self.most, self.switch = law, setpoint * objectives.token_seconds, most, switch
        self.name = f"{law.name} loop" if switch is None else f"{law.name} loop, two profiles"
        self.limit, self.bound, self.wait = START_ROWS, False, 0.0
        self.pending, self.count = 0.0, 0
        self.signal: float | None = None
        self.course: list[tuple[float, float, float]] = []

    @property
    def size(self) -> int:
        """The batch limit as a whole number of rows."""
        return max(1, min(self.most, math.floor(self.limit + 1e-9)))

    @property
    def profile(self) -> int:
        """The profile that answers whoever is admitted now."""
        return self.switch.profile if self.switch else FULL

    def decide(self, view: View) -> Decision:
        """Admit as many as the limit and the server's memory have room for."""
        self.bound |= self.size - len(view.running) < len(view.waiting)
        self.wait = view.now - view.waiting[0].arrival
        if self.switch:
            self.switch.look(view.now, self.wait, self.signal or 0.0)
        return Decision(max(0, min(self.size - len(view.running), view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Take in a step; decide anew after every PERIOD_STEPS of decoding."""
        if step.kind == "decode" or step.running > step.batch:  # a first prefill stops nobody
            self.pending += step.seconds
        if step.kind != "decode":
            return
        self.signal = self.pending if self.signal is None else self.signal + FILTER * (self.pending - self.signal)
        self.pending, self.count = 0.0, self.count + 1
        end = step.start + step.seconds
        self.wait = self.wait if step.waiting else 0.0
        if self.switch:
            self.switch.look(end, self.wait, self.signal)
        if self.count % PERIOD_STEPS == 0:
            self._act(math.log(self.target / max(self.signal, 1e-9)))
            self.course.append((end, self.limit, self.signal))
            self.bound = False

    def _act(self, error: float) -> None:
        move = self.law.move(error, self.limit) if isinstance(self.law, Aimd) else self.law.move(error)
        if move > 0 and not self.bound:
            return
        move = min(max(move, -MOST_CHANGE), MOST_CHANGE)
        self.limit = min(max(self.limit * math.exp(move), LEAST_ROWS), float(self.most))


# --- loop 2: speculation by the draft's length -----------------------------------------------------------------------


class DraftLength:
    """Draft as many tokens as promise the most tokens per second, by the acceptance and the times measured so far.

    With acceptance a, a round of k drafted tokens yields (1 − a^(k+1)) / (1 − a) tokens on average. Earlier
    rounds fade, so that another kind of text is noticed; while nothing is drafted, a single token is, now and then.
    """

    name = "measured acceptance"

    def __init__(self, most: int = LONGEST_DRAFT):
        self.most, self.learned, self.plain = most, 0, 0
        self.accepted, self.tried = 1.0, 2.0
        self.draft_seconds, self.drafted = 0.0, 0.0
        self.check_seconds: dict[int, float] = {}
        self.course: list[tuple[int, float]] = []

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted, of those that were compared."""
        return self.accepted / self.tried

    def __call__(self, rounds: Sequence[Round]) -> int:
        """Return how many tokens to draft next. `rounds` are those of the present answer."""
        if len(rounds) < self.learned:
            self.learned = 0  # another answer has begun
        for done in rounds[self.learned :]:
            self._learn(done)
        self.learned = len(rounds)
        count = max(range(self.most + 1), key=self.promise)
        self.plain = self.plain + 1 if count == 0 else 0
        if not self.drafted or self.plain >= PROBE_EVERY:
            count, self.plain = 1, 0
        self.course.append((count, self.acceptance))
        return count

    def promise(self, count: int) -> float:
        """Return the expected tokens per second of rounds with `count` drafted tokens; -1 where nothing is known."""
        if not self.check_seconds or (count and not self.drafted):
            return -1.0
        near = min(self.check_seconds, key=lambda known: abs(known - count))
        each = self.draft_seconds / self.drafted if count else 0.0
        a = min(self.acceptance, 0.999)
        return (1 - a ** (count + 1)) / (1 - a) / (self.check_seconds[near] + count * each)

    def _learn(self, done: Round) -> None:
        old = self.check_seconds.get(done.drafted, done.check_seconds)
        self.check_seconds[done.drafted] = old + 0.2 * (min(done.check_seconds, 3 * old) - old)
        if done.drafted:
            checked = done.accepted + (done.accepted < done.drafted)
            self.accepted = REMEMBERED * self.accepted + done.accepted
            self.tried = REMEMBERED * self.tried + checked
            self.draft_seconds = REMEMBERED * self.draft_seconds + done.draft_seconds
            self.drafted = REMEMBERED * self.drafted + done.drafted


class Bandit:
    """Draft as many tokens as have paid best lately, each length tried often enough to know: discounted UCB."""

    name = "bandit"

    def __init__(self, arms: Sequence[int] = (0, 1, 2, 4, 8), curiosity: float = 0.15):
        if not arms:
            raise UserError("feedback_mechanisms: a bandit needs at least one draft length to choose from")
        self.arms, self.curiosity, self.learned = list(arms), curiosity, 0
        self.reward, self.weight = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
        self.chosen: list[int] = []

    def __call__(self, rounds: Sequence[Round]) -> int:
        """Return how many tokens to draft next. `rounds` are those of the present answer."""
        if len(rounds) < self.learned:
            self.learned = 0
        new = rounds[self.learned :]
        for drafted, done in zip(self.chosen[len(self.chosen) - len(new) :], new):
            for arm in self.arms:
                self.reward[arm] *= REMEMBERED
                self.weight[arm] *= REMEMBERED
            self.reward[drafted] += (done.accepted + 1) / max(done.seconds, 1e-9)
            self.weight[drafted] += 1
        self.learned = len(rounds)
        choice = next((arm for arm in self.arms if self.weight[arm] == 0), None)
        if choice is None:
            mean = {arm: self.reward[arm] / self.weight[arm] for arm in self.arms}
            best, total = max(mean.values()), sum(self.weight.values())
            bonus = {arm: self.curiosity * math.sqrt(math.log(1 + total) / self.weight[arm]) for arm in self.arms}
            choice = max(self.arms, key=lambda arm: mean[arm] / best + bonus[arm])
        self.chosen.append(choice)
        return choice


def fixed(count: int) -> Callable[[Sequence[Round]], int]:
    """Return the static setting: always draft `count` tokens."""
    return lambda rounds: count


# --- loop 3: quality by shadow runs ----------------------------------------------------------------------------------


@dataclass
class Guard:
    """Watches a profile by the losses of its shadowed answers; decides when to fall back and when to try it again.

    usual: the profile's loss when it was chosen; margin: by how much more it may lose. cool_down: seconds until it is
    tried again, doubled by every further breach. `events` keeps (second, what).
    """

    usual: float
    margin: float
    share: float
    cool_down: float
    seed: int = 0
    trusted: bool = True
    until: float = 0.0
    breaches: int = 0
    events: list[tuple[float, str]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(shadow_share=self.share, quality_margin=self.margin)
        self.random = random.Random(self.seed)
        self.test = self._watch()

    def _watch(self) -> BreachTest:
        return BreachTest(min(0.99, self.usual + self.margin), FALSE_ALARM)

    @property
    def estimate(self) -> float | None:
        """Mean loss of the present watch; None before the first shadowed answer."""
        return self.test.mean

    def wants(self) -> bool:
        """Return whether this answer is to be shadowed: a draw that does not depend on the answer."""
        return self.trusted and self.random.random() < self.share

    def add(self, second: float, loss: float) -> bool:
        """Take in a shadowed answer's loss; return whether the profile has to be taken back now."""
        self.losses.append((second, loss))
        if not self.trusted or not self.test.add(loss):
            return False
        self.trusted = False
        self.until = second + self.cool_down * 2**self.breaches
        self.breaches += 1
        self.events.append((second, "rolled back"))
        return True

    def ready(self, second: float) -> bool:
        """Return whether the cool-down is over; then the profile is on trial again, with a new test."""
        if self.trusted or second < self.until:
            return False
        self.trusted, self.test = True, self._watch()
        self.events.append((second, "tried again"))
        return True
