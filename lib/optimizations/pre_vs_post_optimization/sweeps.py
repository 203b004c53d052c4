"""Compares two models at further prompt lengths, batch sizes and retrieval distances, besides the standard workloads.

Independent of how the optimized model was made.

Shapes: B batch, T prompt tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lib.measure.metrics import paired_samples, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.timing import control, disturbance, workloads
from lib.measure.timing.interleaved import warm_up, with_control
from lib.models.loading import Loaded

POINT_SECONDS = 1.5  # minimum time spent on the rounds of one length or batch size; not at preview


def sweep(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_BT: torch.Tensor,
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    new_tokens: int = 8,
    blocks: int = paired_stats.MINIMUM_BLOCKS,
    seconds: float | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Return the prefill rate at every length and the decode rate at every batch size, each with its A/A control.

    Runs `blocks` rounds, and more if these last less than `seconds` (default POINT_SECONDS). A prompt longer than
    `prompt_BT` is made by repeating it; each sequence of a batch is rolled by one more token.
    """
    rates = []
    options: dict[str, Any] = {"blocks": blocks, "total": POINT_SECONDS if seconds is None else seconds, "seed": seed}
    arms_of = {"baseline": baseline, "optimized": optimized, "copy": baseline}
    models = [model for model, _ in control.fresh_copies(arms_of, seed).values()]
    for length in lengths:
        times = -(-length // prompt_BT.shape[1])
        long_BT = prompt_BT[:1].repeat(1, times)[:, :length]
        arms = [workloads.prefill(model, long_BT) for model in models]
        rates.append(_rate("prefill_tokens_per_second", f"prefill, {length} tokens", arms, **options))
    for batch in batches:
        short_BT = prompt_BT[:1, :128]
        rolled_BT = torch.cat([short_BT.roll(shift, 1) for shift in range(batch)])
        arms = [workloads.steps(model, rolled_BT, new_tokens, workloads.TURN_STEPS) for model in models]
        rates.append(_rate("batch_decode_tokens_per_second", f"decode, batch of {batch}", arms, **options))
    return rates


def _rate(metric: str, name: str, arms: list, **options: Any) -> Measurement:
    warm_up(*arms)
    pairs, copied = with_control(*arms, disturbance=disturbance.watch, **options)
    return paired_samples.from_pairs(metric, name, pairs, arms[0].tokens, copied)


def points_known(measurements: Sequence[Measurement], prompt_tokens: int, batch: int) -> list[Measurement]:
    """Return the standard workloads that are points of a sweep, renamed as in the sweep."""
    names = {
        ("prefill_tokens_per_second", "prefill"): f"prefill, {prompt_tokens} tokens",
        ("decode_tokens_per_second", "decode"): "decode, batch of 1",
        ("batch_decode_tokens_per_second", "batch_decode"): f"decode, batch of {batch}",
    }
    named = [(m, names.get((m.metric, m.workload))) for m in measurements if m.ratio is not None]
    return [m.model_copy(update={"workload": name}) for m, name in named if name]


def gains(swept: Sequence[Measurement]) -> list[dict]:
    """Return a row per point of a sweep, in order, for a figure: `arm`, `strength`, `value`, `low`, `high`."""
    rows = []
    for rate in swept:
        arm, _, point = rate.workload.partition(", ")
        low, high = rate.ci or (None, None)
        number = int("".join(letter for letter in point if letter.isdigit()))
        rows.append({"arm": arm, "strength": number, "value": rate.ratio, "low": low, "high": high})
    return sorted(rows, key=lambda row: (row["arm"], row["strength"]))


def retrieval(
    loaded: Loaded, optimized: nn.Module, size: Effort, distances: Sequence[int], *, resamples: int, seed: int = 0
) -> list[Measurement]:
    """Return the exact match of retrieved values at each of `distances`, in tokens, as a workload of its own."""
    matches = []
    for distance in distances:
        arms = [replace(loaded, model=model) for model in (loaded.model, optimized)]
        answers = [evaluate.retrieval(arm, distance, size.retrieval_prompts, seed) for arm in arms]
        match = answer_comparison.compare_retrieved(*answers, resamples=resamples, seed=seed)
        matches.append(match.model_copy(update={"workload": f"generate, {distance} tokens back"}))
    return matches
