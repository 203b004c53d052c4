"""The protocol of the structured-pruning notebook: the observation, the mechanism on one block, and the cut.

Rivals are in `rivals`, the answers to the claims in `outcome`. Returns plain data; independent of tables, figures and
records.
"""

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.models.calibration.activations import Observation, observe
from lib.models.calibration.distillation import Lessons, can_split
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import finetuning
from lib.optimizations.common.compression import calibration_text, facts
from lib.optimizations.common.compression import options as checks
from lib.optimizations.structured_pruning import method
from lib.optimizations.structured_pruning.cutting import FITTED
from lib.optimizations.structured_pruning.saliency import SALIENCIES

# The measurement that decides the verdict of each dimension, declared before any is taken.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
PROXY_STEPS = 30  # default steps of distillation on a proxy model
BESIDE_THE_PLAN = 0.03  # tolerance in the share removed: small tensors that the plan does not count


@dataclass(frozen=True)
class PruningSetup:
    """A model with its calibration text and the statistics observed on it; observing took `seconds`."""

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
        """The index of the middle block, the one shown."""
        return len(self.observation.blocks) // 2

    @property
    def influence(self) -> list[float]:
        """The influence of each block: mean 1 − cos(input, output) over the calibration tokens."""
        return [block.influence / self.observation.tokens for block in self.observation.blocks]

    @property
    def unseen(self) -> int:
        """The number of experts that no calibration token reached; their channels are ranked by weights."""
        counts = (block.expert_tokens_E for block in self.observation.blocks)
        return sum(int((tokens_E == 0).sum()) for tokens_E in counts if tokens_E is not None)

    def facts(self) -> dict[str, object]:
        """Return the facts about the model to be pruned, for a table."""
        return facts.about(
            self.loaded,
            decoder_parameters=f"{method.decoder_parameters(self.baseline):,}",
            all_parameters=f"{cost_model.parameters(self.baseline):,}",
            calibration_tokens=f"{self.observation.tokens:,}",
            experts_without_tokens=self.unseen,
        )


def set_up(loaded: Loaded, effort: Effort, ratio: float, granularity: str, seed: int) -> PruningSetup:
    """Return the model with its calibration text, observed in one pass.

    Raises UserError, before any text is read, if `method.apply` refuses this ratio and granularity, and NotApplicable
    if the model's weights stream from a file.
    """
    checks.applies(method.NAME, loaded.model, method.applies_to)
    method.check(ratio, granularity, SALIENCIES[0])
    method.plan(loaded.model, ratio, granularity)
    length = effort.calibration_tokens
    calibration = prompts.calibration(loaded, calibration_text.sequences(loaded.model, effort), length, seed)
    finetune_count = finetuning.sequences(effort)
    finetune_batches = prompts.calibration(loaded, finetune_count, length, seed, tokens_at_once=1024)
    start = time.perf_counter()
    observation = observe(loaded.model, calibration)
    return PruningSetup(loaded, calibration, finetune_batches, observation, time.perf_counter() - start, seed, effort)


# --- the mechanism ---------------------------------------------------------------------------------------------------


def saliency_curves(setup: PruningSetup, shares: dict[str, float]) -> pd.DataFrame:
    """Return the sorted saliencies of those parts of the middle block that `shares` prunes.

    One row per part: `strength` is its rank in percent, `value` its saliency relative to the largest, `arm` its kind.
    "channels" and "expert_channels" lose the same share. Empty if whole blocks or nothing is removed.
    """
    block = anatomy(setup.baseline).blocks[setup.middle]
    statistics = setup.observation.blocks[setup.middle]
    curves = []
    for part, score in method.saliency_scores(block, statistics).items():
        if shares.get(_planned_as(part)) and part != "depth":
            ordered = (score.flatten() / score.max()).sort(descending=True).values.tolist()
            rank = [100 * i / len(ordered) for i in range(len(ordered))]
            curves.append(pd.DataFrame({"strength": rank, "value": ordered, "arm": part}))
    return pd.concat(curves) if curves else pd.DataFrame(columns=["strength", "value", "arm"])


def _planned_as(part: str) -> str:
    """Return the granularity of the plan to which a kind of part belongs."""
    return "channels" if part == "expert_channels" else part


def read_saliency(curves: pd.DataFrame, shares: dict[str, float]) -> tuple[str, str]:
    """Return two sentences on the curves: the share of the saliency that is removed, and whether the curve is steep."""
    if not len(curves) and not shares["depth"]:
        reason = "The middle block has no such part." if any(shares.values()) else "Nothing is to be removed."
        return reason, "So no curve is drawn."
    if not len(curves):
        return (
            "Whole blocks are removed, so no part inside a block is ranked.",
            "The table of influence shows how the blocks are ranked.",
        )
    part, curve = next(iter(curves.groupby("arm", sort=False)))
    values = curve["value"].sort_values()
    share = shares[_planned_as(str(part))]
    carried = values.iloc[: round(share * len(values))].sum() / values.sum()
    parts = str(part).replace("_", " ")
    first = f"The {100 * share:.0f} % least salient of the {parts} carry {100 * carried:.0f} % of the block's saliency."
    if carried < share / 2:
        return first, "The curve is steep: many of them hardly matter on this text."
    return first, "The curve is flat: even the least salient ones matter on this text."


# --- the cut ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model right after the cut, after the fit (the same model if nothing was fitted), and after distillation.

    `seconds` is the time to make the optimized model, including the observation, and including distillation only if a
    step of it was kept.
    """

    pruned: nn.Module
    fitted: nn.Module
    optimized: nn.Module
    lessons: Lessons
    removed: float
    seconds: float

    @property
    def summary(self) -> str:
        """The share removed, whether the rest was refitted, and the effect of training."""
        sentences = [f"{100 * self.removed:.1f} % of the decoder's parameters are removed."]
        if self.fitted is not self.pruned:
            sentences.append("The matrices that read removed parts are refitted by least squares.")
        return " ".join([*sentences, *filter(None, [finetuning.read(self.lessons)])])


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return a run's steps of distillation; the default (-1) is PROXY_STEPS on a proxy model, none at real size."""
    return finetuning.steps_of(loaded, finetune_steps, PROXY_STEPS, effort)


def cut(setup: PruningSetup, ratio: float, granularity: str, finetune_steps: int) -> PrunedModel:
    """Return the model with about `ratio` of the decoder's parameters removed, refitted, then distilled.

    The matrices that read removed channels or heads are refitted by least squares, as `method.apply` does, unless
    weights are random or there is only one sequence of text. If no step of distillation brings the model nearer to the
    baseline, the undistilled model is kept. `removed` is the share actually removed.
    """
    options: dict[str, Any] = {"ratio": ratio, "granularity": granularity, "seed": setup.seed}
    options |= {"observation": setup.observation}
    start = time.perf_counter()
    pruned = fitted = method.apply(setup.baseline, setup.calibration, compensate=False, **options)
    shares = method.plan(setup.baseline, ratio, granularity)
    fits = not setup.loaded.random_weights and can_split(setup.calibration)  # as `method.apply` does by default
    if fits and any(shares[part] for part in FITTED):
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


def is_as_planned(setup: PruningSetup, chosen: PrunedModel, ratio: float, granularity: str) -> bool:
    """Return whether the share removed is what `method.plan` gives: `ratio` rounded to whole experts, groups, blocks or
    multiples of channels.
    """
    least, most = method.planned(setup.baseline, ratio, granularity)
    return least - BESIDE_THE_PLAN < chosen.removed < most + BESIDE_THE_PLAN


def optimize(
    loaded: Loaded, effort: Effort, *, ratio: float, granularity: str, finetune_steps: int, seed: int
) -> nn.Module:
    """Return the model that a run with these parameters measures.

    Raises UserError, before any text is read, for options that `method.apply` refuses.
    """
    setup = set_up(loaded, effort, ratio, granularity, seed)
    return cut(setup, ratio, granularity, steps_of(loaded, finetune_steps, effort)).optimized


def shapes(baseline: nn.Module, optimized: nn.Module, index: int) -> pd.DataFrame:
    """Return the shapes of the matrices of block `index` in both arms; if it is removed, of the last block left."""
    last = len(anatomy(optimized).blocks) - 1
    before, after = block_shapes(baseline, index), block_shapes(optimized, min(index, last))
    return pd.DataFrame({"tensor": before.keys(), "baseline": before.values(), "optimized": after.values()})


def block_shapes(model: nn.Module, index: int) -> dict[str, tuple[int, ...]]:
    """Return parameter name → shape for the matrices of block `index`, counted in `model` itself."""
    block = anatomy(model).blocks[index].module
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters() if parameter.ndim > 1}
