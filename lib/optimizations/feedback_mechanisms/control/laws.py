"""Control laws: how far a limit should move for an error, and whether it may move now.

The error is ln(setpoint / signal); positive means there is room. `PI` and `Aimd` return the change of ln(limit);
`Restraint` keeps a limit from swinging, by standard means of control:

- a *dead band* around the setpoint: a limit of whole rows cannot hold a signal exactly, so its target is a range (Lim,
  Babu, Chase and Parekh 2009, *Automated control in cloud computing*, ACDC: proportional thresholding; the tolerance of
  Kubernetes' horizontal autoscaler is another example);
- *hysteresis*: a move once begun continues until the setpoint is crossed; otherwise the limit would stay at the band's
  edge, where noise moves it again (relays with hysteresis: Åström and Hägglund 2006, *Advanced PID control*);
- *a rest after a move*, until the signal shows its effect; otherwise every decision within the loop's delay repeats the
  move, and the limit overshoots (for that reason TCP shrinks its window only once per round trip: Jacobson 1988,
  *Congestion avoidance and control*, SIGCOMM).

Independent of servers.
"""

import math
from dataclasses import dataclass

BAND = 0.2  # half-width of the dead band around the setpoint, in ln(signal)
AFTER_RISE, AFTER_FALL = 8, 16  # decode steps that AIMD rests: rows join at once, but leave when their answers end
MOST_CHANGE = math.log(2)  # largest change of ln(limit) per move


@dataclass
class PI:
    """Proportional-integral law in velocity form, so that nothing winds up at a bound.

    A move is gain·(Δerror + error/reset), with `reset` in decisions. The error is ln(setpoint / signal); positive means
    there is room. Moves are too small to need a rest.
    """

    gain: float = 0.2
    reset: float = 8.0
    name: str = "PI"
    rests: tuple[int, int] = (0, 0)
    last: float | None = None

    def move(self, error: float) -> float:
        """Return the change of ln(limit)."""
        change = error - (error if self.last is None else self.last)
        self.last = error
        return self.gain * (change + error / self.reset)


@dataclass
class Aimd:
    """Additive increase by one row while there is room; otherwise a decrease in proportion to the excess.

    As in Alizadeh et al. 2010, *Data center TCP*, SIGCOMM, section 3.3. The decrease never goes below the need, since
    part of the time per token does not depend on the rows. `rests`: steps to rest after a rise, and after a fall.
    """

    name: str = "AIMD"
    rests: tuple[int, int] = (AFTER_RISE, AFTER_FALL)

    def move(self, error: float, limit: float) -> float:
        """Return the change of ln(limit), given the actuator's present `limit`."""
        return math.log(1 + 1 / limit) if error > 0 else error


@dataclass
class Restraint:
    """Decides whether a limit may move now.

    below, above: how far ln(signal) may lie below the setpoint before the limit rises, and above it before it falls.
    after_rise, after_fall: decode steps to rest after a rise, and after a fall. heading: direction of the move under
    way, 0 for none. rest, held: decode steps for which the limit must not move, and must not fall.
    """

    below: float = BAND
    above: float = BAND
    after_rise: int = 0
    after_fall: int = 0
    heading: int = 0
    rest: int = 0
    held: int = 0

    def passed(self, steps: int) -> None:
        """Count down the rests by `steps` decode steps."""
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
        """Start the rest after a move."""
        self.rest = self.after_rise if move > 0 else self.after_fall

    def hold(self, steps: int) -> None:
        """Keep the limit from falling for `steps` decode steps, until another change has shown its effect."""
        self.held = max(self.held, steps)
