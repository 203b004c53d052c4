"""How long a step takes, measured on the real engine: decode by rows and context, prefill by prompts and length, moving
rows by bytes. The simulation draws from this, and capacity is derived from it. Knows no policy.

Decode times are a table (medians over a grid, linear between its points), since kernels change with the number of rows.
Prefill and moving are non-negative least squares in relative error; measured ÷ fitted prefill is a table too, since a
core's caches hold short prompts and not long ones. Ratios of single calls to their median are stored, so that the
simulation has the machine's own jitter. As in a server, every timed step follows another of its own rows (the first
after other work is slower), and rows and prompts differ (or all would go to the same experts).

Shapes: B rows or prompts, L context, T prompt tokens, G grid points.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import nnls
from torch import nn

from lib.errors import UserError
from lib.measure.serving.server import MOST_ROWS
from lib.measure.serving.traffic import Lengths
from lib.measure.timing import workloads
from lib.models.decoding import batch_cache

ROWS_MEASURED = (1, 2, 4, 8, 16, 24, 32)
COLUMN_STEP = 16  # columns between entries of the dense table
PROMPTS_MEASURED = (1, 2, 4, 8)
DISTINCT = 8  # prompts whose rows are repeated to make larger batches
MOST_PROMPT_TOKENS = 2048  # of one measured prefill, all prompts together

Result = TypeVar("Result")
Point = TypeVar("Point")
Grid = dict[tuple[int, int], list[float]]  # seconds of the calls at each (rows or prompts, tokens)
Moves = dict[float, list[float]]  # seconds of the moves of so many bytes


@dataclass(frozen=True)
class StepTimes:
    """Measured step times in seconds. `decode_BL[b - 1][l // COLUMN_STEP]`: b rows, l columns of context.

    `prefill_fit`: seconds = a + b·n·T + c·n·T², times `prefill_BT[n - 1][T // COLUMN_STEP]` where there is such a table
    (beyond its edges the edge's); `move_fit`: seconds = a + b·bytes, of joining or leaving. `ratios`: measured ÷ median
    of single calls. `samples`: how many calls were timed.
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

    def decode(self, batch: int, context: float) -> float:
        """Return the median seconds of one step of `batch` rows at `context` columns."""
        return _at(self.decode_BL, batch, context)

    def prefill(self, count: int, tokens: float) -> float:
        """Return the seconds of reading `count` prompts of `tokens` tokens in one pass."""
        fixed, linear, square = self.prefill_fit
        return (fixed + linear * count * tokens + square * count * tokens**2) * _at(self.prefill_BT, count, tokens)

    def move(self, size: float) -> float:
        """Return the seconds of copying a cache of `size` bytes, as joining and leaving do."""
        return self.move_fit[0] + self.move_fit[1] * size

    def sustained(self, batch: int, lengths: Lengths) -> tuple[float, float]:
        """Return (seconds per output token, requests per second) of a batch kept full with requests of mean lengths.

        Every request costs one prefill of its own, during which all other rows stand still, and two moves.
        """
        prompt, new = lengths.prompt_tokens, lengths.new_tokens
        context = prompt + new / 2
        moves = 2 * self.move(batch * (prompt + new) * self.bytes_per_token)
        cycle = new * self.decode(batch, context) + batch * (self.prefill(1, prompt) + moves)
        return cycle / new, batch / cycle

    def capacity(self, lengths: Lengths, token_seconds: float, most: int = MOST_ROWS) -> tuple[float, int]:
        """Return the largest rate, requests per second, that keeps the objective, and its batch; (0, 0) for none."""
        rates = [(self.sustained(batch, lengths), batch) for batch in range(1, most + 1)]
        return max(((rate, batch) for (per, rate), batch in rates if per <= token_seconds), default=(0.0, 0))


def _at(table: tuple[tuple[float, ...], ...], count: int, tokens: float) -> float:
    """Return the entry of a dense table, its edge's beyond it."""
    row = table[min(count, len(table)) - 1]
    return row[min(int(tokens / COLUMN_STEP + 0.5), len(row) - 1)]


def measure(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    *,
    repeats: int = 5,
    most: int = MOST_ROWS,
    rows_measured: Sequence[int] = ROWS_MEASURED,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
) -> StepTimes:
    """Time the real model over a grid of rows × `contexts` (ascending) and return its step times.

    `prompt_T` is text at least as long as the largest context; prompts read together have `prompt_tokens` at most. A
    warm-up call comes before each point; calls of different points take turns, so that a slow spell of the machine does
    not fall on one point alone.
    """
    contexts, counts = _grid(prompt_T, contexts, most, rows_measured)
    decoded, read, moved, per_token = _calls(model, prompt_T, contexts, counts, repeats, prompt_tokens)
    return _assembled(decoded, read, moved, per_token, counts, contexts)


def with_bracketing_step_times(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    run: Callable[[], Result],
    *,
    repeats: int = 2,
    most: int = MOST_ROWS,
    rows_measured: Sequence[int] = ROWS_MEASURED,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
) -> tuple[StepTimes, Result]:
    """Return the step times of the model directly before and after `run()`, all calls taken together, and what it
    returned: a machine's speed drifts, and a run is compared with the times that held while it ran.
    """
    contexts, counts = _grid(prompt_T, contexts, most, rows_measured)
    before = _calls(model, prompt_T, contexts, counts, repeats, prompt_tokens)
    result = run()
    after = _calls(model, prompt_T, contexts, counts, repeats, prompt_tokens)
    decoded, read, moved = _both(before[0], after[0]), _both(before[1], after[1]), _both(before[2], after[2])
    return _assembled(decoded, read, moved, after[3], counts, contexts), result


def _both(before: Mapping[Point, list[float]], after: Mapping[Point, list[float]]) -> dict[Point, list[float]]:
    """Return the calls of every point of `before`, those of `after` behind them."""
    return {point: before[point] + after[point] for point in before}


def _calls(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    counts: Sequence[int],
    repeats: int,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
) -> tuple[Grid, Grid, Moves, float]:
    """Return the seconds of single calls (decoding, prefills, moves), and the cache's bytes per token."""
    decoded = _decode(model, prompt_T, contexts, counts, repeats)
    read = _prefill(model, prompt_T, contexts, repeats, prompt_tokens)
    moved, per_token = _move(model, prompt_T, contexts, counts, repeats)
    return decoded, read, moved, per_token


def measure_together(
    models: Sequence[nn.Module],
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    *,
    rounds: int = 3,
    most: int = MOST_ROWS,
) -> tuple[StepTimes, ...]:
    """Return `measure` of several models whose calls take turns, round by round in alternating order, so that a slow
    spell of the machine falls on all of them.
    """
    contexts, counts = _grid(prompt_T, contexts, most)
    calls: list[tuple[Grid, Grid, Moves]] = [({}, {}, {}) for _ in models]
    per_token = [0.0] * len(models)
    for turn in range(rounds):
        order = range(len(models)) if turn % 2 == 0 else range(len(models) - 1, -1, -1)
        for index in order:
            decoded, read, moved = calls[index]
            latest = _calls(models[index], prompt_T, contexts, counts, 1)
            _extend(decoded, latest[0])
            _extend(read, latest[1])
            _extend(moved, latest[2])
            per_token[index] = latest[3]
    return tuple(_assembled(*parts, size, counts, contexts) for parts, size in zip(calls, per_token))


def _extend(calls: dict[Point, list[float]], latest: Mapping[Point, list[float]]) -> None:
    """Add the latest calls of every point, in place."""
    for point, seconds in latest.items():
        calls.setdefault(point, []).extend(seconds)


def by_mean(times: StepTimes) -> StepTimes:
    """Return the same times by means: tables of medians times the mean ratio, and ratios that are 1 on average.

    What a server can sustain follows from the mean of a call, which on a disturbed machine lies far above the median.
    """
    decode, prefill = (float(np.mean(ratios)) for ratios in (times.decode_ratios, times.prefill_ratios))
    return replace(
        times,
        decode_BL=tuple(tuple(decode * value for value in row) for row in times.decode_BL),
        prefill_fit=(prefill * times.prefill_fit[0], prefill * times.prefill_fit[1], prefill * times.prefill_fit[2]),
        decode_ratios=tuple(value / decode for value in times.decode_ratios),
        prefill_ratios=tuple(value / prefill for value in times.prefill_ratios),
    )


def _grid(
    prompt_T: torch.Tensor, contexts: Sequence[int], most: int, rows_measured: Sequence[int] = ROWS_MEASURED
) -> tuple[list[int], list[int]]:
    """Return the contexts and row counts to time, checked."""
    contexts = sorted(set(int(context) for context in contexts))
    if not contexts or contexts[0] < 2 or len(prompt_T) < contexts[-1]:
        raise UserError(f"step times: contexts {contexts} need a text of that length; got {len(prompt_T)} tokens")
    counts = [count for count in rows_measured if count <= most] or [1]
    return contexts, counts + ([most] if most not in counts else [])


def _assembled(
    decoded: Grid, read: Grid, moved: Moves, per_token: float, counts: Sequence[int], contexts: Sequence[int]
) -> StepTimes:
    grid = np.array([[np.median(decoded[count, context]) for context in contexts] for count in counts])
    fixed, linear, square = _fit([(1, n * t, n * t**2) for n, t in read], _medians(read))
    fit = fixed, linear, square
    fixed_move, per_byte = _fit([(1, size) for size in moved], _medians(moved))
    return StepTimes(
        _dense(grid, counts, contexts),
        fit,
        (fixed_move, per_byte),
        _ratios(decoded),
        _ratios(read),
        per_token,
        sum(len(times) for part in (decoded, read, moved) for times in part.values()),
        tuple(
            (count, context, float(grid[i, j])) for i, count in enumerate(counts) for j, context in enumerate(contexts)
        ),
        _beside_fit(read, fit),
    )


def _beside_fit(read: Grid, fit: tuple[float, float, float]) -> tuple[tuple[float, ...], ...]:
    """Return measured ÷ fitted prefill, a dense table by prompts and tokens. Points too large to be measured have the
    ratio of the next fewer prompts of that length.
    """
    counts, lengths = (sorted({point[axis] for point in read}) for axis in (0, 1))
    grid = np.ones((len(counts), len(lengths)))
    for (row, n), (column, t) in itertools.product(enumerate(counts), enumerate(lengths)):
        if (n, t) in read:
            grid[row, column] = np.median(read[n, t]) / (fit[0] + fit[1] * n * t + fit[2] * n * t**2)
        elif row:
            grid[row, column] = grid[row - 1, column]
    return _dense(grid, counts, lengths, beyond=False)


def _timed(model: nn.Module, call: Callable, *arguments: object) -> float:
    synchronize = workloads.barrier(model)
    if synchronize:
        synchronize()
    start = time.perf_counter()
    call(*arguments)
    if synchronize:
        synchronize()
    return time.perf_counter() - start


def _decode(
    model: nn.Module, prompt_T: torch.Tensor, contexts: Sequence[int], counts: Sequence[int], repeats: int
) -> Grid:
    """Seconds of decode steps per (rows, context): DISTINCT prompts read once, their rows repeated, and in every row
    another token.
    """
    seconds_at: Grid = {}
    token_T = prompt_T.repeat(1 + (max(counts) + repeats) // len(prompt_T)).to(next(model.parameters()).device)
    longest = batch_cache.prefill(model, [_part(prompt_T, at, contexts[-1] - 1) for at in range(DISTINCT)])
    for context in contexts:
        rows = batch_cache.first(longest, context - 1)
        many = {
            count: batch_cache.keep(batch_cache.repeat(rows, -(-count // DISTINCT)), range(count)) for count in counts
        }
        for turn in range(repeats):
            for count in counts:
                for timed in (False, True):
                    many[count].token_B = token_T[turn : turn + count].clone()
                    seconds = _timed(model, batch_cache.step, model, many[count])
                    if timed:
                        seconds_at.setdefault((count, context), []).append(seconds)
    return seconds_at


def _part(prompt_T: torch.Tensor, index: int, length: int) -> torch.Tensor:
    """Return the part of the text, `length` tokens long, that begins behind `index` such parts (round the end)."""
    return prompt_T.roll(-length * index)[:length]


def _prefill(model: nn.Module, prompt_T: torch.Tensor, contexts: Sequence[int], repeats: int, most: int) -> Grid:
    """Seconds of prefills per (prompts, tokens), up to `most` tokens at once, each prompt another part of the text."""
    points = [
        (count, length) for count in PROMPTS_MEASURED for length in contexts if count * length <= most or count == 1
    ]
    seconds_at: Grid = {}
    for turn in range(repeats + 1):
        for count, length in points:
            prompts = [_part(prompt_T, index, length) for index in range(count)]
            seconds = _timed(model, batch_cache.prefill, model, prompts)
            if turn:
                seconds_at.setdefault((count, length), []).append(seconds)
    return seconds_at


def _move(
    model: nn.Module, prompt_T: torch.Tensor, contexts: Sequence[int], counts: Sequence[int], repeats: int
) -> tuple[Moves, float]:
    """Seconds of taking one row out, by the bytes left; and the cache's bytes per token of one row."""
    seconds_at: Moves = {}
    single = batch_cache.prefill(model, [prompt_T[: contexts[len(contexts) // 2]]])
    for count in (counts[len(counts) // 2], counts[-1]):
        for _ in range(repeats):
            many = batch_cache.repeat(single, count)
            seconds = _timed(model, batch_cache.keep, many, range(max(1, count - 1)))
            seconds_at.setdefault(float(many.bytes), []).append(seconds)
    return seconds_at, single.bytes / single.length


def _fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Non-negative least squares in relative error: seconds ≈ terms · weights."""
    a, b = np.asarray(terms, dtype=float), np.asarray(seconds, dtype=float)
    scale = a.max(0)
    weights, _ = nnls(a / scale / b[:, None], np.ones(len(b)))
    return tuple(float(weight) for weight in weights / scale)


def _dense(
    grid_G: np.ndarray, counts: Sequence[int], contexts: Sequence[int], beyond: bool = True
) -> tuple[tuple[float, ...], ...]:
    """Fill the table between the measured points, linearly. Beyond them linearly too, never below the smallest measured
    value; or, not `beyond`, with the value of the nearest edge.
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


def _ratios(calls: Grid) -> tuple[float, ...]:
    return tuple(float(value / np.median(times)) for times in calls.values() for value in times)


def _medians(calls: Grid | Moves) -> list[float]:
    return [float(np.median(times)) for times in calls.values()]
