"""Fronts of two objectives that are both to be small: which points are not dominated, and the area that they dominate.

Points are (x, y); the reference is the worst point that still counts. Knows nothing of what the objectives are. Written
here because no library that is installed anyway offers the area: Optuna computes it in a private module and publishes a
plot of it alone, and pymoo or moocore would each be a further dependency, for a sum over a sorted front.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point beats in both objectives, by ascending x; no duplicates."""
    order = sorted(range(len(points)), key=lambda index: (points[index], index))
    indices: list[int] = []
    for index in order:
        if not indices or points[index][1] < points[indices[-1]][1]:
            indices.append(index)
    return indices


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that the points dominate within `reference`, in the product of the objectives' units."""
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    area, edge = 0.0, reference[1]
    for index in front(inside):
        x, y = inside[index]
        area += (reference[0] - x) * (edge - y)
        edge = y
    return area


def of_random(volumes: Mapping[str, float]) -> list[float]:
    """Return the hypervolumes of the arms that were drawn at random, from those of all arms by name."""
    return [volume for arm, volume in volumes.items() if arm.startswith("random")]


def gain(volumes: Mapping[str, float]) -> float | None:
    """Return the hypervolume of the arm `search` ÷ the mean of the random ones; None where those dominate nothing."""
    mean = float(np.mean(of_random(volumes)))
    return volumes["search"] / mean if mean else None


def progress(points: Sequence[Point], reference: Point) -> np.ndarray:
    """Return the hypervolume after each point, in their order."""
    return np.array([hypervolume(points[: n + 1], reference) for n in range(len(points))])


def evaluations_until(curve: Sequence[float], level: float) -> int | None:
    """Return after how many evaluations a curve first reaches `level`; None where it never does."""
    reaching = np.flatnonzero(np.asarray(curve) >= level)
    return int(reaching[0]) + 1 if len(reaching) else None
