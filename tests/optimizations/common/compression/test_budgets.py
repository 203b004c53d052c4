"""Shares by block: their weighted mean is the requested one, and none deviates by more than the allowed spread."""

from itertools import pairwise

import pytest

from lib.optimizations.common.compression.budgets import SPREAD, by_outliers


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.97, 0.999])
@pytest.mark.parametrize(
    "outliers",
    [
        [0.0] * 7 + [0.3],
        [0.3] * 7 + [0.0],
        [0.0, 0.0, 0.0, 0.2],
        [0.01, 0.05, 0.02, 0.3, 0.0],
    ],
)
@pytest.mark.parametrize("even", [True, False])
def test_the_mean_is_kept_and_no_block_exceeds_the_spread(outliers, share, even):
    sizes = {index: 100.0 if even else 10.0 * (index + 1) for index in range(len(outliers))}
    shares = by_outliers(dict(enumerate(outliers)), sizes, share)
    mean = sum(shares[index] * sizes[index] for index in sizes) / sum(sizes.values())
    assert mean == pytest.approx(share, abs=1e-9)
    assert all(abs(value - share) <= SPREAD + 1e-9 and -1e-9 <= value <= 0.999 + 1e-9 for value in shares.values())
    ranked = sorted(shares, key=outliers.__getitem__)
    assert all(shares[fewer] >= shares[more] for fewer, more in pairwise(ranked)), "more outliers lose less"


def test_identical_blocks_lose_equal_shares():
    assert by_outliers({0: 0.1, 1: 0.1}, {0: 1.0, 1: 5.0}, 0.4) == {0: 0.4, 1: 0.4}
    assert by_outliers({}, {}, 0.4) == {}


def test_the_spread_is_used_where_blocks_differ_in_both_directions():
    shares = by_outliers({0: 0.0, 1: 0.1, 2: 0.2}, dict.fromkeys(range(3), 1.0), 0.5)
    assert shares == pytest.approx({0: 0.5 + SPREAD, 1: 0.5, 2: 0.5 - SPREAD})


def test_a_block_with_nothing_to_lose_spreads_nothing():
    """The first block of GLM is dense: it has no experts, and no outliers that those of the others exceed."""
    outliers, sizes = {0: 0.0, 1: 0.020, 2: 0.021, 3: 0.022}, {0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0}
    shares = by_outliers(outliers, sizes, 0.5)
    assert shares == pytest.approx({0: 0.5, 1: 0.5 + SPREAD, 2: 0.5, 3: 0.5 - SPREAD})
    assert by_outliers({0: 0.0, 1: 0.1}, {0: 0.0, 1: 0.0}, 0.5) == {0: 0.5, 1: 0.5}
