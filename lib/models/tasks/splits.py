"""Assigns the items of a public task to the splits calibration, search and final, and selects those that a run uses.

The draw depends only on the name of the task, so that every model and every arm gets the same items, and a longer run
includes those of a shorter one. Knows nothing of what an item is.
"""

import zlib

import numpy as np

from lib.errors import UserError, suggest
from lib.models.tasks.corpus import SPLITS

SHARES = {"calibration": 0.1, "search": 0.2, "final": 0.7}


def chosen(task: str, count: int, split: str, limit: int | None = None) -> list[int]:
    """Return the indices (ascending) of the items of a split, at most `limit`, for a task of `count` items.

    The splits are disjoint. Raises UserError for an unknown split and for an empty one.
    """
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}"; expected one of {", ".join(SPLITS)}.{suggest(split, SPLITS)}')
    order = np.random.default_rng(zlib.crc32(task.encode())).permutation(count)
    first = 0
    for name, share in SHARES.items():
        last = count if name == "final" else first + round(share * count)
        if name == split:
            part = order[first:last][:limit]
            if not len(part):
                raise UserError(f'{task}: holds {count} items, none for the split "{split}"')
            return sorted(part.tolist())
        first = last
    raise AssertionError(split)
