"""Memory against speed: decoding at several memory allowances, each against the resident model and its own bound.

Rows are plain dictionaries, for a record's details and for tables. Independent of records.
"""

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import paired_stats, settings
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.roofline import ceilings, cost_model
from lib.measure.timing import interleaved, workloads
from lib.measure.timing.control import fresh_copy
from lib.measure.timing.workloads import Workload
from lib.optimizations.common import absorbed_baseline
from lib.optimizations.streaming_computation import method, offload_baseline, read_bound

BLOCKS = 6
AXES = {"x": "weights in memory, % of all", "y": "time per decoded token, ms"}
BOUND = "bound: bytes ÷ bandwidth"
ARM_OF = {"keep": "streamed", "copy": "streamed, copied into memory", "drop": "streamed, page cache dropped"}
REFERENCES = [BOUND, *(f"accelerate, {kind}" for kind in offload_baseline.KINDS)]  # dashed in the figure
FROM_DISK = 0.95  # share of a call's bytes above which they are reported as coming from the disk
RATIOS = {"proxy": (0.65, 1.0)}  # allowances besides the one under test
FEWER_RATIOS = (0.75,)  # the same if a step takes seconds
SHOWN = {
    "ratio": "allowance, share of the weights",
    "page_cache": "page cache",
    "memory_share": "weights in memory, share",
    "ms_per_token": "ms per token",
    "low": "low",
    "high": "high",
    "resident_ms_per_token": "resident, ms per token",
    "bound_ms_per_token": "bound, ms per token",
    "share_of_bound": "bound ÷ time",
    "read_from": "read from",
}


def ratios(memory_ratio: float, scale: str, effort: str) -> list[float]:
    """Return the allowances to time, ascending: `memory_ratio` and some more by scale, only one more at preview."""
    more = RATIOS.get(scale, FEWER_RATIOS)
    return sorted({memory_ratio, *(more[-1:] if settings.read(effort).preview else more)})


def by_allowance(
    resident: nn.Module,
    prompt_1T: torch.Tensor,
    steps: int,
    folder: Path | str,
    ratios: Sequence[float],
    *,
    tested: float | None = None,
    blocks: int = BLOCKS,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return a row per allowance and page-cache mode: time per decoded token, bound, bytes read, share of the bound.

    Each streamed model decodes `steps` tokens in turn with the resident one, which decodes latents absorbed. `tested`,
    by default the first of `ratios`, is also timed with weights copied from the page cache and, if this system can drop
    pages, with the page cache dropped after every read. `options` go to `method.open_folder`.
    """
    rows = []
    other_modes = ("copy", "drop") if hasattr(os, "posix_fadvise") else ("copy",)
    tested = ratios[0] if tested is None else tested
    for ratio, page_cache in [*((ratio, "keep") for ratio in ratios), *((tested, mode) for mode in other_modes)]:
        model = method.open_folder(folder, memory_ratio=ratio, page_cache=page_cache, **options)
        stream = read_bound.stream_of(model)
        if page_cache == "drop":
            stream.file.forget()
        fair = fresh_copy(absorbed_baseline.absorbed_baseline(resident))
        base, work = (workloads.steps(arm, prompt_1T, steps) for arm in (fair, model))
        pairs = interleaved.paired(base, work, blocks=blocks, warmup=1, seed=seed)
        rows.append(_row(model, work, pairs, ratio, page_cache))
        stream.close()
        del model, stream, fair, base, work
        gc.collect()  # models hold reference cycles
    return rows


def _row(model: nn.Module, work: Workload, pairs: Pairs, ratio: float, page_cache: str) -> dict[str, Any]:
    weight = next(model.parameters())
    peak = ceilings.measure(weight.device.type, weight.dtype)
    computing = ceilings.bound(cost_model.of(model, work), peak).seconds
    reads = read_bound.reads(model, work)
    bound = max(reads.seconds, computing)
    share, share_low, share_high = read_bound.share_of_bound(pairs.optimized_seconds, bound)
    low, high = paired_stats.median_interval(pairs.optimized_seconds)
    plan, per_token = read_bound.stream_of(model).plan, 1000 / work.tokens
    return {
        "ratio": ratio,
        "page_cache": page_cache,
        "memory_share": plan.in_memory_bytes / plan.total_bytes,
        "ms_per_token": float(np.median(pairs.optimized_seconds)) * per_token,
        "low": low * per_token,
        "high": high * per_token,
        "resident_ms_per_token": float(np.median(pairs.baseline_seconds)) * per_token,
        "bound_ms_per_token": bound * per_token,
        "share_of_bound": share,
        "share_of_bound_low": share_low,
        "share_of_bound_high": share_high,
        "bytes_per_token": reads.bytes / work.tokens,
        "reading_bytes_per_second": reads.bandwidth,
        "read_from": reads.source,
        "disk_share": None if reads.disk_bytes is None else min(1.0, reads.disk_bytes / max(reads.bytes, 1)),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the columns for a reader, with the time per token and its 95 % interval."""
    return pd.DataFrame(rows)[[*SHOWN]].round(4).rename(columns=SHOWN)


def points(rows: Sequence[Mapping[str, Any]], offload: Mapping[str, Measurement]) -> pd.DataFrame:
    """Return rows and accelerate's offloading as points for `style.impact`: % of weights in memory, ms per token."""
    drawn = []
    for row in rows:
        at = {"strength": 100 * row["memory_share"]}
        ends = {"low": row["low"], "high": row["high"]}
        drawn.append(at | {"arm": ARM_OF[row["page_cache"]], "value": row["ms_per_token"]} | ends)
        if row["page_cache"] == "keep":
            drawn.append(at | {"arm": BOUND, "value": row["bound_ms_per_token"]})
    for kind, measurement in offload.items():
        if not measurement.baseline:
            continue
        # Converted from tokens per second to ms per token.
        share = 0.0 if kind == "disk" else 100.0
        drawn.append({"strength": share, "arm": f"accelerate, {kind}", "value": 1000 / measurement.baseline})
    return pd.DataFrame(drawn)


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a curve by the share of weights in memory, for comparisons between records."""
    return [
        {"arm": f"page cache: {row['page_cache']}", "strength": 100 * row["memory_share"], "value": row["ms_per_token"]}
        | {"low": row["low"], "high": row["high"]}
        for row in rows
    ]


def reading(rows: Sequence[Mapping[str, Any]], offload: Mapping[str, Measurement], memory_ratio: float) -> str:
    """Return two sentences on the figure of `points`, computed from its numbers.

    Bytes are reported as coming from the disk only if the system's count shows it.
    """
    timed = {row["page_cache"]: row for row in rows if row["ratio"] == memory_ratio}
    slowdown = {cache: row["ms_per_token"] / row["resident_ms_per_token"] for cache, row in timed.items()}
    share, rest = percent(timed["keep"]["memory_share"]), _rest(timed["keep"]["disk_share"])
    in_memory = f"With {share} of the weights in memory, {rest}"
    first = f"{in_memory}, a token takes {slowdown['keep']:.2f} times the resident time."
    rival, place, dropped = offload["disk"], offload_baseline.place(), ""
    if "drop" in timed:
        dropped = f"with {_dropped(timed['drop']['disk_share'])} a token takes {slowdown['drop']:.2f} times"
    if rival.ratio is None:
        parts = [dropped, f"against accelerate's offloading it was not timed: {rival.reason}"]
    else:
        parts = [f"it decodes {rival.ratio:.1f} times as fast as accelerate's offloading to {place}", dropped]
    second = "; ".join(filter(None, parts))
    return f"{first} {second[:1].upper()}{second[1:]}."


def _rest(disk_share: float | None) -> str:
    """Return a phrase for where the weights outside memory come from, given the share read from the disk."""
    if disk_share is None:
        return "the rest from disk or page cache"
    if disk_share <= 1 - FROM_DISK:
        return "the rest in the page cache"
    return f"{percent(disk_share)} of the rest from the disk"


def _dropped(disk_share: float | None) -> str:
    """Return a phrase for how the arm that drops its pages reads: "from the disk" only if the count shows it."""
    if disk_share is None:
        return "the page cache dropped"
    if disk_share < FROM_DISK:
        return f"the page cache dropped (disk: {percent(disk_share)})"
    return "every byte from the disk" if disk_share == 1 else "nearly every byte from the disk"
