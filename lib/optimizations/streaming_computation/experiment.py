"""The protocol of the streaming notebook: equality of every variant, one unit in transit, and peaks of memory.

The longer protocols have their own modules: `memory_tradeoff`, `absorbed_decoding`, `window_quality`,
`offload_baseline`, `read_bound`, `limited`; `outcome` has the answers to the claims. Returns plain data; independent of
records and figures.

Shapes: N texts, T tokens, B prompts, V vocabulary.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.measure.compare import speed
from lib.measure.compare.costs import break_even, resources
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate, sanity
from lib.measure.roofline import cost_model
from lib.measure.trackers import environment, memory
from lib.models.checkpoints import io
from lib.models.checkpoints.parking import parked
from lib.models.decoding import chunked
from lib.models.loading import Loaded
from lib.models.offload import streamer
from lib.models.offload.residency import Plan
from lib.models.offload.streamer import Streamer
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import corpus
from lib.optimizations.common import absorbed_baseline, judgement
from lib.optimizations.streaming_computation import method, read_bound
from lib.optimizations.streaming_computation.limited import decoding as limited_decoding
from lib.optimizations.streaming_computation.limited.decoding import LimitedDecoding

# The measurement that decides the verdict of each dimension, declared before any is taken.
PRIMARIES = {
    "performance": ("decode_tokens_per_second", limited_decoding.WORKLOAD),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_memory_above_start_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
PEAK_TOKENS, FEW_PEAK_TOKENS = 2048, 512  # prompt tokens for memory peaks; few if a token takes long
AT_ONCE = 10**6  # more tokens than any prompt here: no chunks
IN_ROWS = "logits in rows, nats of loss"
METHOD = "lib.optimizations.streaming_computation.method"


def settings_of(effort: str, scale: str) -> Effort:
    """Return the settings of this run: fewer tokens at real dimensions, where streaming takes seconds per token."""
    sizes = settings.read(effort, scale)
    return sizes if scale == "proxy" else replace(sizes, new_tokens=2, prompt_tokens=256)


def is_exact(loaded: Loaded) -> bool:
    """Return whether the model runs in float32, where a different order of operations changes no token."""
    return loaded.dtype == torch.float32


def saved(model: nn.Module) -> tuple[tempfile.TemporaryDirectory, Path]:
    """Write the weights of `model`; return the temporary directory, which the caller cleans up, and the checkpoint.

    Raises NotApplicable if the weights stream from a file already, because then they do not fit into memory and there
    is no resident arm to compare with; UserError if the temporary disk has no room for them.
    """
    if reason := method.applies_to(model):
        raise NotApplicable(f"{method.WHERE}: {reason}: there is no room for a resident arm to compare with")
    needed, free = cost_model.weights_bytes(model), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise UserError(
            f"{method.WHERE}: {needed / 1e9:.1f} GB of weights do not fit into the {free / 1e9:.1f} GB free in "
            f"{tempfile.gettempdir()}; free some, or set TMPDIR to a folder on another disk"
        )
    place = tempfile.TemporaryDirectory(prefix="streaming-")
    return place, io.save(model, Path(place.name) / "checkpoint")


def facts(loaded: Loaded, folder: Path) -> pd.DataFrame:
    """Return a table of text: the model, its weights, and the smallest share of them that must be in memory."""
    least, total = streamer.smallest(folder)
    rows = {"model": f"{loaded.parameters.name}, {loaded.scale}, {loaded.dtype}"}
    rows |= {"blocks": str(len(anatomy(loaded.model).blocks)), "weights": f"{total / 1e6:,.1f} MB"}
    rows |= {"smallest possible in memory": f"{100 * least / total:.1f} %"}
    return listed(rows)


def listed(values: Mapping[str, object]) -> pd.DataFrame:
    """Return names and values as a table of text."""
    return pd.DataFrame([(name, str(value)) for name, value in values.items()], columns=["", "value"])


def planned_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of each part of the plan, resident and streamed; the first four sum to all weights."""
    units = plan.fixed_bytes + plan.resident_bytes + plan.streamed_bytes
    return {
        "always in memory": plan.fixed_bytes,
        "resident units": plan.resident_bytes,
        "streamed": plan.streamed_bytes,
        "experts and rows of embeddings, read where needed": plan.total_bytes - units,
        "room for two units": 2 * plan.slot_bytes,
        "expert cache": plan.expert_slots * plan.expert_bytes,
    }


def plan_table(plan: Plan) -> pd.DataFrame:
    """Return `planned_bytes` in megabytes and as shares of all weights."""
    rows = [(name, f"{size / 1e6:.2f}", f"{size / plan.total_bytes:.3f}") for name, size in planned_bytes(plan).items()]
    return pd.DataFrame(rows, columns=["", "MB", "share of all weights"])


def unit_in_transit(stream: Streamer) -> pd.DataFrame:
    """Return a table of one unit while it is loaded and afterwards: the bytes read, and the mean of a tensor."""
    shown = (*stream.plan.streamed, *stream.plan.resident)[0]
    part, bytes_before = stream.units[shown][0], stream.file.bytes_read
    weights = stream.weights(shown)
    rows: dict[str, object] = {
        "unit": shown,
        "tensors": len(weights),
        "its first tensor": f"{part.leaf} {tuple(weights[0].shape)}",
    }
    stream.settle()
    rows["bytes read, with read-ahead"] = stream.file.bytes_read - bytes_before
    rows["mean"] = f"{weights[0].float().mean():+.5f}"
    stream.forget()
    afterwards = part.owner._parameters[part.leaf] if part.owner is not None else part.empty
    rows["mean afterwards"] = "none" if afterwards is None else f"{afterwards.float().mean():+.5f}"
    return listed(rows)


def equality_of_variants(
    baseline: nn.Module, optimized: nn.Module, folder: Path, ids_NT: torch.Tensor, memory_ratio: float
) -> dict[str, dict[str, float]]:
    """Return, for each variant alone and for all together, the difference of its logits from the baseline's.

    See `equality`. For logits in rows the difference is that of the losses, in nats, and no token is compared.
    """
    device = str(next(baseline.parameters()).device)
    options = {"memory_ratio": memory_ratio, "device": device}
    alone = method.open_folder(folder, prefill_chunk=AT_ONCE, absorbed=False, **options)
    arms = {
        "weights streamed": lambda ids: alone(ids).logits,
        "all together": lambda ids: optimized(ids).logits,
        "prompt in chunks": lambda ids: method.attach(baseline, prefill_chunk=64)(ids).logits,
    }
    rows_by_variant = equality(baseline, ids_NT, arms)
    chunked.whole_prefill(baseline)
    whole_NT, rows_NT = (chunked.losses(baseline, ids_NT, rows=count) for count in (AT_ONCE, 64))
    rows_by_variant[IN_ROWS] = {"difference": float((rows_NT - whole_NT).abs().max())}
    read_bound.stream_of(alone).close()
    return rows_by_variant


@torch.inference_mode()
def equality(
    baseline: nn.Module, ids_NT: torch.Tensor, arms: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> dict[str, dict[str, float]]:
    """Return, per arm (a function from ids to logits [N, T, V]), the largest difference from the baseline's logits, in
    standard deviations of these, and the share of positions with the same most likely token.
    """
    expected = baseline(ids_NT).logits.float()
    rows = {}
    for name, arm in arms.items():
        logits = arm(ids_NT).float()
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        difference = (logits - expected).abs().max() / expected.std()
        rows[name] = {"difference": float(difference), "same_top": float(same)}
    return rows


def equality_table(rows: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return the result of `equality_of_variants` as a table, with gaps for quantities that were not compared."""
    named = {"difference": "largest difference ÷ spread of logits", "same_top": "same most likely token, share"}
    return pd.DataFrame(rows).T.rename(columns=named).rename_axis("variant").reset_index()


def quality(
    loaded: Loaded, optimized: nn.Module, effort: Effort, sample_NT: torch.Tensor, seed: int = 0
) -> tuple[list[Measurement], str | None]:
    """Return every accuracy metric of the streamed model against the loaded one, and why its output is degenerate.

    If it is, all metrics are invalid; otherwise the reason is None.
    """
    degenerate = sanity.check(optimized, sample_NT[:, :128], random_weights=loaded.random_weights)
    answers = evaluate.evaluate(loaded, effort, seed=seed)
    streamed = evaluate.evaluate(loaded, effort, model=optimized, seed=seed)
    judged = answer_comparison.compare(answers, streamed, resamples=effort.resamples, seed=seed)
    if degenerate:
        judged = [measurement.invalid(m.metric, m.workload, degenerate) for m in judged]
    return judged, degenerate


def within_allowance(
    folder: Path, prompt_1T: torch.Tensor, steps: int, memory_ratio: float, options: Mapping[str, Any], exact: bool
) -> LimitedDecoding:
    """Return decoding in control groups limited to the allowance, against a plain mapping and accelerate's offloading.

    See `limited.decoding`. If the model is `exact`, asserts that all arms decode the same tokens.
    """
    job = folder, prompt_1T, steps, memory_ratio, options
    limited = limited_decoding.compare(*job)
    assert limited.same_tokens is not False or not exact, "streamed and mapped weights decode different tokens"
    if limited.rate.ratio is None:
        reason = limited.rate.reason or "nothing was decoded under the limit"
        missing = measurement.unavailable(limited_decoding.METRIC, limited_decoding.OFFLOADING, reason)
        return replace(limited, offloading=[missing])
    offloading, about = limited_decoding.against_offloading(*job)
    assert about.get("same_tokens", True) or not exact, "streamed and offloaded weights decode different tokens"
    return replace(limited, offloading=[offloading], details={**limited.details, "accelerate": about})


def _formulas(baseline: nn.Module, absorbed: bool) -> dict[str, dict[str, bool]]:
    """Return the options of `cost_model` for the streamed model and the baseline, which decodes latents absorbed."""
    latents = absorbed_baseline.has_latents(baseline)
    return {"costs": {"absorbed": absorbed and latents}, "baseline_costs": {"absorbed": latents}}


def compared(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_1T: torch.Tensor,
    effort: Effort,
    absorbed: bool,
    proxy: bool,
    invalid: str | None,
    seed: int = 0,
) -> Compared:
    """Return the timed workloads of the streamed model against the resident one, which decodes latents absorbed.

    All standard workloads and energy for a `proxy`; at real dimensions only prefill and decode. `invalid`: see
    `speed.compare`. Verdicts as by `judgement.timed`.
    """
    timing: dict[str, Any] = {"names": speed.STANDARD if proxy else ("prefill", "decode"), "with_energy": proxy}
    timing |= {"invalid": invalid, "except_for": ("experts",), "seed": seed, **_formulas(baseline, absorbed)}
    fair = absorbed_baseline.absorbed_baseline(baseline)
    return judgement.timed(speed.compare(fair, optimized, prompt_1T, effort, **timing))


def paid(apply_seconds: float, costs: list[Measurement]) -> list[Measurement]:
    """Return the seconds to open the file, and the number of prompt tokens after which that breaks even."""
    return break_even(apply_seconds, next(m for m in costs if m.metric.startswith("prefill")))


def counted(baseline: nn.Module, optimized: nn.Module, effort: Effort, absorbed: bool) -> list[Measurement]:
    """Return the counted resources of both models (`costs.resources`), and an unchanged `checkpoint_bytes` if weights
    stream: less memory does not mean a smaller checkpoint.
    """
    rows = resources(baseline, optimized, tokens=effort.prompt_tokens, **_formulas(baseline, absorbed))
    stream = streamer.streamer(optimized)
    if stream is None:
        return rows
    size = sum(place.nbytes for place in stream.file.places.values())
    source = "tensors of the file from which weights stream"
    why = {"reason": "streaming changes where weights lie, not how many there are"}
    return [*rows, measurement.informative("checkpoint_bytes", "load", size, size, source, "derived", **why)]


def card(baseline: nn.Module) -> dict[str, object]:
    """Return the environment card with the hashes of the weights and of the evaluation data."""
    return environment.card(baseline, weights_hash=io.weights_hash(baseline), data_hash=corpus.data_hash())


def token_arrivals(loaded: Loaded, model: nn.Module, prompt_1T: torch.Tensor, count: int) -> pd.DataFrame:
    """Return each generated token with its text and the milliseconds after which it arrived."""
    rows: list[tuple[object, ...]] = []
    start = time.perf_counter()
    for token in chunked.tokens(model, prompt_1T.to(loaded.device), count):
        text = loaded.tokenizer.decode(token) if loaded.tokenizer is not None else str(int(token[0]))
        rows.append((len(rows) + 1, text, f"{1000 * (time.perf_counter() - start):.1f}"))
    return pd.DataFrame(rows, columns=["token", "text", "arrived after, ms"])


def peaks(
    loaded: Loaded, effort: Effort, folder: Path, memory_ratio: float, options: Mapping[str, Any]
) -> tuple[list[Measurement], list[Measurement]]:
    """Return memory peaks on one long prompt against the resident model, from fresh child processes.

    First with the prompt in chunks alone (the effect on activations), then streamed and in chunks (adding the effect on
    weights). `options` are those of `method.open_folder`; the resident model decodes latents absorbed. While the
    processes run, this process keeps its weights only on disk.
    """
    tokens = PEAK_TOKENS if loaded.scale == "proxy" and not effort.preview else FEW_PEAK_TOKENS
    work: dict[str, Any] = {"folder": str(folder), "prompt_tokens": tokens, "new_tokens": 2}
    work |= {"dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device}
    resident = {"absorbed": absorbed_baseline.has_latents(loaded.model)}
    in_chunks = {"prefill_chunk": options["prefill_chunk"], **resident}
    arms = [
        *(memory.Arm(transform=f"{METHOD}:attach", arguments=kwargs, **work) for kwargs in (resident, in_chunks)),
        memory.Arm(opener=f"{METHOD}:open_folder", arguments={**options, "memory_ratio": memory_ratio}, **work),
    ]
    with parked((loaded.model, folder)):
        whole, chunked_alone, streamed = memory.peaks(*arms, turns=1 if effort.preview else None)
    return memory.measurements(whole, chunked_alone), memory.measurements(whole, streamed)
