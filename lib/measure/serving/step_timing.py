"""Times the steps of a server on the real model: decode by rows and context, prefill by prompts and length, moving rows
by bytes (`lib.measure.serving.step_times` holds the result). Knows no policy.

As in a server, every timed step follows another of its own rows (the first after other work is slower), and rows and
prompts differ: in their tokens (or all would go to the same experts), and in their lengths (rows of one length need no
mask, which is made in every step of a server, and with which attention takes other kernels).

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
CHECKED = (1, 8)  # rows of the calls by which the machine's speed is compared with what it was
DISTINCT = 8  # prompts whose rows are repeated to make larger batches
MOST_PROMPT_TOKENS = 2048  # of one measured prefill, all prompts together
AGAIN = 2  # times that all is measured once more on a disturbed machine, at most
FEW_ROWS = (1, 8, 32)  # for the fewest points from which a table is made

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

    `prompt_T` is text at least as long as the largest context; prompts read together have `prompt_tokens` at most. A
    warm-up call comes before each point; calls of different points take turns, so that a slow spell of the machine does
    not fall on one point alone. All is measured again where other programs took the processor meanwhile, `again` times
    at most (None: AGAIN): rates and objectives follow from these times, and a policy gains less at rates that are too
    low.
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
    all contexts of the calibration, and prefills of one prompt.
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
    """Return what was measured on a machine without other work, or at the last attempt, and what disturbed that."""
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
    """Return `measure` of several models whose calls take turns, round by round in alternating order, so that a slow
    spell of the machine falls on all of them.
    """
    contexts, counts = _grid(prompt_T, contexts, most, rows_measured)
    of_models, disturbed = _undisturbed(
        lambda: _calls_together(models, prompt_T, contexts, counts, rounds, prompt_tokens), again
    )
    return tuple(replace(assembled(calls), disturbed=disturbed) for calls in of_models)


def _calls_together(
    models: Sequence[nn.Module],
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    counts: Sequence[int],
    rounds: int,
    prompt_tokens: int,
) -> list[Calls]:
    """Return the seconds of single calls of every model, round by round."""
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
    """Return the seconds of single calls, and the cache's bytes per token."""
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
    """Return the contexts and row counts to time, checked."""
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
    """Seconds of decode steps per (rows, context): DISTINCT prompts read once, their rows repeated, and in every row
    another token; all rows but one are padded. Every point is met once in each turn, so that a slow spell of the
    machine bends no context alone.
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
    """Return the part of the text, `length` tokens long, that begins after `index` such parts (round the end)."""
    return prompt_T.roll(-length * index)[:length]


def _prefill(
    model: nn.Module,
    prompt_T: torch.Tensor,
    contexts: Sequence[int],
    repeats: int,
    most: int,
    counts: Sequence[int] = PROMPTS_MEASURED,
) -> Grid:
    """Seconds of prefills per (prompts, tokens), up to `most` tokens at once, each prompt another part of the text and
    all but one a token shorter.
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
    """Seconds of a row's moves, the mean of leaving and joining, by the bytes of the cache with it; and the cache's
    bytes per token of one row. A request does both, and joining copies the cache more often.
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
