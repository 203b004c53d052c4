"""Fronts and dominated areas against counting squares, inclusion and exclusion, and random points."""

import itertools

import numpy as np
import pytest

from lib.optimizations.common.search import pareto


def _by_inclusion_and_exclusion(points, reference) -> float:
    """Return the area of a union of rectangles, each from a point to the reference, over all subsets of points."""
    area = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            width = max(reference[0] - max(x for x, _ in subset), 0.0)
            height = max(reference[1] - max(y for _, y in subset), 0.0)
            area += (-1) ** (size + 1) * width * height
    return area


def test_front_and_hypervolume():
    points = [(0.5, 0.5), (0.2, 0.8), (0.6, 0.6), (0.5, 0.5), (0.2, 0.9), (2.0, 0.1)]
    assert pareto.front(points) == [1, 0, 5]
    assert pareto.hypervolume(points, (1.0, 1.0)) == pytest.approx(0.8 * 0.2 + 0.5 * 0.3)
    assert pareto.hypervolume([], (1.0, 1.0)) == 0


def test_no_point_dominates_the_front():
    points = [tuple(point) for point in np.random.default_rng(2).random((60, 2)).round(2)]
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)  # noqa: E731
    assert {points[index] for index in pareto.front(points)} == {point for point in points if not beaten(point)}


@pytest.mark.parametrize("seed", range(6))
def test_hypervolume_matches_inclusion_and_exclusion(seed):
    points = [tuple(point) for point in np.random.default_rng(seed).random((9, 2)) * 1.3]
    for reference in ((1.0, 1.0), (0.7, 1.1)):
        expected = _by_inclusion_and_exclusion(points, reference)
        assert pareto.hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_matches_the_dominated_share_of_random_points():
    draw = np.random.default_rng(1)
    points, samples = draw.random((20, 2)), draw.random((200_000, 2))
    dominated = (samples[:, None] >= points[None]).all(-1).any(1)
    volume = pareto.hypervolume([tuple(point) for point in points], (1.0, 1.0))
    assert volume == pytest.approx(dominated.mean(), abs=5 * 0.5 / np.sqrt(len(samples)))


def test_progress_is_monotonic_and_reaches_its_level():
    points = [(0.9, 0.9), (0.5, 0.5), (0.95, 0.95), (0.1, 0.1)]
    curve = pareto.progress(points, (1.0, 1.0))
    assert (np.diff(curve) >= 0).all() and curve[-1] == pytest.approx(0.81)
    assert pareto.evaluations_until(curve, 0.2) == 2
    assert pareto.evaluations_until(curve, 0.9) is None


def test_the_gain_is_relative_to_the_mean_of_the_random_arms():
    volumes = {"search": 0.6, "random": 0.2, "random, 1": 0.4, "greedy": 9.0}
    assert pareto.of_random(volumes) == [0.2, 0.4]
    assert pareto.gain(volumes) == pytest.approx(2.0)
    assert pareto.gain({"search": 0.6, "random": 0.0}) is None
