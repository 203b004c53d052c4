"""Laws of control: by how much a limit should move for an error, and whether it may move now.

The error is ln(setpoint / signal): positive, there is room. `PI` and `Aimd` say by how much ln(limit) should change;
`Restraint` keeps a limit from swinging, as control practice does:

- a *dead band* round the setpoint: a limit of whole rows cannot hold a signal exactly, so its target is a range (Lim,
  Babu, Chase and Parekh 2009, *Automated control in cloud computing*, ACDC: proportional thresholding; the tolerance of
  Kubernetes' horizontal autoscaler is one);
- *hysteresis*: a move that has begun goes on until the setpoint is crossed, or the limit would stay at the band's edge,
  where noise moves it again (relays with hysteresis: Åström and Hägglund 2006, *Advanced PID control*);
- *a rest after a move*, until the signal shows it: else every decision within the loop's delay repeats the move, and
  the limit overshoots (TCP shrinks its window once per round trip for that reason: Jacobson 1988, *Congestion avoidance
  and control*, SIGCOMM).

Knows no server.
"""

import math
from dataclasses import dataclass

BAND = 0.2  # of ln(signal) round the setpoint, to either side, within which the limit stands still
AFTER_RISE, AFTER_FALL = 8, 16  # decode steps that AIMD rests: rows join at once, and leave when their answers end
MOST_CHANGE = math.log(2)  # of the limit, per move


@dataclass
class PI:
    """Proportional-integral law in velocity form, so nothing winds up at a bound.

    A move is gain·(Δerror + error/reset). The error is ln(setpoint / signal): positive, there is room. `reset` in
    decisions. A move is so small that none needs a rest.
    """

    gain: float = 0.2
    reset: float = 8.0
    name: str = "PI"
    rests: tuple[int, int] = (0, 0)
    last: float | None = None

    def move(self, error: float) -> float:
        """Return by how much ln(limit) should change."""
        change = error - (error if self.last is None else self.last)
        self.last = error
        return self.gain * (change + error / self.reset)


@dataclass
class Aimd:
    """One more while there is room, and fewer in proportion to the excess where there is none (as Alizadeh et al. 2010,
    *Data center TCP*, SIGCOMM, section 3.3): what is left never lies below what is needed, since a part of the time per
    token does not depend on the rows. `limit` is where the actuator stands; `rests` are the steps after a rise and
    after a fall.
    """

    name: str = "AIMD"
    rests: tuple[int, int] = (AFTER_RISE, AFTER_FALL)

    def move(self, error: float, limit: float) -> float:
        """Return by how much ln(limit) should change."""
        return math.log(1 + 1 / limit) if error > 0 else error


@dataclass
class Restraint:
    """Whether a limit may move now.

    below, above: by how much ln(signal) may lie below the setpoint before the limit rises, above it before it falls.
    after_rise, after_fall: decode steps to rest after either. heading: the direction of a move that has begun, 0 for
    none; `rest`, `held`: decode steps for which the limit does not move yet, and for which it does not fall yet.
    """

    below: float = BAND
    above: float = BAND
    after_rise: int = 0
    after_fall: int = 0
    heading: int = 0
    rest: int = 0
    held: int = 0

    def passed(self, steps: int) -> None:
        """Take in that so many decode steps have passed."""
        self.rest, self.held = max(0, self.rest - steps), max(0, self.held - steps)

    def allows(self, error: float, move: float) -> bool:
        """Return whether the limit may make this move at this error."""
        if error > self.below:
            self.heading = 1
        elif error < -self.above:
            self.heading = -1
        elif error * self.heading <= 0:
            self.heading = 0
        return move * self.heading > 0 and not self.rest and not (move < 0 and self.held)

    def moved(self, move: float) -> None:
        """Rest after a move."""
        self.rest = self.after_rise if move > 0 else self.after_fall

    def hold(self, steps: int) -> None:
        """Do not let the limit fall for so many decode steps: something else has been changed, and must show first."""
        self.held = max(self.held, steps)
