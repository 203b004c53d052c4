"""Non-uniform budgets over blocks: a block with more outliers is compressed less (Yin et al. 2024, OWL).

Independent of the compression method and of how outliers are counted.
"""

from collections.abc import Mapping

BUDGETS = ("uniform", "owl")
OUTLIER = 5.0  # times the mean of a block's scores, section 3
SPREAD = 0.08  # largest deviation of a block's share from the mean, section 3
MOST, TINY = 0.999, 1e-12  # the largest share a block may lose; deviations below TINY count as none


def by_outliers(outliers: Mapping[int, float], sizes: Mapping[int, float], share: float) -> dict[int, float]:
    """Return the share that each block loses, by index; the mean weighted by `sizes` is `share`.

    outliers: the share of a block's scores above OUTLIER times their mean. Shares deviate from `share` by at most
    SPREAD, less near 0 and MOST. A block of size 0 (a dense block where experts are pruned) has nothing to lose: it
    gets `share` and does not affect the others.
    """
    known = {index: value for index, value in outliers.items() if sizes[index]}
    low, high = min(known.values(), default=0.0), max(known.values(), default=0.0)
    if high == low:
        return dict.fromkeys(outliers, share)
    values = {index: 2 * SPREAD * (value - low) / (high - low) for index, value in known.items()}
    mean = sum(values[index] * sizes[index] for index in values) / sum(sizes[index] for index in values)
    spared = {index: value - mean for index, value in values.items()}
    most, least = max(*spared.values(), TINY), max(*(-value for value in spared.values()), TINY)
    scale = min(1.0, SPREAD / max(most, least), share / most, max(0.0, MOST - share) / least)
    return {index: max(0.0, share - scale * spared.get(index, 0.0)) for index in outliers}
