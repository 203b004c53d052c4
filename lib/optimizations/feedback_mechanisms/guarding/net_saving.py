"""The net saving of a fast profile, after the cost of the guard's rereading, and the saving a server needs to keep up.

Computed from step times; serves nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lib.measure.metrics.catalogue import SPEED_MARGIN
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths

AT_ONCE = 8  # answers reread in one pass
DRAWS, ENDS, LEVEL = 99, (5.0, 50.0, 95.0), 0.95  # resampled calibrations, percentiles of their results, and level
MOST = 16.0  # largest speed-up considered


@dataclass(frozen=True)
class NetSaving:
    """The server's time per request with the full profile ÷ that with the fast one, with the rereading of its answers
    included at the initial share; `low` and `high` are the ends of the 90 % interval.
    """

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f}× ({self.low:.2f} to {self.high:.2f})"

    @property
    def refused(self) -> str | None:
        """Why such a profile is not admitted; None if it is shown to be faster by more than the margin."""
        if self.low > 1 + SPEED_MARGIN:
            return None
        return f"not shown to be faster, guard charged: {self}, needs {1 + SPEED_MARGIN:.2f}×"


def charge(full: StepTimes, lengths: Lengths, share: float) -> float:
    """Return the server's seconds per answer of the fast profile spent on rereading `share` of these answers."""
    return share * full.prefill(AT_ONCE, lengths.prompt_tokens + lengths.new_tokens) / AT_ONCE


def ratio(full: StepTimes, fast: StepTimes, lengths: Lengths, share: float, rows: int) -> float:
    """Return the server's seconds per request, full ÷ fast with `share` of the answers reread, at `rows` rows."""
    seconds = [1 / times.sustained(rows, lengths)[1] for times in (full, fast)]
    return seconds[0] / (seconds[1] + charge(full, lengths, share))


def measured(full: StepTimes, fast: StepTimes, lengths: Lengths, share: float, rows: int) -> NetSaving:
    """Return `ratio` with its bootstrap interval over whole rounds of the calibration.

    Both profiles took turns in each round, so the same rounds are drawn for both; a slow spell that fell on only one of
    them widens the interval. A bootstrap of few rounds is too narrow, so the interval is widened by sqrt(n/(n − 1)) and
    by Student's quantile over the normal one (Hesterberg 2015, *What teachers should know about the bootstrap*, The
    American Statistician 69, narrowness bias).
    """
    count = min(full.rounds, fast.rounds)
    random = np.random.default_rng(0x4E7)
    rounds = [random.integers(0, count, count).tolist() for _ in range(DRAWS)]
    drawn = [ratio(full.of_rounds(chosen), fast.of_rounds(chosen), lengths, share, rows) for chosen in rounds]
    low, middle, high = np.percentile(drawn, ENDS)
    wider = 1.0
    if count > 1:
        wider = math.sqrt(count / (count - 1)) * float(stats.t.ppf(LEVEL, count - 1) / stats.norm.ppf(LEVEL))
    return NetSaving(*(float(middle * (end / middle) ** wider) for end in (low, middle, high)))


def most_in_time(full: StepTimes, lengths: Lengths, rate: float, token_seconds: float, slowness: float = 1.0) -> float:
    """Return the largest share of `rate` requests per second that the full profile can keep within the objective per
    token in the long run, with any limit of rows, on a machine that is `slowness` times slower; 1 without requests.
    """
    capacity = full.capacity(lengths, token_seconds / slowness)[0] / slowness
    return min(1.0, capacity / rate) if rate else 1.0


def required(
    full: StepTimes, lengths: Lengths, rate: float, token_seconds: float, slowness: float = 1.0
) -> float | None:
    """Return the speed-up over the full profile, guard charged, that serves `rate` requests per second within the
    objective per token, on a machine that is `slowness` times slower; None if not even `MOST` is enough.
    """
    low, high = 0.0, MOST

    def keeps_up(factor: float) -> bool:  # steps that take 1/factor of the time
        return factor * full.capacity(lengths, factor * token_seconds)[0] >= rate

    if not keeps_up(MOST):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps_up(middle) else (middle, high)
    return slowness * high
