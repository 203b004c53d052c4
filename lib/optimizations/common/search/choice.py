"""Choosing where times are noisy: near-ties are settled by a rule that does not depend on noise.

Two candidates whose times differ by less than the practical margin are as good as each other, and which of them
happened to be timed faster says nothing. So of all within the margin of the best the first is taken, in an order that
was fixed before anything was timed: the one that changes least, then the smallest, then by name. Knows nothing of what
is chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lib.measure.metrics.catalogue import SPEED_MARGIN

Candidate = TypeVar("Candidate")


def steady(
    candidates: Sequence[Candidate],
    cost: Callable[[Candidate], float],
    order: Callable[[Candidate], Any],
    margin: float = SPEED_MARGIN,
) -> Candidate:
    """Return, of the candidates whose cost is within `margin` (a share) of the least, the first by `order`.

    Costs are not negative: times, or what else is to be small. Raises ValueError where there is no candidate.
    """
    if not candidates:
        raise ValueError("there is no candidate to choose from")
    limit = min(cost(candidate) for candidate in candidates) * (1 + margin)
    return min((c for c in candidates if cost(c) <= limit), key=order)
