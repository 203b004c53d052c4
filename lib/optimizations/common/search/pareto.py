"""Pareto fronts of two objectives that are both minimized, and the hypervolume that a front dominates.

Points are (x, y); the reference is the worst point that still counts. The hypervolume is written out here because no
library already installed offers it: Optuna computes it in a private module and publishes only a plot, and pymoo or
moocore would be one more dependency for a sum over a sorted front.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the non-dominated points, by ascending x and without duplicates."""
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
    """Return the hypervolumes of the random-search arms, those of `volumes` whose name starts with "random"."""
    return [volume for arm, volume in volumes.items() if arm.startswith("random")]


def gain(volumes: Mapping[str, float]) -> float | None:
    """Return the hypervolume of the arm "search" ÷ the mean of the random arms; None if these dominate nothing."""
    mean = float(np.mean(of_random(volumes)))
    return volumes["search"] / mean if mean else None


def progress(points: Sequence[Point], reference: Point) -> np.ndarray:
    """Return the hypervolume after each of the points, in the order given."""
    return np.array([hypervolume(points[: n + 1], reference) for n in range(len(points))])


def evaluations_until(curve: Sequence[float], level: float) -> int | None:
    """Return the number of evaluations after which `curve` first reaches `level`; None if it never does."""
    reaching = np.flatnonzero(np.asarray(curve) >= level)
    return int(reaching[0]) + 1 if len(reaching) else None
