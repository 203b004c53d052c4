"""The protocol of the notebook on sparse attention: prompt lengths, exactness, costs, and refutations of its claims.

Longer protocols have their own modules: `attended_mass` (the heads of single blocks), `quality_controls`,
`attention_timing`. All return plain data.

Shapes: B prompts, T tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare import saved
from lib.measure.compare.costs import break_even, resources
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, paired_stats, settings
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.digits import signed
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import sanity
from lib.measure.roofline import full_depth
from lib.measure.trackers import environment, memory
from lib.models.checkpoints import io
from lib.models.decoding.attention_inputs import Heads, watch
from lib.models.loading import Loaded
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import Attention, Block, anatomy
from lib.models.tasks import corpus
from lib.models.tasks import tasks as task_list
from lib.models.tasks.retrieval import KEY, VALUE
from lib.optimizations.adaptive_sparse_attention import attended_mass, kernels, method
from lib.optimizations.adaptive_sparse_attention.attention_timing import PagesRead
from lib.optimizations.common import absorbed_baseline
from lib.optimizations.common.evidence import relations
from lib.optimizations.common.evidence.claims import Interval

CLAIMS = (
    "Windows or random blocks of the same number hold as much of the attention's mass.",
    "Finding the pattern costs what it saves.",
    "Values in the middle of a prompt are lost.",
)
# The measurement that decides the verdict of each dimension, declared before anything is measured.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("retrieval_exact_match", "generate"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
CONTEXTS = {
    "preview": (1024,),
    "quick": (1024, 2048),
    "standard": (1024, 2048, 4096),
    "thorough": (1024, 2048, 4096, 8192, 16384),
}
# For real dimensions: reading the longest takes seconds, and shorter prompts show little.
AT_REAL_SIZE = {"preview": (2048,), "quick": (2048,), "standard": (4096, 8192), "thorough": (4096, 8192, 16384)}
LEAST_CONTEXT = 64
CACHES = ("kv_cache_bytes_per_token", full_depth.CACHE)
TIMED_PROMPT = {"preview": 1024, "quick": 2048, "standard": 4096, "thorough": 8192}


@dataclass(frozen=True)
class PromptLengths:
    """Lengths in tokens of this run's prompts: `curves` by context, and `timed`, the prompt on which prefill, decoding
    and answers are measured. At most `behind` more tokens are read or generated after it.
    """

    curves: list[int]
    timed: int
    behind: int = field(default=0, compare=False)

    @property
    def longest(self) -> int:
        """The longest prompt of the curves, in tokens."""
        return self.curves[-1]


def lengths_of(loaded: Loaded, effort: str, longest: int = 0) -> PromptLengths:
    """Return the prompt lengths of a run by effort and scale; `longest`, if not 0, sets the longest prompt.

    Default lengths stay within the positions of the model, including the tokens after the timed prompt. Raises
    UserError for a length too short for a question.
    """
    if 0 < longest < LEAST_CONTEXT:
        raise UserError(
            f"{method.WHERE}: context {longest}: expected 0 (by effort) or at least {LEAST_CONTEXT} tokens, which hold "
            "a few keys and values"
        )
    curves = contexts(effort, loaded.scale, longest)
    timed = longest or min(curves[-1], max(curves[0], TIMED_PROMPT.get(effort, 8192)))
    behind = max(settings.read(effort, loaded.scale).new_tokens, KEY + VALUE)
    most = 0 if longest else kernels.most_positions(loaded.model)
    if most - behind >= LEAST_CONTEXT:  # else `facts` raises
        timed = min(timed, most - behind)
        fitting = [tokens for tokens in curves if tokens <= most]
        curves = fitting if fitting and fitting[0] <= timed else [timed]  # one curve is up to the timed prompt
    return PromptLengths(curves, timed, behind)


def contexts(effort: str, scale: str, longest: int = 0) -> list[int]:
    """Return the lengths of the curves: by effort and scale, or powers of two below `longest` and `longest` itself."""
    if longest:
        return [2**i for i in range(10, 24) if 2**i < longest] + [longest]
    return list((CONTEXTS if scale == "proxy" else AT_REAL_SIZE)[effort])


def facts(loaded: Loaded, lengths: PromptLengths) -> pd.DataFrame:
    """Return the model and the lengths of this run as text.

    Raises NotApplicable if the model has too few positions for these prompts and the tokens after them, before
    anything is decoded.
    """
    kernels.check_context(loaded.model, lengths.longest)
    kernels.check_context(loaded.model, lengths.timed, lengths.behind)
    view = _attending(loaded.model)[0].attention
    rows: dict[str, object] = {"model": f"{loaded.parameters.name}, {loaded.scale}, {loaded.dtype}"}
    rows |= {"blocks": len(anatomy(loaded.model).blocks)}
    rows |= {"attention": view.kind, "heads": view.heads}
    rows |= {"lengths of the curves": lengths.curves, "timed and judged prompts": lengths.timed}
    return pd.DataFrame([(name, str(value)) for name, value in rows.items()], columns=["", "value"])


def _attending(model: nn.Module) -> list[Block]:
    """Return the blocks with an attention: an optimization may have removed it from others."""
    return [block for block in anatomy(model).blocks if block.attention.kind != "none"]


def sizes(effort: str, scale: str, knobs: Mapping[str, Any]) -> Effort:
    """Return the sizes of this run. Raises UserError for a knob out of range, before anything is loaded."""
    method.check(**knobs)
    return settings.read(effort, scale)


def watched(loaded: Loaded, tokens: int, seed: int = 0) -> tuple[torch.Tensor, Heads]:
    """Return a held-out text [1, T] of `tokens` tokens, and the heads of the middle block while it is read.

    Raises NotApplicable if the model does not allow such a context.
    """
    kernels.check_context(loaded.model, tokens)
    ids_1T = task_list.text_windows(loaded, "final", 1, tokens, seed)
    blocks = _attending(loaded.model)
    return ids_1T, watch(loaded.model, ids_1T, {blocks[len(blocks) // 2].index})[0]


def applied(baseline: nn.Module, knobs: Mapping[str, Any]) -> tuple[nn.Module, float]:
    """Return the sparse model and the seconds it took to apply. Raises AssertionError if weights were copied."""
    start = time.perf_counter()
    optimized = method.apply(baseline, **knobs)
    seconds = time.perf_counter() - start
    assert next(optimized.parameters()).data_ptr() == next(baseline.parameters()).data_ptr(), "weights were copied"
    return optimized, seconds


@torch.inference_mode()
def exactness(loaded: Loaded, optimized: nn.Module, knobs: Mapping[str, Any], seed: int = 0) -> dict[str, float]:
    """Return the largest differences of logits, in units of their standard deviation.

    `all_kept`: everything kept against full attention, in a batch padded on the left. `leak`: earlier positions when
    later tokens change, which may only change the pattern of their own block of queries. At real dimensions only some
    positions are compared, since the head would be most of the work.
    """
    block = knobs["block_size"]
    most = kernels.most_positions(loaded.model)
    tokens = min(4 * block + 20, most) if most else 4 * block + 20
    everything = method.apply(loaded.model, **{**knobs, "tau": 1.0, "max_density": 1.0, "pages": 0})
    positions = torch.arange(tokens) if loaded.scale == "proxy" else sanity.spread(tokens)
    earlier = positions < 3 * block
    ids_BT = task_list.text_windows(loaded, "final", 2, tokens, seed).to(loaded.device)
    real_BT = torch.ones_like(ids_BT)
    real_BT[1, : block + 5] = 0
    padded = {"input_ids": ids_BT, "attention_mask": real_BT, "logits_to_keep": positions}
    full, same = (model(**padded).logits.float() for model in (loaded.model, everything))
    later_BT = ids_BT.clone()
    later_BT[:, 3 * block :] = ids_BT[:, : max(0, tokens - 3 * block)]
    before, after = (
        optimized(input_ids=ids, logits_to_keep=positions).logits[0, earlier].float() for ids in (ids_BT, later_BT)
    )
    spread = float(full.std())
    difference = float((same - full)[real_BT.bool()[:, positions]].abs().max()) / spread
    return {"all_kept": difference, "leak": float((before - after).abs().max()) / spread}


def exactness_table(differences: Mapping[str, float]) -> pd.DataFrame:
    """Return `exactness` as a table."""
    names = {"all_kept": "everything kept, batch padded on the left"}
    names |= {"leak": "earlier positions, later tokens changed"}
    rows = [(names[name], difference) for name, difference in differences.items()]
    return pd.DataFrame(rows, columns=["check", "largest difference ÷ spread of the logits"])


def attended(model: nn.Module, knobs: Mapping[str, Any], context: int) -> float:
    """Return the mean amount of cache, in tokens, that a new token reads per block after `context` tokens.

    It reads the chosen pages and the bounds of all full pages; the first `dense_blocks` blocks read everything. The
    mean is over the blocks with an attention.
    """
    blocks, pages = _attending(model), context // knobs["page_size"]
    read = knobs["pages"] * knobs["page_size"]
    if not knobs["pages"] or read >= context:
        return float(context)
    tokens = 0.0
    for block in blocks:
        sparse = block.index >= knobs["dense_blocks"]
        tokens += min(context, read + _bounds(block.attention) * pages) if sparse else context
    return tokens / len(blocks)


def _bounds(attention: Attention) -> float:
    """Return the size of a page's bounds, a minimum and a maximum of its keys, in tokens of the cache.

    Each takes half a token if keys are half of the cache, and a whole token for latents.
    """
    if attention.kind == "latent":
        return 2.0
    return 2 * attention.head_dim / (attention.head_dim + attention.value_dim)


def _with_bounds(counted: Measurement, model: nn.Module, knobs: Mapping[str, Any], tokens: int) -> Measurement:
    """Return `counted`; if it is the cache per token, add the page bounds that the optimized arm keeps for `tokens`
    cached tokens. The first `dense_blocks` blocks, of a slice or of the whole model, read all pages and keep no bounds.
    """
    dense, blocks = knobs.get("dense_blocks", 0), _attending(model)
    if counted.metric == full_depth.CACHE:
        sparse = 1 - min(1.0, dense / len(slice_depth.whole(model) or blocks))
    else:
        sparse = sum(block.index >= dense for block in blocks) / len(blocks)
    chosen = 0 < knobs.get("pages", 0) * knobs.get("page_size", 0) < tokens
    if counted.metric not in CACHES or not chosen or counted.optimized is None:
        return counted
    held = counted.optimized * (1 + sparse * _bounds(blocks[0].attention) / knobs["page_size"])
    source = f"{counted.source}, with the bounds of its pages"
    return measurement.counted(counted.metric, counted.workload, counted.baseline, held, source)


def formulas(
    loaded: Loaded, prefill_costs: Mapping[str, Any], knobs: Mapping[str, Any], context: int
) -> dict[str, dict[str, Any]]:
    """Return the options of `cost_model` for both arms: `prefill_costs`, the tokens that decoding after `context`
    tokens attends to, and absorbed decoding of latent attention, which both arms use.
    """
    latent = absorbed_baseline.has_latents(loaded.model)
    read = {"attended": attended(loaded.model, knobs, context), "absorbed": latent}
    return {"costs": {**prefill_costs, **read}, "baseline_costs": {"absorbed": latent}}


def origin(loaded: Loaded, checkpoints: str, seed: int) -> dict[str, Any]:
    """Return the arguments with which a child process loads the same model."""
    load = {"name": loaded.name, "scale": loaded.scale, "device": loaded.device, "seed": seed}
    return load | {"checkpoints": checkpoints or None, "random_weights": loaded.random_weights}


def costs(
    baseline: nn.Module,
    optimized: nn.Module,
    knobs: Mapping[str, Any],
    tokens: int,
    formula: Mapping[str, Mapping[str, Any]],
    load: Mapping[str, Any],
    timings: Sequence[Measurement],
    apply_seconds: float,
) -> list[Measurement]:
    """Return `timings`, peak memory from fresh child processes on a prompt of `tokens` tokens (latents absorbed), the
    counted resources, and the break-even of applying.

    `load`: see `origin`; `formula`: see `formulas`.
    """
    weight = next(baseline.parameters())
    work: dict[str, Any] = {"load": dict(load), "prompt_tokens": tokens, "new_tokens": 4, "device": load["device"]}
    work["dtype"] = str(weight.dtype).removeprefix("torch.")
    sparse = memory.Arm(**work, transform=f"{method.__name__}:apply", arguments=dict(knobs))
    full = memory.Arm(**work, transform=saved.transform(absorbed_baseline.absorbed_baseline(baseline)))
    full_peak, sparse_peak = memory.peaks(full, sparse)
    peaks = memory.measurements(full_peak, sparse_peak)
    options = {name: dict(values) for name, values in formula.items()}
    without_bounds = resources(baseline, optimized, tokens=tokens, **options)
    counted = [_with_bounds(each, baseline, knobs, tokens) for each in without_bounds]
    rate = next(m for m in timings if m.metric == "prefill_tokens_per_second")
    return [*timings, *peaks, *counted, *break_even(apply_seconds, rate)]


def shares(
    loaded: Loaded,
    survey: Sequence[Mapping[str, Any]],
    density: float,
    pages: PagesRead,
    lengths: PromptLengths,
) -> list[Measurement]:
    """Return density and recall of mass for prefill, and the share of the cache read and recall for decoding."""
    tokens = next(row["length"] for row in reversed(survey) if row["length"] <= lengths.timed)
    recall = float(np.mean([row["recall"] for row in survey if row["length"] == tokens]))
    kept = f"blocks kept, prompt of {lengths.timed} tokens"
    read = f"tokens read of {lengths.timed} cached"
    sampled = f"exact, sampled queries of {tokens} tokens, mean of blocks"
    return [
        measurement.informative("attention_density", "prefill", 1.0, density, kept),
        _mass(loaded, "prefill", recall, sampled),
        measurement.informative("cache_read_share", "decode", 1.0, pages.share, read),
        _mass(loaded, "decode", pages.mass, "exact, pages read by a new token"),
    ]


def replications(
    loaded: Loaded,
    lengths: PromptLengths,
    survey: Sequence[Mapping[str, Any]],
    times: Sequence[Mapping[str, Any]],
    prefill: Compared,
    pages: PagesRead,
) -> list[relations.Judged]:
    """Return the published relations on sparse attention, judged by this run. `times`: rows of `attention_alone`.

    The kernel's gain is taken at the length of the timed prompt. Relations on attention mass are undecided with random
    weights, and relations on times if the machine was busy.
    """
    busy = why_busy(prefill.measurements)
    density = attended_mass.by_length(survey).set_index("length")["density"].to_dict()
    own = [row for row in times if row["heads"] == "of the model" and row["gain_ci"]]
    gains = {row["length"]: Interval(row["gain"], *(1 / end for end in reversed(row["gain_ci"]))) for row in own}
    rates = [m for m in prefill.measurements if m.metric == "prefill_tokens_per_second"]
    rate = next((m for m in rates if m.ratio and m.ci), None)
    whole = None if rate is None or rate.ratio is None or rate.ci is None else Interval(rate.ratio, *rate.ci)
    return [
        relations.with_weights(relations.density(density), loaded.random_weights),
        relations.on_a_busy_machine(relations.short(gains), busy),
        relations.with_weights(relations.layers(list(pages.by_block["in chosen pages"])), loaded.random_weights),
        relations.on_a_busy_machine(relations.kernel(gains.get(lengths.timed), whole), busy),
    ]


def _mass(loaded: Loaded, workload: str, share: float, source: str) -> Measurement:
    """Return the recall of mass; unavailable for random weights, where it means nothing."""
    if (reason := loaded.quality_unavailable) is not None:
        return measurement.unavailable("attention_mass_recall", workload, reason)
    return measurement.informative("attention_mass_recall", workload, 1.0, share, source)


def details(
    survey: Sequence[Mapping[str, Any]],
    timed_rows: Sequence[Mapping[str, Any]],
    impact: pd.DataFrame,
    differences: Mapping[str, float],
) -> dict[str, tuple[object, str, str]]:
    """Return the record's details: name → (value, provenance, source)."""
    return {
        "survey": (survey, "measured", "exact probabilities of sampled blocks of queries"),
        "attention_alone": (timed_rows, "measured", "paired blocks, search included; planted heads apart"),
        "impact": (impact.to_dict("records"), "measured", "KL on held-out text, bootstrap intervals"),
        "exactness": (differences, "measured", "largest difference ÷ spread"),
    }


def card(baseline: nn.Module) -> dict[str, object]:
    """Return the environment card with the hashes of the weights and of the evaluation data."""
    return environment.card(baseline, weights_hash=io.weights_hash(baseline), data_hash=corpus.data_hash())


def others_hold_as_much(
    loaded: Loaded, survey: Sequence[Mapping[str, Any]], seed: int = 0
) -> tuple[str, bool | None, str]:
    """Return the first of `CLAIMS`, whether it is true at the longest prompt, and the evidence.

    Judged by the interval, over blocks of the model, of recall minus that of the better control. None if the interval
    contains 0, if all blocks were kept, and for random weights.
    """
    rows = [row for row in survey if row["length"] == survey[-1]["length"]]
    lead_B = np.array([row["recall"] - max(row["window"], row["random"]) for row in rows])
    low, high = paired_stats.bootstrap_interval(lead_B, seed=seed)
    lead, *ends = (signed(number, ".4f") for number in (float(lead_B.mean()), low, high))
    evidence = f"recall of mass minus that of the better control {lead} ({' to '.join(ends)})"
    evidence += f", {len(rows)} blocks of the model at {survey[-1]['length']} tokens"
    if loaded.random_weights:
        return CLAIMS[0], None, f"random weights; {evidence}"
    if min(row["density"] for row in rows) >= 1:
        return CLAIMS[0], None, f"all blocks were kept; {evidence}"
    return CLAIMS[0], True if high <= 0 else False if low > 0 else None, evidence
