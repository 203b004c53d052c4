"""Time sparse attention: one block's attention alone by context length, the whole model, and the parts of decoding.

The time of a pattern always includes the search for it.

Shapes: T tokens, B prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lib.measure.compare import speed
from lib.measure.compare.speed import Compared
from lib.measure.metrics import paired_samples
from lib.measure.metrics.busy import withhold_if_busy
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.process_variance import PART_SIGMA
from lib.measure.metrics.settings import Effort
from lib.measure.timing import disturbance, interleaved, workloads
from lib.measure.timing.workloads import Workload
from lib.models.decoding.attention_inputs import Heads
from lib.optimizations.adaptive_sparse_attention import attended_mass, method
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks
from lib.optimizations.adaptive_sparse_attention.attended_mass import Finder
from lib.optimizations.common import absorbed_baseline

LONG_PROMPT = 4096  # tokens; prompts at least this long get only FEW_BLOCKS timed blocks
FEW_BLOCKS = 6
FEW_STEPS = 4  # decoded tokens per call


@dataclass(frozen=True)
class AttentionTimes:
    """Times of one block's attention by context length: measurements, and rows with density, recall and gain.

    The last row is that of the planted heads, whose measurement is `planted`.
    """

    measurements: list[Measurement]
    planted: Measurement
    rows: list[dict[str, Any]]

    @property
    def longest(self) -> int:
        """The length of the longest prompt in tokens."""
        return int(self.rows[-1]["length"])


class FullAttention:
    """Stock causal attention of one block's heads, as an arm to time."""

    def __init__(self, heads: Heads):
        self.heads = heads
        self.grouped = heads.query_HTD.shape[0] != heads.key_GTD.shape[0]
        self.synchronize = torch.cuda.synchronize if heads.query_HTD.is_cuda else None

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        heads = self.heads
        query, key, value = (part[None] for part in (heads.query_HTD, heads.key_GTD, heads.value_GTV))
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=heads.scaling, enable_gqa=self.grouped
        )


def time_attention(
    heads: Heads, find: Finder, count: int, seed: int = 0, control: bool = True
) -> tuple[Pairs, Pairs | None]:
    """Return `count` timed pairs of full attention and of sparse attention including the search for its pattern, and
    the A/A control of full attention (None unless `control`).
    """
    full = FullAttention(heads)

    @torch.inference_mode()
    def sparse() -> torch.Tensor:
        parts = heads.query_HTD, heads.key_GTD, heads.value_GTV
        return blocks.attend(*parts, find(heads), heads.scaling, find.block)

    options: dict[str, Any] = {"blocks": count, "disturbance": disturbance.watch}
    if control:
        again = FullAttention(heads.separate())
        interleaved.warm_up(full, sparse, again)
        return interleaved.with_control(full, sparse, again, seconds=0.0, seed=seed, **options)
    return interleaved.paired(full, sparse, warmup=1, seed=seed, **options), None


def attention_alone(
    heads: Heads, find: Finder, survey: Sequence[Mapping[str, Any]], count: int, seed: int = 0
) -> AttentionTimes:
    """Return the times of one block's attention at every length of `survey`, and of planted heads at the longest.

    `survey`: the rows of `attended_mass.survey`; `count`: timed blocks, FEW_BLOCKS for LONG_PROMPT tokens or more.
    """
    measurements: list[Measurement] = []
    rows: list[dict[str, Any]] = []
    shares = {row["length"]: row for row in survey if row["block"] == heads.index}
    own, workload = heads, ""
    options: dict[str, Any] = {"samples": False, "process_sigma": PART_SIGMA}
    for length, share in shares.items():
        own, workload = heads.first(length), f"attention of one block, {length} tokens"
        pairs, floor = time_attention(own, find, count if length < LONG_PROMPT else FEW_BLOCKS, seed)
        timed = paired_samples.from_pairs("attention_ms", workload, pairs, 1, floor, **options)
        measurements.append(timed)
        rows.append(_row("of the model", length, share["density"], share["recall"], timed))
    planted = attended_mass.planted(own, find.block, seed=seed)
    pairs, floor = time_attention(planted, find, FEW_BLOCKS, seed, control=False)
    pattern = attended_mass.attended(planted, find(planted), find.block)
    extra = paired_samples.from_pairs("attention_ms", f"{workload}, planted heads", pairs, 1, floor, **options)
    rows.append(_row("planted", own.tokens, pattern.density, pattern.recall, extra))
    return AttentionTimes(measurements, extra, rows)


def _row(heads: str, length: int, density: float, recall: float, timed: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {"heads": heads, "length": length, "density": density, "recall": recall}
    assert timed.ratio is not None, "pairs always have a ratio"
    return row | {"gain": 1 / timed.ratio, "full_ms": timed.baseline, "gain_ci": timed.ci}


def table(times: AttentionTimes) -> pd.DataFrame:
    """Return the rows of `times`, rounded and without intervals."""
    return pd.DataFrame(times.rows).drop(columns=["gain_ci"]).round(3)


def planted_control(times: AttentionTimes) -> dict[str, Any]:
    """Return name, purpose and measurements of the planted heads as a control."""
    name = f"planted, {times.longest} tokens"
    return {"name": name, "purpose": "sparse heads", "measurements": [times.planted]}


def gains(times: AttentionTimes) -> pd.DataFrame:
    """Return the gain (full ÷ sparse) by context length for `style.impact`, one arm per kind of heads."""
    lines = []
    for row in times.rows:
        low, high = (1 / end for end in reversed(row["gain_ci"]))
        lines.append({"strength": row["length"], "value": row["gain"], "low": low, "high": high, "arm": row["heads"]})
    return pd.DataFrame(lines)


def reading(times: AttentionTimes) -> str:
    """Return two sentences on how to read the figure of `gains`, computed from its numbers."""
    own, planted = times.rows[-2:]
    first = (
        f"At {times.longest} tokens sparse attention, search included, has {own['gain']:.2f} times the speed of full "
        f"attention on the model's heads (recall of mass {own['recall']:.3f})."
    )
    return first + (
        f" On planted heads, which keep {planted['density']:.2f} of the blocks, it has "
        f"{planted['gain']:.2f} times that speed: the gain of this code on sparse attention."
    )


def priced(optimized: nn.Module, prompt_1T: torch.Tensor, stride: int) -> dict[str, Any]:
    """Return the options of `cost_model` for sparse prefill: the density kept in one pass over the prompt, and the
    stride of the search. A prompt too short for a pattern is read whole, without a search.
    """
    method.reset_counts(optimized)
    workloads.prefill(optimized, prompt_1T)()
    density = method.density(optimized)["blocks"]
    return {"density": 1.0, "stride": 0} if density is None else {"density": density, "stride": stride}


def every_page(baseline: nn.Module, knobs: Mapping[str, Any]) -> nn.Module:
    """Return `baseline` with the same paged cache, all of whose pages a new token reads: the baseline that isolates
    sparsity. Latent attention is decoded in its latent space, as in the sparse arm.
    """
    return method.apply(baseline, **{**knobs, "pages": 0})


def whole_model(
    baseline: nn.Module,
    optimized: nn.Module,
    knobs: Mapping[str, Any],
    prompt_1T: torch.Tensor,
    effort: Effort,
    prefill_costs: Mapping[str, Any],
    formula: Mapping[str, Mapping[str, Any]],
    *,
    invalid: str | None = None,
    seed: int = 0,
) -> tuple[Compared, Compared]:
    """Return the comparisons of prefill, and of decoding after it with the chosen pages against all pages.

    `prefill_costs` and `formula` (for decoding: "costs" and "baseline_costs") are options of `cost_model`.
    """
    few = FEW_BLOCKS if prompt_1T.shape[1] >= LONG_PROMPT else min(effort.blocks, 12)
    effort = replace(effort, blocks=few)
    options: dict[str, Any] = {"invalid": invalid, "except_for": ("attention",), "seed": seed}
    prefill: dict[str, Any] = {"names": ("prefill",), "costs": dict(prefill_costs), "with_energy": False}
    reading_prompt = speed.compare(baseline, optimized, prompt_1T, effort, **prefill, **options)
    costs = {name: value for name, value in formula["costs"].items() if name not in prefill_costs}
    decode: dict[str, Any] = {"names": ("decode",), "costs": costs}
    decode |= {"baseline_costs": dict(formula["baseline_costs"])}
    return reading_prompt, speed.compare(every_page(baseline, knobs), optimized, prompt_1T, effort, **decode, **options)


def all_timed(prefill: Compared, decode: Compared, alone: AttentionTimes) -> list[Measurement]:
    """Return all timed measurements; the last is attention alone at the longest prompt.

    None is judged if the machine was busy or the rounds too few for any of them, so that tables agree with the record.
    """
    return withhold_if_busy([*prefill.measurements, *decode.measurements, *alone.measurements])


def bounds(prefill: Compared, decode: Compared) -> pd.DataFrame:
    """Return the rows of prefill and decode for `style.bound`."""
    return pd.DataFrame([*prefill.bounds(), *decode.bounds()])


@dataclass(frozen=True)
class PagesRead:
    """The share of cached tokens that decoding reads, and for each block the attention mass read (`mass held`) and the
    mass in its best pages (`in chosen pages`), which differ in the first blocks, since these read all pages.
    """

    share: float | None
    by_block: pd.DataFrame

    @property
    def mass(self) -> float:
        """The mean over blocks of the exact mass held."""
        return float(self.by_block["mass held"].mean())


def pages_read(optimized: nn.Module, timed: Compared, context_1T: torch.Tensor) -> PagesRead:
    """Return the exact mass in the pages read by new tokens after `context_1T`, and, for blocks that read all pages,
    the mass in as many of the best.

    Uses the decoding workload of `timed` if there is one.
    """
    masses: list[tuple[int, float]] = []
    states = method.sparsities(optimized)
    for state in states:
        state.watched_pages = max(each.pages for each in states)
        state.watch = lambda index, share_BH: masses.append((index, float(share_BH.mean())))
    method.reset_counts(optimized)
    (timed.timed["decode"].optimized if timed.timed else workloads.steps(optimized, context_1T, FEW_STEPS))()
    for state in states:
        state.watch = None
    by_block = pd.DataFrame(masses, columns=["block", "in chosen pages"]).groupby("block").mean().reset_index()
    all_read = {state.index for state in states if not state.pages}
    read = by_block["in chosen pages"].mask(by_block["block"].isin(all_read), 1.0)
    by_block.insert(1, "mass held", read)
    return PagesRead(method.density(optimized)["tokens"], by_block)


def decode_apart(
    baseline: nn.Module,
    optimized: nn.Module,
    knobs: Mapping[str, Any],
    context_1T: torch.Tensor,
    timed: Compared,
    new_tokens: int,
    invalid: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return name, purpose and measurements of the other gains of decoding: from the paged cache and its kernel, from
    these and sparsity together, and for latent attention over the stock path, which expands its cache at every token.

    In a name "… against …" the first arm is the optimized one, the second the baseline. Empty if the output is
    `invalid`. Workloads of `timed` are reused if they decode as many tokens; each arm reads the long prompt once.
    """
    if invalid:
        return []
    every = timed.timed["decode"].baseline if timed.timed else None
    count = min(new_tokens, FEW_STEPS)
    works: dict[str, Workload] = {}
    if every is not None and every.new_tokens == count:  # tokens per call; a workload of several turns has fewer
        works = {"every": every, "sparse": timed.timed["decode"].optimized}
    arms: dict[str, Callable[[], nn.Module]] = {
        "fair": lambda: absorbed_baseline.absorbed_baseline(baseline),
        "every": lambda: every_page(baseline, knobs),
        "sparse": lambda: optimized,
        "stock": lambda: baseline,
    }
    versus = [("all pages against the stock cache", "fair", "every", "the cache and its kernel, nothing left out")]
    versus += [("chosen pages against the stock cache", "fair", "sparse", "cache and sparsity together")]
    if absorbed_baseline.has_latents(baseline):
        versus += [("chosen pages against the stock path", "stock", "sparse", "expands its cache at every token")]
    parts = []
    for name, first, second, purpose in versus:
        for arm in (first, second):
            if arm not in works:
                works[arm] = workloads.steps(arms[arm](), context_1T, count)
        pairs = time_calls(works[first], works[second], FEW_BLOCKS, seed=seed)
        rate = paired_samples.from_pairs("decode_tokens_per_second", f"decode, {name}", pairs, count, None)
        parts.append({"name": name, "purpose": purpose, "measurements": [rate]})
    return parts


def time_calls(baseline: Callable[[], object], optimized: Callable[[], object], count: int, seed: int = 0) -> Pairs:
    """Return timed pairs of two calls that each last long enough to need no repetition."""
    return interleaved.paired(baseline, optimized, blocks=count, warmup=1, seed=seed, disturbance=disturbance.watch)
