"""Step times: of decode by rows and context, of prefill by prompts and length, of moving rows by bytes. The simulation
draws from them, and capacity is derived from them; `lib.measure.serving.step_timing` measures them. Knows nothing about
policies.

All times are means. What a server can sustain follows from the mean of a call, which on a disturbed machine lies far
above the median. A point of the grid is the median of its few calls times the mean of measured ÷ median over all
points, so that a slow phase at one point does not distort the table there. The ratios of single calls to that mean are
stored, so that the simulation has the machine's own jitter around the same mean.

Decode times are a table with linear interpolation, since kernels change with the number of rows. Prefill and moving are
fitted by non-negative least squares in relative error. Measured ÷ fitted prefill is a table as well, since a core's
caches hold short prompts but not long ones.

Shapes: B rows or prompts, L context, T prompt tokens, G grid points.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import nnls

from lib.measure.serving.protocol import MOST_ROWS
from lib.measure.serving.traffic import Lengths

COLUMN_STEP = 16  # columns between entries of the dense table

Grid = dict[tuple[int, int], list[float]]  # seconds of the calls at each (rows or prompts, tokens)
Moves = dict[float, list[float]]  # seconds of the moves, by bytes


@dataclass(frozen=True)
class Calls:
    """Seconds of all timed calls: decode steps (`decoded`) and prefills (`read`) by point, moves (`moved`) by bytes;
    and the cache bytes per token of one row.
    """

    decoded: Grid
    read: Grid
    moved: Moves
    bytes_per_token: float

    @property
    def count(self) -> int:
        """The number of timed calls."""
        return sum(len(times) for part in (self.decoded, self.read, self.moved) for times in part.values())


@dataclass(frozen=True)
class StepTimes:
    """Mean step times in seconds. `decode_BL[b - 1][l // COLUMN_STEP]` is a decode step of b rows at l columns of
    context.

    `prefill_fit` holds (a, b, c) of seconds = a + b·n·T + c·n·T² for n prompts of T tokens, to be multiplied by
    `prefill_BT[n - 1][T // COLUMN_STEP]` (beyond the table's edges, by the edge). `move_fit` holds (a, b) of seconds =
    a + b·bytes for a row's joining or leaving. `decode_ratios` and `prefill_ratios` are single calls ÷ mean. `samples`
    is the number of timed calls, `calls` their times. `disturbed` is what disturbed the machine meanwhile.
    """

    decode_BL: tuple[tuple[float, ...], ...]
    prefill_fit: tuple[float, float, float]
    move_fit: tuple[float, float]
    decode_ratios: tuple[float, ...]
    prefill_ratios: tuple[float, ...]
    bytes_per_token: float
    samples: int
    measured: tuple[tuple[int, int, float], ...] = ()
    prefill_BT: tuple[tuple[float, ...], ...] = ((1.0,),)
    calls: Calls | None = field(default=None, repr=False, compare=False)
    disturbed: str | None = None

    def decode(self, batch: int, context: float) -> float:
        """Return the mean seconds of one step of `batch` rows at `context` columns."""
        return _at(self.decode_BL, batch, context)

    def prefill(self, count: int, tokens: float) -> float:
        """Return the mean seconds of reading `count` prompts of `tokens` tokens in one pass."""
        return self.behind(count, 0, tokens)

    def part(self, done: int, tokens: int) -> float:
        """Return the mean seconds of reading `tokens` further tokens of a prompt of which `done` tokens are cached.

        Derived from whole prefills: a part costs a separate call, and attends to everything before it.
        """
        return self.behind(1, done, done + tokens)

    def behind(self, count: int, done: int, tokens: float) -> float:
        """Return the mean seconds of one pass that reads the rest of `count` prompts of `tokens` tokens each, whose
        first `done` tokens are cached.
        """
        fixed, linear, square = self.prefill_fit
        seconds = fixed + linear * count * (tokens - done) + square * count * (tokens**2 - done**2)
        return seconds * _at(self.prefill_BT, count, tokens)

    def move(self, size: float) -> float:
        """Return the seconds of a move in a cache of `size` bytes: the mean of a row's joining and leaving."""
        return self.move_fit[0] + self.move_fit[1] * size

    def sustained(self, batch: int, lengths: Lengths) -> tuple[float, float]:
        """Return (seconds per output token after the first, requests per second) of a batch that is kept full with
        requests of mean lengths.

        Every request costs two moves and a separate prefill, which gives its first token while all other rows wait;
        every further token is a step.
        """
        prompt, new = lengths.prompt_tokens, lengths.new_tokens
        join = self.prefill(1, prompt) + 2 * self.move(batch * (prompt + new) * self.bytes_per_token)
        after = (new - 1) * self.decode(batch, prompt + new / 2) + (batch - 1) * join
        return after / (new - 1) if new > 1 else 0.0, batch / (after + join)

    def capacity(self, lengths: Lengths, token_seconds: float, most: int = MOST_ROWS) -> tuple[float, int]:
        """Return (rate in requests per second, batch) of the largest rate that meets the objective of `token_seconds`
        per token, for batches up to `most`; (0, 0) if there is none.
        """
        rates = [(self.sustained(batch, lengths), batch) for batch in range(1, most + 1)]
        return max(((rate, batch) for (per, rate), batch in rates if per <= token_seconds), default=(0.0, 0))

    def resampled(self, seed: int) -> "StepTimes":
        """Return the step times of resampled calls, drawn with replacement at every point: what another calibration of
        the same length might have measured. Times without their calls are returned unchanged.
        """
        if self.calls is None:
            return self
        random = np.random.default_rng([seed, 0x57E9])

        def drawn(seconds: Sequence[float]) -> list[float]:
            return random.choice(np.asarray(seconds), len(seconds)).tolist()

        decoded = {point: drawn(seconds) for point, seconds in self.calls.decoded.items()}
        read = {point: drawn(seconds) for point, seconds in self.calls.read.items()}
        moved = {size: drawn(seconds) for size, seconds in self.calls.moved.items()}
        return assembled(Calls(decoded, read, moved, self.calls.bytes_per_token))

    @property
    def rounds(self) -> int:
        """The number of rounds of calls, each of which times every point; 1 for times without their calls."""
        return 1 if self.calls is None else min(map(len, self.calls.decoded.values()))

    def of_rounds(self, chosen: Sequence[int]) -> "StepTimes":
        """Return the step times of the calls of the `chosen` rounds, which may repeat: a slow phase that lasted a round
        is in all points or in none. Times without their calls are returned unchanged.
        """
        if self.calls is None:
            return self

        def picked(seconds: Sequence[float]) -> list[float]:
            each = len(seconds) // self.rounds
            return [value for index in chosen for value in seconds[each * index : each * (index + 1)]]

        decoded = {point: picked(seconds) for point, seconds in self.calls.decoded.items()}
        read = {point: picked(seconds) for point, seconds in self.calls.read.items()}
        moved = {size: picked(seconds) for size, seconds in self.calls.moved.items()}
        return assembled(Calls(decoded, read, moved, self.calls.bytes_per_token))


@lru_cache(maxsize=256)
def drawn_again(times: StepTimes, seed: int) -> StepTimes:
    """Return `times.resampled(seed)`, cached, since many runs share a seed."""
    return times.resampled(seed)


def assembled(calls: Calls) -> StepTimes:
    """Return the step times computed from timed calls."""
    counts, contexts = (sorted({point[axis] for point in calls.decoded}) for axis in (0, 1))
    means = _means(calls.decoded)
    grid = np.array([[means[count, context] for context in contexts] for count in counts])
    read, moved = _means(calls.read), _means(calls.moved)
    fixed, linear, square = _fit([(1, n * t, n * t**2) for n, t in read], list(read.values()))
    fit = fixed, linear, square
    fixed_move, per_byte = _fit([(1, size) for size in moved], list(moved.values()))
    points = itertools.product(enumerate(counts), enumerate(contexts))
    return StepTimes(
        _dense(grid, counts, contexts),
        fit,
        (fixed_move, per_byte),
        _ratios(calls.decoded, means),
        _ratios(calls.read, read),
        calls.bytes_per_token,
        calls.count,
        tuple((count, context, float(grid[i, j])) for (i, count), (j, context) in points),
        _beside_fit(read, fit),
        calls,
    )


def _at(table: tuple[tuple[float, ...], ...], count: int, tokens: float) -> float:
    """Return the entry of a dense table; beyond its edges, the edge's entry."""
    row = table[min(count, len(table)) - 1]
    return row[min(int(tokens / COLUMN_STEP + 0.5), len(row) - 1)]


def _means(calls: Mapping) -> dict:
    """Return the mean seconds of every point: its median times the mean of measured ÷ median over all points."""
    medians = {point: float(np.median(seconds)) for point, seconds in calls.items()}
    ratios = [value / medians[point] for point, seconds in calls.items() for value in seconds]
    factor = float(np.mean(ratios))
    return {point: factor * value for point, value in medians.items()}


def _ratios(calls: Grid, means: Mapping[tuple[int, int], float]) -> tuple[float, ...]:
    return tuple(float(value / means[point]) for point, seconds in calls.items() for value in seconds)


def _beside_fit(
    read: Mapping[tuple[int, int], float], fit: tuple[float, float, float]
) -> tuple[tuple[float, ...], ...]:
    """Return measured ÷ fitted prefill as a dense table by prompts and tokens. Points too large to be measured take the
    ratio of the next smaller number of prompts of that length.
    """
    counts, lengths = (sorted({point[axis] for point in read}) for axis in (0, 1))
    grid = np.ones((len(counts), len(lengths)))
    for (row, n), (column, t) in itertools.product(enumerate(counts), enumerate(lengths)):
        if (n, t) in read:
            grid[row, column] = read[n, t] / (fit[0] + fit[1] * n * t + fit[2] * n * t**2)
        elif row:
            grid[row, column] = grid[row - 1, column]
    return _dense(grid, counts, lengths, beyond=False)


def _fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of seconds ≈ terms · weights, by non-negative least squares in relative error."""
    a, b = np.asarray(terms, dtype=float), np.asarray(seconds, dtype=float)
    scale = a.max(0)
    weights, _ = nnls(a / scale / b[:, None], np.ones(len(b)))
    return tuple(float(weight) for weight in weights / scale)


def _dense(
    grid_G: np.ndarray, counts: Sequence[int], contexts: Sequence[int], beyond: bool = True
) -> tuple[tuple[float, ...], ...]:
    """Return a dense table, interpolated linearly between the measured points. With `beyond` it is extrapolated
    linearly, never below the smallest measured value; else it takes the value of the nearest edge.
    """
    least = float(grid_G.min())
    columns = np.arange(0, (2 if beyond else 1) * contexts[-1] + COLUMN_STEP, COLUMN_STEP, dtype=float)
    if len(contexts) == 1:
        grid_G, contexts = np.repeat(grid_G, 2, axis=1), [contexts[0], contexts[0] + 1]
    if len(counts) == 1:
        grid_G, counts = np.repeat(grid_G, 2, axis=0), [counts[0], counts[0] + 1]
    table = RegularGridInterpolator((counts, contexts), grid_G, bounds_error=False, fill_value=None)
    batches = np.arange(1, max(counts) + 1)
    inside = columns if beyond else columns.clip(contexts[0], contexts[-1])
    points = np.stack(np.meshgrid(batches, inside, indexing="ij"), -1)
    return tuple(tuple(float(max(least, value)) for value in row) for row in table(points))
