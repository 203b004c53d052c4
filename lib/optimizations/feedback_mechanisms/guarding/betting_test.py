"""A sequential test, valid after every item, of whether a mean loss exceeds a bound.

Testing by betting (Waudby-Smith and Ramdas 2024, *Estimating means of bounded random variables by betting*, JRSSB 86,
section 4): a gambler bets that losses in [0, 1] exceed `bound`. While their mean does not, the expected capital never
grows, so by Ville's inequality it ever reaches 1/alpha with probability at most alpha, however often the test is
consulted. Independent of models.
"""

from dataclasses import dataclass, field

from lib.errors import UserError

FADING = 0.95  # decay per loss of earlier losses, in the mean that sets the stake


@dataclass
class BreachTest:
    """Watches losses in [0, 1]; `add` returns whether their mean has been shown to exceed `bound`.

    The stake on each loss is computed from the losses before it: (mean − bound) ÷ (variance + (mean − bound)²), the
    growth-optimal stake to second order, clipped to [0, 3/(4·bound)]. Mean and variance weight recent losses more: any
    stake that does not look ahead is fair, and a fault may begin late. Raises UserError for a bound or alpha outside
    (0, 1).
    """

    bound: float
    alpha: float = 0.01
    capital: float = 1.0
    losses: list[float] = field(default_factory=list)
    recent: tuple[float, float, float] = (1.0, 0.5, 0.5)  # decayed count, sum and sum of squares

    def __post_init__(self) -> None:
        for name in ("bound", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"sequential test: {name} {getattr(self, name)}; expected a value between 0 and 1")

    @property
    def breached(self) -> bool:
        """Whether the capital has reached 1/alpha."""
        return self.capital >= 1 / self.alpha

    @property
    def mean(self) -> float | None:
        """The mean of the losses seen; None before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def add(self, loss: float) -> bool:
        """Add a loss; return whether the bound has been shown to be breached. Raises UserError outside [0, 1]."""
        if not 0 <= loss <= 1:
            raise UserError(f"sequential test: loss {loss}; expected a value in [0, 1]")
        if not self.breached:
            self.capital *= 1 + self._stake() * (loss - self.bound)
        self.losses.append(loss)
        count, total, squares = self.recent
        self.recent = FADING * count + 1.0, FADING * total + loss, FADING * squares + loss * loss
        return self.breached

    def _stake(self) -> float:
        # The prior is one loss at 1/2 with variance 1/4.
        count, total, squares = self.recent
        mean = total / count
        variance = max(1e-4, squares / count - mean**2)
        edge = mean - self.bound
        return min(max(0.0, edge / (variance + edge**2)), 0.75 / self.bound)
