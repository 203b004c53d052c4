"""Absorbed against stock decoding of latent attention from the same cache: equality of tokens, and the gains.

Times a whole step in pairs, the attentions alone, and the step at full depth. Independent of streaming.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import Cache

from lib.measure.metrics import paired_samples
from lib.measure.metrics.pairs import Pairs
from lib.measure.roofline import cost_model, full_depth
from lib.measure.timing import interleaved
from lib.models.decoding import cache_names, chunked, mla_absorption
from lib.models.decoding.continuations import positions
from lib.models.loading import Loaded
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as task_list
from lib.optimizations.common import absorbed_baseline

BLOCKS = 6


@dataclass
class Continuation:
    """`count` greedy steps on a copy of a filled cache; the untimed `prepare` copies it and sets the path.

    `path` is `mla_absorption.expand` or `mla_absorption.absorb`. `output_BN` holds the tokens of the last call.
    """

    model: nn.Module
    cache: Cache
    token_B1: torch.Tensor
    count: int
    path: Callable[[nn.Module], object]
    output_BN: torch.Tensor | None = None
    _copy: Cache | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Copy the filled cache and switch the model to `path`."""
        self._copy = copy.deepcopy(self.cache)
        self.path(self.model)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Decode `count` tokens on the copy, which is then discarded."""
        if self._copy is None:
            self.prepare()
        options = cache_names.as_kwargs(self._copy) | {"use_cache": True, "logits_to_keep": 1}
        token_B1, tokens = self.token_B1, []
        for _ in range(self.count):
            token_B1 = self.model(input_ids=token_B1, **options).logits[:, -1:].argmax(-1)
            tokens.append(token_B1)
        self._copy, self.output_BN = None, torch.cat(tokens, 1)


def compare(loaded: Loaded, prefill_chunk: int, latent_context: int, seed: int = 0) -> dict[str, object] | None:
    """Return whether absorbed decoding generates the same tokens, and its gains; None without latent attention.

    At scale proxy `latent_context` tokens are cached; at other scales 8,192, repeated from fewer, with fewer steps. A
    model with too few positions caches as many tokens as leave room for the steps.
    """
    model, proxy = loaded.model, loaded.scale == "proxy"
    if not absorbed_baseline.has_latents(model):
        return None
    context, longest, steps = (latent_context, latent_context, 4) if proxy else (8192, 1024, 2)
    context = min(context, positions(model) - steps)
    ids_1T = task_list.text_windows(loaded, "final", 1, min(longest, context), seed).to(loaded.device)
    chunked.chunk_prefill(model, prefill_chunk)
    pairs, same, gains = absorbed_against_stock(model, ids_1T, context, steps, seed=seed)
    chunked.whole_prefill(model)
    step = paired_samples.from_pairs("decode_tokens_per_second", f"decode, {context} cached", pairs, steps, None)
    row: dict[str, object] = {"context": context, "same_tokens": same, "gain": step.ratio, "ci": step.ci}
    row |= {f"gain, {name}": gain for name, gain in gains.items()}
    return row | {"stock_tokens_per_second": step.baseline}


def table(row: Mapping[str, Any] | None) -> pd.DataFrame:
    """Return the result of `compare` as a table of text: gains in three digits, the step's with its interval."""
    if row is None:
        lines = {"latent attention": "none in this model: nothing to absorb"}
    else:
        low, high = row["ci"] or (None, None)
        span = "" if low is None or high is None else f" (95 % interval {low:.3g} to {high:.3g})"
        depth = row["gain, at full depth"]
        lines = {
            "cached tokens": f"{row['context']:,}",
            "same tokens": "yes" if row["same_tokens"] else "no",
            "gain of the step": f"{row['gain']:.3g}×{span}",
            "gain of attention alone, median of a few turns": f"{row['gain, attention alone']:.3g}×",
            "fewer operations, by formula": f"{row['gain, operations']:.3g}×",
            "gain of the step at full depth, derived": "this is no slice" if depth is None else f"{depth:.3g}×",
            "stock path, tokens/s": f"{row['stock_tokens_per_second']:.3g}",
        }
    return pd.DataFrame(lines.items(), columns=["", "value"])


@torch.inference_mode()
def absorbed_against_stock(
    model: nn.Module, prompt_1T: torch.Tensor, context: int, steps: int, blocks: int = BLOCKS, seed: int = 0
) -> tuple[Pairs, bool, dict[str, float | None]]:
    """Return the pairs (stock, absorbed) of decoding `steps` tokens at `context`, whether the tokens are equal, and the
    ratios stock ÷ absorbed of other quantities: operations per token by count, seconds of the attentions alone, and
    seconds of a step at full depth (`full_depth`; None if the model is no slice).

    The cache holds `prompt_1T`, its latents repeated up to `context` if the prompt is shorter: timing does not depend
    on their values. The model is changed during the call and restored at its end.
    """
    was_absorbed = mla_absorption.is_absorbed(model)
    output = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
    repeats = -(-context // prompt_1T.shape[1])
    for layer in cache_names.of(output).layers:
        if not layer.is_initialized:  # a block without attention
            continue
        layer.keys = layer.keys.repeat(1, 1, repeats, 1)[..., :context, :].contiguous()
        layer.values = layer.values.repeat(1, 1, repeats, 1)[..., :context, :].contiguous()
    token_B1 = output.logits[:, -1:].argmax(-1)
    arms = [
        Continuation(model, cache_names.of(output), token_B1, steps, path)
        for path in (mla_absorption.expand, mla_absorption.absorb)
    ]
    try:
        pairs = interleaved.paired(*arms, blocks=blocks, warmup=1, seed=seed)
        gains = _stock_over_absorbed(model, arms)
    finally:
        (mla_absorption.absorb if was_absorbed else mla_absorption.expand)(model)
    stock, absorbed = (cost_model.decode_flops(model, context, absorbed=path) for path in (False, True))
    outputs = [arm.output_BN for arm in arms if arm.output_BN is not None]
    same = len(outputs) == 2 and torch.equal(*outputs)
    return pairs, same, {"operations": stock / absorbed} | gains


def _stock_over_absorbed(model: nn.Module, arms: Sequence[Continuation], turns: int = 3) -> dict[str, float | None]:
    """Return stock ÷ absorbed of the median seconds of the attentions alone and of the step at full depth."""
    counts = slice_depth.stands_for(model) if slice_depth.whole(model) is not None else None
    counts = None if isinstance(counts, str) else counts
    attentions = [block.attention.module for block in anatomy(model).blocks]
    alone: tuple[list[float], list[float]] = ([], [])
    whole: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for index in (0, 1) if turn % 2 else (1, 0):
            with full_depth.clocks(attentions) as spent:
                whole[index].append(full_depth.whole_seconds(arms[index], model, counts or [1.0] * len(attentions)))
            alone[index].append(sum(spent))
    attention, step = (float(np.median(seconds[0]) / np.median(seconds[1])) for seconds in (alone, whole))
    return {"attention alone": attention, "at full depth": step if counts else None}
