"""Which items of a public task belong to calibration, search and judgement, and which of them a run asks.

Drawn by the name of the task alone, so that every model and every arm is asked the same ones, and a longer run asks
those of a shorter one too. Knows nothing of what an item is.
"""

import zlib

import numpy as np

from lib.errors import UserError, suggest
from lib.models.tasks.corpus import SPLITS

SHARES = {"calibration": 0.1, "search": 0.2, "final": 0.7}


def chosen(task: str, count: int, split: str, limit: int | None = None) -> list[int]:
    """Return the indices, ascending, of at most `limit` of the `count` items of a task that belong to a split.

    The splits share no index. Raises UserError for an unknown split, and where a split holds none.
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
