"""Streaming against its alternatives: memory against speed with its bound, accelerate's offloading, absorbed decoding.

Times pairs of decoding arms; knows nothing of what a record is.
"""

import copy
import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_stats import Pairs
from lib.measure.roofline import ceilings, cost_model, full_depth
from lib.measure.timing import interleaved, workloads
from lib.measure.timing.workloads import Workload
from lib.models.checkpoints import io
from lib.models.decoding import cache_names, mla_absorption
from lib.models.offload import streamer
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import offload_baseline, reading

BLOCKS = 6
ARM_OF = {"keep": "streamed", "copy": "streamed, copied into memory", "drop": "streamed, every byte from the disk"}


@dataclass
class Continued:
    """`count` greedy steps on a copy of a filled cache; `prepare`, which is not timed, copies it and sets the path."""

    model: nn.Module
    cache: object
    token_B1: torch.Tensor
    count: int
    path: Callable[[nn.Module], object]
    output_BN: torch.Tensor | None = None
    _copy: object = field(default=None, repr=False)

    def prepare(self) -> None:
        self._copy = copy.deepcopy(self.cache)
        self.path(self.model)

    @torch.inference_mode()
    def __call__(self) -> None:
        if self._copy is None:
            self.prepare()
        given, token_B1, said = cache_names.given(self._copy) | {"use_cache": True}, self.token_B1, []
        for _ in range(self.count):
            token_B1 = self.model(input_ids=token_B1, logits_to_keep=1, **given).logits[:, -1:].argmax(-1)
            said.append(token_B1)
        self._copy, self.output_BN = None, torch.cat(said, 1)


@torch.inference_mode()
def absorbed_against_stock(
    model: nn.Module, prompt_1T: torch.Tensor, context: int, steps: int, blocks: int = BLOCKS, seed: int = 0
) -> tuple[Pairs, bool, dict[str, float | None]]:
    """Return the pairs (stock, absorbed) of `steps` decoded tokens at `context`, whether the tokens are equal, and
    stock ÷ absorbed of other quantities: operations of a token by count, seconds of the attentions alone, and of a step
    at full depth (`full_depth`; None where the model is no slice).

    The cache holds `prompt_1T`, its latents repeated up to `context` where the prompt is shorter: what is timed does
    not depend on what they hold. The model is changed while this runs, and left as it was.
    """
    was = mla_absorption.is_absorbed(model)
    output = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
    repeats = -(-context // prompt_1T.shape[1])
    for layer in cache_names.of(output).layers:
        layer.keys = layer.keys.repeat(1, 1, repeats, 1)[..., :context, :].contiguous()
        layer.values = layer.values.repeat(1, 1, repeats, 1)[..., :context, :].contiguous()
    token_B1 = output.logits[:, -1:].argmax(-1)
    arms = [
        Continued(model, cache_names.of(output), token_B1, steps, path)
        for path in (mla_absorption.expand, mla_absorption.absorb)
    ]
    try:
        pairs = interleaved.paired(*arms, blocks=blocks, warmup=1, seed=seed)
        gains = _stock_over_absorbed(model, arms)
    finally:
        (mla_absorption.absorb if was else mla_absorption.expand)(model)
    stock, ours = (cost_model.decode_flops(model, context, absorbed=path) for path in (False, True))
    return pairs, torch.equal(arms[0].output_BN, arms[1].output_BN), {"operations": stock / ours} | gains


def _stock_over_absorbed(model: nn.Module, arms: Sequence[Continued], turns: int = 3) -> dict[str, float | None]:
    """Return the ratios of median seconds of the attentions alone, and of the step at full depth, in turns."""
    counts = slice_depth.stands_for(model) if slice_depth.whole(model) is not None else None
    counts = None if isinstance(counts, str) else counts
    attentions = [block.attention.module for block in anatomy(model).blocks]
    alone, whole = ([], []), ([], [])
    for turn in range(turns):
        for index in (0, 1) if turn % 2 else (1, 0):
            with full_depth.clocks(attentions) as spent:
                whole[index].append(full_depth.whole_seconds(arms[index], model, counts or [1.0] * len(attentions)))
            alone[index].append(sum(spent))
    attention, step = (float(np.median(one[0]) / np.median(one[1])) for one in (alone, whole))
    return {"attention alone": attention, "at full depth": step if counts else None}


@torch.inference_mode()
def equality(
    baseline: nn.Module, ids_NT: torch.Tensor, arms: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> dict[str, dict[str, float]]:
    """Return, per arm (a function from ids to logits [N, T, V]), the largest difference from the baseline's logits in
    their standard deviations, and the share of positions with the same most likely token.
    """
    expected = baseline(ids_NT).logits.float()
    found = {}
    for name, arm in arms.items():
        got = arm(ids_NT).float()
        same = (got.argmax(-1) == expected.argmax(-1)).float().mean()
        found[name] = {"difference": float((got - expected).abs().max() / expected.std()), "same_top": float(same)}
    return found


def trade(
    resident: nn.Module,
    prompt_1T: torch.Tensor,
    steps: int,
    folder: Path | str,
    ratios: Sequence[float],
    opener: Callable,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> list[dict[str, object]]:
    """Return a row per memory ratio and page cache: time per decoded token, bound, bytes read, share of the bound.

    `opener(folder, memory_ratio=…, page_cache=…)` opens a streamed model. Each decodes `steps` tokens in turn with the
    resident one; the first ratio is timed twice more: copied from the page cache, and with every read from the disk.
    """
    rows = []
    base = workloads.steps(resident, prompt_1T, steps)
    for ratio, pages in [*((ratio, "keep") for ratio in ratios), (ratios[0], "copy"), (ratios[0], "drop")]:
        model = opener(folder, memory_ratio=ratio, page_cache=pages)
        made = streamer.streamer(model)
        if pages == "drop":
            made.file.forget()
        work = workloads.steps(model, prompt_1T, steps)
        pairs = interleaved.paired(base, work, blocks=blocks, warmup=1, seed=seed)
        rows.append(_row(model, work, pairs, ratio, pages))
        made.close()
        del model, made, work
        gc.collect()  # models refer to themselves
    return rows


def _row(model: nn.Module, work: Workload, pairs: Pairs, ratio: float, pages: str) -> dict[str, object]:
    weight = next(model.parameters())
    peak = ceilings.measure(weight.device.type, weight.dtype)
    computing = ceilings.bound(cost_model.of(model, work), peak).seconds
    found = reading.reads(model, work)
    bound = max(found.seconds, computing)
    share, share_low, share_high = reading.share_of_bound(pairs.optimized_seconds, bound)
    low, high = paired_stats.median_interval(pairs.optimized_seconds)
    plan, per_token = streamer.streamer(model).plan, 1000 / work.tokens
    return {
        "ratio": ratio,
        "page_cache": pages,
        "memory_share": plan.in_memory_bytes / plan.total_bytes,
        "ms_per_token": float(np.median(pairs.optimized_seconds)) * per_token,
        "low": low * per_token,
        "high": high * per_token,
        "resident_ms_per_token": float(np.median(pairs.baseline_seconds)) * per_token,
        "bound_ms_per_token": bound * per_token,
        "share_of_bound": share,
        "share_of_bound_low": share_low,
        "share_of_bound_high": share_high,
        "bytes_per_token": found.bytes / work.tokens,
        "reading_bytes_per_second": found.bandwidth,
        "read_from": found.source,
    }


def trade_frame(rows: Sequence[Mapping[str, object]], offload: Mapping[str, Measurement]) -> pd.DataFrame:
    """Return `trade`'s rows and accelerate's offloading as points for `figures.impact`: % of weights in memory, ms."""
    points = []
    for row in rows:
        arm = ARM_OF[row["page_cache"]]
        ends = {"low": row["low"], "high": row["high"]}
        at = {"strength": 100 * row["memory_share"]}
        points.append(at | {"arm": arm, "value": row["ms_per_token"]} | ends)
        if row["page_cache"] == "keep":
            points.append(at | {"arm": "bound: bytes ÷ bandwidth", "value": row["bound_ms_per_token"]})
    for kind, one in offload.items():
        # Turned into the other unit, at the time of the streamed arm it was paired with.
        share = 0.0 if kind == "disk" else 100.0
        points.append({"strength": share, "arm": f"accelerate, {kind}", "value": 1000 / one.baseline})
    return pd.DataFrame(points)


def against_accelerate(
    work: Workload, folder: Path | str, kind: str, dtype: torch.dtype, prompt: torch.Tensor, blocks: int = BLOCKS
) -> tuple[Pairs, bool]:
    """Return the pairs (accelerate's offloading of the checkpoint in `folder`, `work`), and whether tokens are equal.

    `kind`: "disk" or "cpu". Offloading to the disk takes another copy of the weights there for as long.
    """
    model, device = io.load_folder(folder, dtype=dtype), work.conditions["device"]
    with tempfile.TemporaryDirectory(prefix="offloaded-") as place:
        model = offload_baseline.disk(model, place, device) if kind == "disk" else offload_baseline.cpu(model, device)
        other = workloads.steps(model, prompt, work.new_tokens)
        pairs = interleaved.paired(other, work, blocks=blocks, warmup=1, synchronize=work.synchronize)
    same = torch.equal(other.output_BN.cpu(), work.output_BN.cpu())
    del model, other
    gc.collect()  # models refer to themselves
    return pairs, same
