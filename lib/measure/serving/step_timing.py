"""Times the steps of a server on the real model: decode by rows and context, prefill by prompts and length, moving rows
by bytes (`lib.measure.serving.step_times` holds the result). Knows nothing about policies.

As in a server, every timed step follows another step of the same rows (the first after other work is slower). Rows and
prompts differ in their tokens (otherwise all would use the same experts) and in their lengths: rows of equal length
need no mask, whereas a server builds a mask in every step, and attention with a mask uses other kernels.

Shapes: B rows or prompts, T prompt tokens.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.serving.protocol import MOST_ROWS
from lib.measure.serving.step_times import Calls, Grid, Moves, StepTimes, assembled
from lib.measure.timing import disturbance, workloads
from lib.models.decoding import batch_cache

ROWS_MEASURED = (1, 2, 4, 8, 16, 24, 32)
PROMPTS_MEASURED = (1, 2, 4, 8)
CHECKED = (1, 8)  # rows of the calls that compare the machine's speed with that of the calibration
DISTINCT = 8  # different prompts; their rows are repeated for larger batches
MOST_PROMPT_TOKENS = 2048  # of one measured prefill, all prompts together
AGAIN = 2  # largest number of repeated measurements on a disturbed machine
FEW_ROWS = (1, 8, 32)  # the fewest points that give a table

Point = TypeVar("Point")
Measured = TypeVar("Measured")


def measure(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    *,
    repeats: int = 5,
    most: int = MOST_ROWS,
    rows_measured: Sequence[int] = ROWS_MEASURED,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
    again: int | None = None,
) -> StepTimes:
    """Time the real model over a grid of rows × `contexts` (ascending) and return its step times.

    `prompt_T` is text at least as long as the largest context. Prompts that are read together have at most
    `prompt_tokens` tokens. A warm-up call precedes each point, and calls of different points take turns, so that a slow
    phase of the machine does not affect a single point. Everything is measured again if the machine was disturbed
    meanwhile, at most `again` times (None: AGAIN), since rates and objectives follow from these times, and a policy
    gains less at rates that are too low.
    """
    contexts, counts = _grid(prompt_T, contexts, most, rows_measured)
    calls, disturbed = _undisturbed(lambda: _calls(model, prompt_T, contexts, counts, repeats, prompt_tokens), again)
    return replace(assembled(calls), disturbed=disturbed)


def slowness(
    model: nn.Module,
    prompt_T: torch.Tensor,
    times: StepTimes,
    *,
    repeats: int = 3,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
) -> float:
    """Return how many times as long as in `times` single calls take now: the mean over decode steps of a few rows, at
    all contexts of the calibration, and prefills of one prompt. Raises ValueError for times without their calls.
    """
    if times.calls is None:
        raise ValueError("slowness: these step times were stored without their calls")
    contexts = sorted({context for _, context in times.calls.decoded})
    counts = sorted({count for count, _ in times.calls.decoded} & {*CHECKED})
    decoded = _decode(model, prompt_T, contexts, counts, repeats)
    read = _prefill(model, prompt_T, contexts, repeats, prompt_tokens, (1,))
    pairs = ((decoded, times.calls.decoded), (read, times.calls.read))
    return float(np.mean([np.median(now[point]) / np.median(then[point]) for now, then in pairs for point in now]))


def _undisturbed(measure_all: Callable[[], Measured], again: int | None) -> tuple[Measured, str | None]:
    """Return the first undisturbed measurement, or else the last attempt, and what disturbed it (or None)."""
    for _ in range(1 + (AGAIN if again is None else again)):
        close = disturbance.watch()
        measured, disturbed = measure_all(), close()
        if disturbed is None:
            break
    return measured, disturbed


def measure_together(
    models: Sequence[nn.Module],
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    *,
    rounds: int = 3,
    most: int = MOST_ROWS,
    rows_measured: Sequence[int] = ROWS_MEASURED,
    prompt_tokens: int = MOST_PROMPT_TOKENS,
    again: int | None = None,
) -> tuple[StepTimes, ...]:
    """Return the step times (`measure`) of several models whose calls take turns, round by round in alternating order,
    so that a slow phase of the machine affects all of them.
    """
    contexts, counts = _grid(prompt_T, contexts, most, rows_measured)
    all_calls, disturbed = _undisturbed(
        lambda: _calls_together(models, prompt_T, contexts, counts, rounds, prompt_tokens), again
    )
    return tuple(replace(assembled(calls), disturbed=disturbed) for calls in all_calls)


def _calls_together(
    models: Sequence[nn.Module],
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    counts: Sequence[int],
    rounds: int,
    prompt_tokens: int,
) -> list[Calls]:
    """Return the seconds of single calls of every model, timed round by round."""
    calls = [Calls({}, {}, {}, 0.0) for _ in models]
    for turn in range(rounds):
        order = range(len(models)) if turn % 2 == 0 else range(len(models) - 1, -1, -1)
        for index in order:
            latest = _calls(models[index], prompt_T, contexts, counts, 1, prompt_tokens)
            _extend(calls[index].decoded, latest.decoded)
            _extend(calls[index].read, latest.read)
            _extend(calls[index].moved, latest.moved)
            calls[index] = Calls(calls[index].decoded, calls[index].read, calls[index].moved, latest.bytes_per_token)
    return calls


def _calls(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    counts: Sequence[int],
    repeats: int,
    prompt_tokens: int,
) -> Calls:
    """Return the seconds of single calls, and the cache bytes per token."""
    decoded = _decode(model, prompt_T, contexts, counts, repeats)
    read = _prefill(model, prompt_T, contexts, repeats, prompt_tokens)
    moved, per_token = _move(model, prompt_T, contexts, counts, repeats)
    return Calls(decoded, read, moved, per_token)


def _extend(calls: dict[Point, list[float]], latest: Mapping[Point, list[float]]) -> None:
    """Add the latest calls of every point, in place."""
    for point, seconds in latest.items():
        calls.setdefault(point, []).extend(seconds)


def _grid(
    prompt_T: torch.Tensor, contexts: Sequence[int], most: int, rows_measured: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the contexts and row counts to time. Raises UserError for contexts below 2 or beyond the text."""
    contexts = sorted(set(int(context) for context in contexts))
    if not contexts or contexts[0] < 2 or len(prompt_T) < contexts[-1]:
        raise UserError(f"step times: contexts {contexts} need a text of that length; got {len(prompt_T)} tokens")
    counts = [count for count in rows_measured if count <= most] or [1]
    return contexts, counts + ([most] if most not in counts else [])


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
    """Return the seconds of decode steps by (rows, context): DISTINCT prompts are read once, their rows repeated, with
    another token in every row; all rows but one are padded. Every point is timed once in each turn, so that a slow
    phase of the machine does not affect a single context.
    """
    seconds_at: Grid = {}
    token_T = prompt_T.repeat(1 + (max(counts) + repeats) // len(prompt_T)).to(next(model.parameters()).device)
    longest = batch_cache.prefill(model, [_part(prompt_T, at, contexts[-1] - 1) for at in range(DISTINCT)])
    for turn, context in itertools.product(range(repeats), contexts):
        rows = batch_cache.first(longest, context - 1)
        for count in counts:
            many = batch_cache.keep(batch_cache.repeat(rows, -(-count // DISTINCT)), range(count))
            many.mask_BL = many.mask_BL.clone()
            many.mask_BL[1:, 0] = 0
            for timed in (False, True):
                many.token_B = token_T[turn : turn + count].clone()
                seconds = _timed(model, batch_cache.step, model, many)
                if timed:
                    seconds_at.setdefault((count, context), []).append(seconds)
    return seconds_at


def _part(prompt_T: torch.Tensor, index: int, length: int) -> torch.Tensor:
    """Return part number `index` of the text, `length` tokens long, wrapping around at the end."""
    return prompt_T.roll(-length * index)[:length]


def _prefill(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    repeats: int,
    most: int,
    counts: Sequence[int] = PROMPTS_MEASURED,
) -> Grid:
    """Return the seconds of prefills by (prompts, tokens), up to `most` tokens at once. Each prompt is another part of
    the text, and all but one are a token shorter.
    """
    points = [(count, length) for count in counts for length in contexts if count * length <= most or count == 1]
    seconds_at: Grid = {}
    for turn in range(repeats + 1):
        for count, length in points:
            prompts = [_part(prompt_T, index, length)[bool(index) :] for index in range(count)]
            seconds = _timed(model, batch_cache.prefill, model, prompts)
            if turn:
                seconds_at.setdefault((count, length), []).append(seconds)
    return seconds_at


def _move(
    model: nn.Module, prompt_T: torch.Tensor, contexts: Sequence[int], counts: Sequence[int], repeats: int
) -> tuple[Moves, float]:
    """Return the seconds of a row's move (the mean of leaving and joining) by the bytes of the cache including the row,
    and the cache bytes per token of one row. A request does both, and joining copies the cache more often.
    """
    seconds_at: Moves = {}
    single = batch_cache.prefill(model, [prompt_T[: contexts[len(contexts) // 2]]])
    for count in (counts[len(counts) // 2], counts[-1]):
        for _ in range(repeats):
            many = batch_cache.repeat(single, count)
            left = _timed(model, batch_cache.keep, many, range(max(1, count - 1)))
            joined = _timed(model, batch_cache.join, many, batch_cache.repeat(single, 1))
            seconds_at.setdefault(float(many.bytes), []).append((left + joined) / 2)
    return seconds_at, single.bytes / single.length
