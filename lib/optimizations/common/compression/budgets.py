"""How much each block loses, where not all lose the same: a block with more outliers loses less (Yin et al. 2024, OWL).

Knows nothing of what is lost, or how outliers are counted.
"""

from collections.abc import Mapping

BUDGETS = ("uniform", "owl")
OUTLIER = 5.0  # times the mean of a block's scores, section 3
SPREAD = 0.08  # of the blocks' shares around their mean, the same


def by_outliers(outliers: Mapping[int, float], sizes: Mapping[int, float], share: float) -> dict[int, float]:
    """Return the share that each block loses, by index; weighed by `sizes` it is `share`.

    outliers: the share of a block's scores above OUTLIER times their mean. Blocks lie at most SPREAD above or below
    `share`, where the ends of the range allow it.
    """
    low, high = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
    if high == low:
        return dict.fromkeys(outliers, share)
    spread = min(SPREAD, share, 1 - share)
    spared = {index: 2 * spread * (value - low) / (high - low) for index, value in outliers.items()}
    mean = sum(spared[index] * sizes[index] for index in spared) / sum(sizes.values())
    return {index: min(max(share - value + mean, 0.0), 0.999) for index, value in spared.items()}
