"""Feedback: a running model is measured and adjusted while it serves: signal → filter → law → actuator.

Three independent loops; the third, the length of a draft, is in `draft_length`:

- `LatencyLoop`: the batch limit is controlled so that the measured time per token meets its objective, by a PI law with
  anti-windup or by AIMD (Åström and Hägglund 2006, *Advanced PID control*, chapters 3 and 13; Chiu and Jain 1989), with
  a dead band and rests so that it does not swing (`control.laws`). If the limit is not enough, a `Switch` lets a faster
  profile answer new requests; a return to the full profile that does not last delays the next return.
- `Guard`: a share of the answers is reread by the baseline; a sequential test signals when a profile differs from it by
  more than an absolute bound. Then the last good profile is restored, and each further trial of the faulty one waits
  longer.

No weight is changed; there is no `apply`. Independent of clocks, engines and other optimizations: profiles and drafts
are models made by the caller.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lib.errors import UserError
from lib.measure.serving.protocol import MOST_ROWS, Decision, RequestOutcome, ServerStep, View
from lib.measure.serving.slo import Objectives
from lib.models.decoding import batch_cache
from lib.optimizations.feedback_mechanisms.control.laws import BAND, MOST_CHANGE, PI, Aimd, Restraint
from lib.optimizations.feedback_mechanisms.control.profile_bandit import ProfileBandit
from lib.optimizations.feedback_mechanisms.guarding.betting_test import BreachTest

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
        "help": "share of the answers that the baseline rereads, a fifth of it after a clean start",
    },
    "quality_bound": {
        "type": "float",
        "range": (0.01, 0.5),
        "default": 0.1,
        "help": "largest share of tokens in which a profile may differ from the baseline",
    },
}
PERIOD_STEPS = 4  # decode steps between two decisions of a law: the bounded rate of the actuator
FILTER = 1 / 16  # weight of a new decode step in the filtered signal, and in the decaying maximum of rows in use
SWITCH_STEPS = 32  # decode steps after a change of profile in which the limit does not fall
PRESSED, EASY = 0.2, 0.1  # waits, as shares of the first-token objective, at which the fast profile starts, may end
HOLD, MOST_HOLD = 32.0, 128.0  # first and longest minimum stay of the fast profile, in first-token objectives
FULL, FAST = 0, 1  # profiles
START_ROWS, LEAST_ROWS = 16.0, 1.0  # initial and smallest limit of rows
LOST_SHARE = 0.25  # share of the limit above which requests that are already late may not join
FALSE_ALARM = 0.01  # the guard's false-alarm probability per watch
CLEAN_START, LATER = 50, 0.2  # answers reread per watch at the full share; factor on the share afterwards


def applies_to(model: nn.Module) -> str | None:
    """Return None if rows can join this model's running batch, else the reason."""
    return batch_cache.joinable(model)


def check(**knobs: float) -> None:
    """Raise UserError for a knob out of its range."""
    for name, value in knobs.items():
        low, high = SEARCH_SPACE[name]["range"]
        if not low <= value <= high:
            raise UserError(f"feedback_mechanisms: {name} {value}; expected a value in [{low:g}, {high:g}]")


# --- loop 1: latency by the batch limit and by the profile -----------------------------------------------------------


@dataclass
class Switch:
    """Chooses the profile for new requests: FULL, or FAST under pressure.

    Pressure: the first request in the queue has waited for a fifth of its first-token objective, or the time per token
    exceeds its objective. Back to FULL after `hold` seconds without pressure, if the time per token would stay within
    the objective; a return that does not last doubles the next hold. saving: time per request, full ÷ fast profile.
    `course` holds (second, profile) of every change.
    """

    objectives: Objectives
    saving: float
    profile: int = FULL
    since: float = 0.0
    factor: float = HOLD
    course: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now: float, wait: float, signal: float) -> None:
        """Register the longest wait and the filtered seconds per token; change the profile if that is due."""
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
    """A policy of the server loop whose batch limit steers the measured seconds per token to setpoint × objective.

    Signal: seconds between a row's tokens, including prefills of other requests. Filter: exponential, over about
    1/FILTER decode steps, since one prefill takes as long as several of them. Within `band` of the setpoint the limit
    does not move (`Restraint`); the band does not extend beyond the objective. The limit rises only while it is what
    keeps requests waiting, and falls from the number of rows in use if that is smaller. Otherwise it would wind up
    under low load, overshoot at the first peak, and then fall for long without effect (conditional integration and
    tracking: Åström and Hägglund 2006, *Advanced PID control*, on windup).

    With a `switch` the loop also sets the `profile`. After a change, while rows of both profiles still cost a step of
    each, the limit does not fall. `patience_seconds` is the longest wait after which a request can still meet its
    objective (default: the whole first-token objective). `course` holds (second, limit, signal) of every decision.
    """

    def __init__(
        self,
        law: PI | Aimd,
        objectives: Objectives,
        *,
        setpoint: float = 0.8,
        band: float = BAND,
        most: int = MOST_ROWS,
        switch: Switch | ProfileBandit | None = None,
        patience_seconds: float | None = None,
    ):
        check(setpoint=setpoint)
        self.law, self.target, self.most, self.switch = law, setpoint * objectives.token_seconds, most, switch
        self.restraint = Restraint(band, min(band, -math.log(setpoint)), *law.rests)
        self.name = f"{law.name} loop" if switch is None else f"{law.name} loop, two profiles"
        self.patience = objectives.first_token_seconds if patience_seconds is None else patience_seconds
        self.limit, self.bound, self.wait = START_ROWS, False, 0.0
        self.pending, self.count, self.used = 0.0, 0, 0.0
        self.signal: float | None = None
        self.course: list[tuple[float, float, float]] = []

    @property
    def size(self) -> int:
        """The batch limit as a whole number of rows."""
        return max(1, min(self.most, math.floor(self.limit + 1e-9)))

    @property
    def changes(self) -> list[tuple[float, int]]:
        """The (second, profile) of every change of the profile."""
        return self.switch.course if self.switch else []

    @property
    def profile(self) -> int:
        """The profile for requests admitted now."""
        return self.switch.profile if self.switch else FULL

    def decide(self, view: View) -> Decision:
        """Admit as many requests as the limit and the server's memory have room for.

        Requests that are already late, which the server offers only if no others wait, join only up to a LOST_SHARE of
        the limit; the other rows are reserved for requests that can still meet their objective (trunk reservation:
        Kelly 1991, *Loss networks*, The Annals of Applied Probability 1). Otherwise the backlog of a peak would fill
        the server, and the calm after it would be missed too.

        The switch sees the wait of the first request in the queue only if some must keep waiting and that request can
        still meet its objective: a request admitted now needs no faster profile, and a late one gains nothing by it.
        """
        free = self.size - len(view.running)
        some_wait = min(free, view.room) < len(view.waiting)
        self.bound |= free < len(view.waiting)
        wait = view.now - view.waiting[0].arrival
        self.wait = wait if some_wait and wait <= self.patience else 0.0
        self._look(view.now)
        if view.now - view.waiting[-1].arrival > self.patience:  # even the newest in the queue is late
            free = max(1, int(LOST_SHARE * self.size)) - len(view.running)
        return Decision(max(0, min(free, view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Register a step; decide again after every PERIOD_STEPS decode steps."""
        prefilled = step.batch if step.kind == "prefill" else 0  # counted as running, but not delayed by this step
        if step.running > prefilled:
            self.pending += step.seconds
        if step.kind != "decode":
            return
        self.signal = self.pending if self.signal is None else self.signal + FILTER * (self.pending - self.signal)
        self.pending, self.count = 0.0, self.count + 1
        self.used = max(float(step.running), (1 - FILTER) * self.used)
        end = step.start + step.seconds
        self.wait = self.wait if step.waiting else 0.0
        self._look(end)
        if self.count % PERIOD_STEPS == 0:
            self.restraint.passed(PERIOD_STEPS)
            self._act(math.log(self.target / max(self.signal, 1e-9)))
            self.course.append((end, self.limit, self.signal))
            self.bound = False

    def _look(self, now: float) -> None:
        """Update the switch; a change of the profile keeps the limit from falling."""
        if self.switch:
            before = self.switch.profile
            self.switch.look(now, self.wait, self.signal or 0.0)
            if self.switch.profile != before:
                self.restraint.hold(SWITCH_STEPS)

    def _act(self, error: float) -> None:
        move = self.law.move(error, self.limit) if isinstance(self.law, Aimd) else self.law.move(error)
        if not self.restraint.allows(error, move) or (move > 0 and not self.bound):
            return
        start = self.limit if move > 0 else min(self.limit, self.used)
        move = min(max(move, -MOST_CHANGE), MOST_CHANGE)
        self.limit = min(max(start * math.exp(move), LEAST_ROWS), float(self.most))
        self.restraint.moved(move)


# --- loop 2: quality by shadow runs ----------------------------------------------------------------------------------


@dataclass
class Guard:
    """Watches a profile by the losses of its shadowed answers; decides when to roll it back and when to try it again.

    bound: maximum mean loss, whatever the loss was when the profile was chosen. share: share of answers shadowed;
    `later`, if given, replaces it after CLEAN_START of them, so a fault that begins then shows later. cool_down:
    seconds until the profile is tried again, doubled by every further breach. `events` holds (second, event).
    """

    bound: float
    share: float
    cool_down: float
    seed: int = 0
    later: float | None = None
    trusted: bool = True
    until: float = 0.0
    breaches: int = 0
    chosen: int = 0
    events: list[tuple[float, str]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(shadow_share=self.share, quality_bound=self.bound)
        self.random = random.Random(self.seed)
        self.test = self._watch()

    def _watch(self) -> BreachTest:
        return BreachTest(self.bound, FALSE_ALARM)

    @property
    def estimate(self) -> float | None:
        """The mean loss of the present watch; None before the first shadowed answer."""
        return self.test.mean

    @property
    def fresh(self) -> bool:
        """Whether the present watch has not had its clean start yet."""
        return self.chosen < CLEAN_START

    def wants(self, draw: float | None = None) -> bool:
        """Return whether to shadow this answer.

        Decided by `draw` in [0, 1), by default the guard's own random number; it must not depend on the answer.
        """
        if not self.trusted:
            return False
        share = self.share if self.later is None or self.fresh else self.later
        wanted = (self.random.random() if draw is None else draw) < share
        self.chosen += wanted
        return wanted

    def add(self, second: float, loss: float) -> bool:
        """Register the loss of a shadowed answer; return whether the profile has to be rolled back now."""
        self.losses.append((second, loss))
        if not self.trusted or not self.test.add(loss):
            return False
        self.trusted = False
        self.until = second + self.cool_down * 2**self.breaches
        self.breaches += 1
        self.events.append((second, "rolled back"))
        return True

    def ready(self, second: float) -> bool:
        """Return whether the cool-down has just ended; if so, put the profile on trial again, with a new test."""
        if self.trusted or second < self.until:
            return False
        self.trusted, self.test, self.chosen = True, self._watch(), 0
        self.events.append((second, "tried again"))
        return True
