"""The protocol of the structured-pruning notebook: the cut, its rivals at the same share, a sweep of shares, and the
answers to what would refute it.

Returns plain data. Knows nothing of tables, figures or records.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality.evaluate import Text
from lib.measure.roofline import cost_model
from lib.models.calibration.activations import Observation, observe
from lib.models.calibration.distillation import Lessons
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import finetuning, rival_arms
from lib.optimizations.common.compression import calibration_text, facts, weight_only
from lib.optimizations.common.evidence import claims, relations
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.structured_pruning import method
from lib.optimizations.structured_pruning.cutting import FITTED
from lib.optimizations.structured_pruning.saliency import OF_EXPERTS

CLAIMS = (
    "Removing parts at random harms no more than removing the idle ones.",
    "Removing parts by the size of their weights harms no more than removing the idle ones.",
    "The gain drowns in the A/A noise although the bound predicts more than can be detected.",
)
# What carries the word of each dimension: one measurement, declared before any is taken.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
BY_WEIGHTS, BY_CHANCE = "chosen by weights", "chosen by chance"
RANDOM_SEEDS = 3
STRENGTHS, PREVIEW_STRENGTHS = (0.1, 0.2, 0.3, 0.5), (0.1, 0.3, 0.5)
JUDGED_AS = {"magnitude": "magnitude", "random": "random 1"}  # saliency → what the control is called that it chose
PROXY_STEPS = 30  # of distillation by default
YARDSTICKS = tuple(weight_only.NAMES.values())
AT_INT8_BYTES = "at int8's bytes"
BARE, COMPENSATED, RECOVERED = "activation", "activation, compensated", "activation, recovered"


@dataclass(frozen=True)
class PruningSetup:
    """A model with its calibration text and what was observed on it, which took `seconds`."""

    loaded: Loaded
    calibration: list[dict[str, torch.Tensor]]
    finetune_batches: list[dict[str, torch.Tensor]]
    observation: Observation
    seconds: float
    seed: int
    effort: Effort

    @property
    def baseline(self) -> nn.Module:
        return self.loaded.model

    @property
    def middle(self) -> int:
        """The index of the block that is shown."""
        return len(self.observation.blocks) // 2

    @property
    def influence(self) -> list[float]:
        """What each block changes: mean 1 − cos(input, output) over the calibration tokens."""
        return [block.influence / self.observation.tokens for block in self.observation.blocks]

    def facts(self) -> dict[str, object]:
        """Return what is about to be pruned, for a table."""
        return facts.about(
            self.loaded,
            decoder_parameters=f"{method.decoder_parameters(self.baseline):,}",
            all_parameters=f"{cost_model.parameters(self.baseline):,}",
            calibration_tokens=f"{self.observation.tokens:,}",
        )


def set_up(loaded: Loaded, effort: Effort, seed: int) -> PruningSetup:
    """Return the model with its calibration text, observed in one pass."""
    length = effort.calibration_tokens
    calibration = prompts.calibration(loaded, calibration_text.sequences(loaded.model, effort), length, seed)
    lessons = finetuning.sequences(effort)
    finetune_batches = prompts.calibration(loaded, lessons, length, seed, tokens_at_once=1024)
    start = time.perf_counter()
    observation = observe(loaded.model, calibration)
    return PruningSetup(loaded, calibration, finetune_batches, observation, time.perf_counter() - start, seed, effort)


# --- the mechanism ---------------------------------------------------------------------------------------------------


def saliency_curves(setup: PruningSetup, shares: dict[str, float]) -> pd.DataFrame:
    """Return the sorted saliencies of the middle block's parts that are to lose a share.

    One row per part: `strength` is its rank in percent, `value` its saliency over the largest, `arm` the granularity.
    Empty where whole blocks go.
    """
    block = anatomy(setup.baseline).blocks[setup.middle]
    statistics = setup.observation.blocks[setup.middle]
    curves = []
    for part, score in method.saliency_scores(block, statistics).items():
        if shares.get(part) and part != "depth":
            ordered = (score.flatten() / score.max()).sort(descending=True).values.tolist()
            rank = [100 * i / len(ordered) for i in range(len(ordered))]
            curves.append(pd.DataFrame({"strength": rank, "value": ordered, "arm": part}))
    return pd.concat(curves) if curves else pd.DataFrame(columns=["strength", "value", "arm"])


def read_saliency(curves: pd.DataFrame, shares: dict[str, float]) -> tuple[str, str]:
    """Return two sentences on the curves: what share of the saliency goes, and what would go if all were alike."""
    if not len(curves):
        return "Whole blocks go, so no part inside a block is ranked.", "The table of influence shows what is ranked."
    part, curve = next(iter(curves.groupby("arm", sort=False)))
    values = curve["value"].sort_values()
    share = shares[str(part)]
    carried = values.iloc[: round(share * len(values))].sum() / values.sum()
    first = f"The {100 * share:.0f} % least salient of the {part} carry {100 * carried:.0f} % of the block's saliency."
    if carried < share / 2:
        return first, "The curve is steep: many of them hardly matter on this text."
    return first, "The curve is flat: even the least salient ones matter on this text."


# --- the cut ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model straight after the cut, after the fit (the same model where nothing was fitted), and after
    distillation.

    `seconds` are those of making the optimized one, the observation included; steps of which none was kept took no part
    in that.
    """

    pruned: nn.Module
    fitted: nn.Module
    optimized: nn.Module
    lessons: Lessons
    removed: float
    seconds: float

    @property
    def summary(self) -> str:
        """What was removed, whether the rest was fitted, and what training did."""
        said = [f"{100 * self.removed:.1f} % of the decoder's parameters are removed."]
        if self.fitted is not self.pruned:
            said.append("What read them is refitted by least squares.")
        return " ".join([*said, *filter(None, [finetuning.read(self.lessons)])])


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return the steps of distillation of a run; by default (-1) PROXY_STEPS on a proxy model, none at real size."""
    return finetuning.steps_of(loaded, finetune_steps, PROXY_STEPS, effort)


def cut(setup: PruningSetup, ratio: float, granularity: str, finetune_steps: int) -> PrunedModel:
    """Return the model with about `ratio` of the decoder's parameters removed, fitted, then distilled.

    The matrices that read the removed channels or heads are refitted by least squares, unless weights are random: the
    same model as `method.apply` returns. Where no step brings it nearer to the baseline, it stays so. `removed` is the
    share actually removed.
    """
    options: dict[str, Any] = {"ratio": ratio, "granularity": granularity, "seed": setup.seed}
    options |= {"observation": setup.observation}
    start = time.perf_counter()
    pruned = fitted = method.apply(setup.baseline, setup.calibration, compensate=False, **options)
    shares = method.plan(setup.baseline, ratio, granularity)
    if not setup.loaded.random_weights and any(shares[part] for part in FITTED):
        start = time.perf_counter()
        fitted = method.apply(setup.baseline, setup.calibration, **options)
    cut_seconds, start = time.perf_counter() - start, time.perf_counter()
    optimized, lessons = method.recover(
        fitted, setup.baseline, setup.finetune_batches, steps=finetune_steps, seed=setup.seed
    )
    seconds = setup.seconds + cut_seconds
    if lessons.kept:
        seconds += time.perf_counter() - start
    else:
        optimized = fitted
    removed = 1 - method.decoder_parameters(optimized) / method.decoder_parameters(setup.baseline)
    return PrunedModel(pruned, fitted, optimized, lessons, removed, seconds)


def optimize(
    loaded: Loaded, effort: Effort, *, ratio: float, granularity: str, finetune_steps: int, seed: int
) -> nn.Module:
    """Return the model that a run with these parameters measures."""
    return cut(set_up(loaded, effort, seed), ratio, granularity, steps_of(loaded, finetune_steps, effort)).optimized


def shapes(baseline: nn.Module, optimized: nn.Module, index: int) -> pd.DataFrame:
    """Return the shapes of the matrices of block `index`, or of the last block left, in both arms."""
    last = len(anatomy(optimized).blocks) - 1
    before, after = block_shapes(baseline, index), block_shapes(optimized, min(index, last))
    return pd.DataFrame({"tensor": before.keys(), "baseline": before.values(), "optimized": after.values()})


def block_shapes(model: nn.Module, index: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of block `index`: parameter name → shape. Indices are of the model as it is."""
    block = anatomy(model).blocks[index].module
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters() if parameter.ndim > 1}


# --- rivals and strengths --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RivalCuts:
    """Prunes one model in several ways and compares each with the baseline on the held-out `text`."""

    setup: PruningSetup
    text: Text
    ratio: float
    granularity: str

    def judge(self, name: str, purpose: str, model: nn.Module) -> ThirdArm:
        """Return an arm with perplexity, divergence, agreement and bytes of `model`."""
        return rival_arms.judged(self.setup.baseline, self.text, name, purpose, model)

    def cut(self, name: str, purpose: str, **changed: Any) -> ThirdArm:
        """Return an arm pruned without recovery; `changed` are options of `method.apply` that differ."""
        options: dict[str, Any] = {
            "ratio": self.ratio,
            "granularity": self.granularity,
            "seed": self.setup.seed,
            "compensate": False,
        } | changed
        model = method.apply(self.setup.baseline, self.setup.calibration, observation=self.setup.observation, **options)
        return self.judge(name, purpose, model)


def rivals(setup: PruningSetup, text: Text | None, ratio: float, granularity: str) -> RivalCuts | None:
    """Return the rivals of a cut, None where the baseline read no text (random weights)."""
    if text is None:
        return None
    return RivalCuts(setup, rival_arms.reference(setup.baseline, text, setup.effort), ratio, granularity)


def controls(arms: RivalCuts | None, chosen: PrunedModel) -> tuple[list[ThirdArm], dict[str, str]]:
    """Return other choices of what to remove at the same share, and what was left out as name → reason.

    Without recovery: by activation (the cut itself), by weights, at random, for experts by frequency and by the norms
    of their outputs; remaining weights refitted to compensate; shares that differ by block; each granularity alone,
    depth also as one span. Last the cut after distillation, where a step of that was kept. Empty without rivals.
    """
    if arms is None:
        return [], {}
    seed = arms.setup.seed
    left_out: dict[str, str] = {}
    judged = [arms.judge(BARE, "chosen by what passes through", chosen.pruned)]
    judged.append(arms.cut("magnitude", BY_WEIGHTS, saliency="magnitude"))
    for i in range(RANDOM_SEEDS):
        judged.append(arms.cut(f"random {i + 1}", BY_CHANCE, saliency="random", seed=seed + i))
    if chosen.fitted is not chosen.pruned:
        judged.append(arms.judge(COMPENSATED, "what reads the removed parts fitted by least squares", chosen.fitted))
    for name, purpose, changed in _variants(arms):
        try:
            judged.append(arms.cut(name, purpose, **changed))
        except UserError as reason:
            left_out[name] = str(reason)
    if chosen.lessons.kept:
        judged.append(arms.judge(RECOVERED, "after distillation", chosen.optimized))
    elif chosen.lessons.losses:
        same = BARE if chosen.fitted is chosen.pruned else COMPENSATED
        left_out[RECOVERED] = f"no step of training was kept, so the optimized model is {same}"
    return judged, left_out


def optimized_arm(judged: Sequence[ThirdArm], chosen: PrunedModel) -> ThirdArm | None:
    """Return the arm among `controls` that is the optimized model; None where none was judged."""
    fitted = BARE if chosen.fitted is chosen.pruned else COMPENSATED
    name = RECOVERED if chosen.lessons.kept else fitted
    return next((arm for arm in judged if arm.name == name), None)


def _variants(arms: RivalCuts) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, purpose and options of the cuts that refine or restrict the chosen one."""
    plan = method.plan(arms.setup.baseline, arms.ratio, arms.granularity)
    variants: list[tuple[str, str, dict[str, Any]]] = []
    if plan["experts"]:
        variants += [(name, "another saliency of experts", {"saliency": name}) for name in OF_EXPERTS]
    if plan["channels"]:
        variants.append(("activation, OWL", "shares by block", {"budget": "owl"}))
    variants += [(f"{name} alone", "one granularity", {"granularity": name}) for name in method.GRANULARITIES]
    span = {"granularity": "depth", "depth_criterion": "span"}
    return [*variants, ("depth alone, one span", "one granularity", span)]


def yardsticks(
    setup: PruningSetup, arms: RivalCuts | None, prompt_BT: torch.Tensor, effort: Effort
) -> tuple[list[ThirdArm], dict[str, str]]:
    """Return weight-only int8 and int4, timed on `prompt_BT`, and a cut to the bytes of int8; or why there is none."""
    text = None if arms is None else arms.text
    measured = rival_arms.yardsticks(setup.baseline, text, prompt_BT, effort, seed=setup.seed)
    if arms is None or not measured:
        return measured, {}
    name = f"activation {AT_INT8_BYTES}"
    decoder_bytes = sum(p.nbytes for block in anatomy(setup.baseline).blocks for p in block.module.parameters())
    try:
        share = rival_arms.removed_bytes(measured[0]) / decoder_bytes
        return [*measured, arms.cut(name, rival_arms.EQUAL_BYTES, ratio=share)], {}
    except UserError as reason:
        return measured, {name: str(reason)}


def impact(arms: RivalCuts | None, judged: Sequence[ThirdArm] = ()) -> pd.DataFrame:
    """Return the divergence in nats per token over the share removed in percent (`strength`), an `arm` per saliency.

    A curve ends where a share is out of the model's reach. What is among the `judged` controls, at the share of the
    run, is not cut again. Empty without rivals.
    """
    rows: list[dict[str, object]] = []
    if arms is None:
        return pd.DataFrame()
    controls_by_name = {arm.name: arm for arm in judged}
    at_share = {name: controls_by_name[known] for name, known in JUDGED_AS.items() if known in controls_by_name}
    for ratio in PREVIEW_STRENGTHS if arms.setup.effort.preview else STRENGTHS:
        known = at_share if ratio == arms.ratio else {}
        for saliency in method.SALIENCIES:
            try:
                arm = known.get(saliency) or arms.cut(saliency, "impact", ratio=ratio, saliency=saliency)
            except UserError:
                continue
            if divergence := claims.interval([arm], [arm.name]):
                rows.append({"arm": saliency, **divergence._asdict(), "strength": 100 * ratio})
    return pd.DataFrame(rows)


def refutations(arms: list[ThirdArm], measurements: list[Measurement]) -> list[ClaimAnswer]:
    """Return an answer to each of CLAIMS: from the divergences of `controls`, and from the times."""
    chosen = claims.interval(arms, [BARE])
    by_chance = claims.interval(arms, [arm.name for arm in arms if arm.purpose == BY_CHANCE])
    by_weights = claims.interval(arms, ["magnitude"])
    return [
        claims.harms_less(CLAIMS[0], chosen, by_chance, ("the idle ones", f"{RANDOM_SEEDS} random choices")),
        claims.harms_less(CLAIMS[1], chosen, by_weights, ("the idle ones", "by weights")),
        claims.gain_drowns(CLAIMS[2], measurements),
    ]


def replications(setup: PruningSetup, measurements: list[Measurement], granularity: str) -> list[relations.Judged]:
    """Return what others published of pruning, judged by this run: the influence of blocks, accuracy beside perplexity,
    and, where whole blocks went, generation beside multiple choice.
    """
    named = {m.metric: m for m in measurements if m.workload in ("prefill", "generate")}
    scores = [m for m in measurements if m.metric in ("accuracy", "accuracy_norm") and m.margin is not None]
    judged = [relations.ends(setup.influence), relations.accuracy(named.get("perplexity"), scores)]
    if granularity == "depth" and scores:
        judged.append(relations.generation(named.get("retrieval_exact_match"), scores[0]))
    return judged


def details(
    setup: PruningSetup, shares: dict[str, float], chosen: PrunedModel, curves: pd.DataFrame
) -> dict[str, dict[str, object]]:
    """Return what a record holds beside measurements: name → value, provenance, source."""
    tokens = f"{setup.observation.tokens} calibration tokens"
    values = {
        "removed_share": (chosen.removed, "derived", "parameters of the decoder blocks"),
        "shares": (shares, "derived", "plan of what to remove"),
        "influence": (setup.influence, "measured", tokens),
        "distillation_losses": (chosen.lessons.losses, "measured", "nats per token of each step"),
        "distillation_held_out": (chosen.lessons.checks(), "measured", "KL on text set aside, by steps taken"),
        "impact": (curves.to_dict("records"), "measured", "KL on held-out text, bootstrap intervals"),
    }
    return {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
