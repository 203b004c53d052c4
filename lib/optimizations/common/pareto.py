"""Fronts of two objectives that are both to be small: who is not beaten, how much is gained, how a search came there.

Knows nothing of what the objectives are. Points are (x, y); the reference is the worst point that still counts.
"""

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point beats in both objectives, by ascending x; no duplicates."""
    order = sorted(range(len(points)), key=lambda index: (points[index], index))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] < points[kept[-1]][1]:
            kept.append(index)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that the points dominate within `reference`, in the product of the objectives' units."""
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    area, edge = 0.0, reference[1]
    for index in front(inside):
        x, y = inside[index]
        area += (reference[0] - x) * (edge - y)
        edge = y
    return area


def progress(points: Sequence[Point], reference: Point) -> np.ndarray:
    """Return the hypervolume after each point, in the order in which they were found."""
    return np.array([hypervolume(points[: n + 1], reference) for n in range(len(points))])


def evaluations_until(curve: Sequence[float], level: float) -> int | None:
    """Return after how many evaluations a curve first reaches `level`; None where it never does."""
    reached = np.flatnonzero(np.asarray(curve) >= level)
    return int(reached[0]) + 1 if len(reached) else None
