"""Choose the fastest candidate under noisy timing: near-ties are settled by a rule that does not depend on noise.

Candidates whose times differ by less than the practical margin are equally good; which was timed faster is chance. Of
all candidates within the margin of the best, `steady` takes the first in an order fixed before timing, for example
least changed, then smallest, then by name.
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
    """Return the first candidate by `order` among those whose cost is within `margin` (a share) of the lowest.

    Costs, such as times, are not negative. Raises ValueError if there is no candidate.
    """
    if not candidates:
        raise ValueError("there is no candidate to choose from")
    limit = min(cost(candidate) for candidate in candidates) * (1 + margin)
    return min((c for c in candidates if cost(c) <= limit), key=order)
