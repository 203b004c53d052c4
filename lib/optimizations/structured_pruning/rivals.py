"""Rivals of a cut: other choices of what to remove at the same share, weight-only int8 and int4, and a sweep of shares.

Returns plain data; independent of tables, figures and records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.settings import Effort
from lib.measure.quality.answers import Text
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common import rival_arms
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.structured_pruning import method
from lib.optimizations.structured_pruning.experiment import PrunedModel, PruningSetup
from lib.optimizations.structured_pruning.saliency import OF_EXPERTS

BY_WEIGHTS, BY_CHANCE = "chosen by weights", "chosen by chance"
RANDOM_SEEDS = 3
STRENGTHS, PREVIEW_STRENGTHS = (0.1, 0.2, 0.3, 0.5), (0.1, 0.3, 0.5)
JUDGED_AS = {"magnitude": "magnitude", "random": "random 1"}  # saliency → name of the control cut by it
YARDSTICKS = tuple(weight_only.NAMES.values())
AT_INT8_BYTES = "at int8's bytes"
BARE, COMPENSATED, RECOVERED = "activation", "activation, compensated", "activation, recovered"


@dataclass(frozen=True)
class RivalCuts:
    """Prunes one model in several ways and compares each with the baseline on the held-out `text`."""

    setup: PruningSetup
    text: Text
    ratio: float
    granularity: str

    def judge(self, name: str, purpose: str, model: nn.Module) -> ThirdArm:
        """Return an arm with the perplexity, divergence, agreement and bytes of `model`."""
        return rival_arms.judged(self.setup.baseline, self.text, name, purpose, model)

    def cut(self, name: str, purpose: str, **changed: Any) -> ThirdArm:
        """Return an arm pruned without recovery; `changed` are the options of `method.apply` that differ."""
        options: dict[str, Any] = {
            "ratio": self.ratio,
            "granularity": self.granularity,
            "seed": self.setup.seed,
            "compensate": False,
        } | changed
        model = method.apply(self.setup.baseline, self.setup.calibration, observation=self.setup.observation, **options)
        return self.judge(name, purpose, model)


def set_up(setup: PruningSetup, text: Text | None, ratio: float, granularity: str) -> RivalCuts | None:
    """Return the rivals of a cut, or None without text (random weights)."""
    if text is None:
        return None
    return RivalCuts(setup, rival_arms.reference(setup.baseline, text, setup.effort), ratio, granularity)


def controls(arms: RivalCuts | None, chosen: PrunedModel) -> tuple[list[ThirdArm], dict[str, str]]:
    """Return other choices of what to remove at the same share, and the choices left out as name → reason.

    Without recovery: by activation (the cut itself); by weights; at random; for experts by frequency and by the norms
    of their outputs; with the remaining weights refitted to compensate; with shares that differ by block; each
    granularity alone, depth also as one span. Last, the cut after distillation if any training step was kept. Empty
    without rivals.
    """
    if arms is None:
        return [], {}
    seed = arms.setup.seed
    left_out: dict[str, str] = {}
    judged = [arms.judge(BARE, "chosen by activations", chosen.pruned)]
    judged.append(arms.cut("magnitude", BY_WEIGHTS, saliency="magnitude"))
    for i in range(RANDOM_SEEDS):
        judged.append(arms.cut(f"random {i + 1}", BY_CHANCE, saliency="random", seed=seed + i))
    if chosen.fitted is not chosen.pruned:
        judged.append(arms.judge(COMPENSATED, "matrices that read removed parts are refitted", chosen.fitted))
    for name, purpose, changed in _variants(arms):
        try:
            judged.append(arms.cut(name, purpose, **changed))
        except UserError as reason:
            left_out[name] = str(reason)
    if chosen.lessons.kept:
        judged.append(arms.judge(RECOVERED, "after distillation", chosen.optimized))
    elif chosen.lessons.losses:
        undistilled = BARE if chosen.fitted is chosen.pruned else COMPENSATED
        left_out[RECOVERED] = f"no training step was kept, so the optimized model is {undistilled}"
    return judged, left_out


def sized(bars: pd.DataFrame, arms: Sequence[ThirdArm]) -> pd.DataFrame:
    """Return `bars`, one row per arm, with a column for the share of the baseline's weights that the arm keeps.

    Only whole parts can be removed, so not every arm can lose the same share.
    """
    if not len(bars):
        return bars
    sizes = {arm.name: m.ratio for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    return bars.assign(**{"weights, ×": bars["arm"].map(sizes)})


def heading(arms: Sequence[ThirdArm], left_out: Mapping[str, str]) -> str:
    """Return the heading of a table of `controls`.

    It names the unit, the choices whose interval lies below the cut's own, with the share of weights each keeps, and
    the choices left out, with reasons.
    """
    sentences, own = ["KL in nats per token."], claims.interval(arms, [BARE])
    sizes = {arm.name: m.ratio or 1.0 for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    nearer = []
    for name in [arm.name for arm in arms if arm.name not in (BARE, COMPENSATED, RECOVERED)]:
        divergence = claims.interval(arms, [name])
        if own and divergence and divergence.high < own.low:
            nearer.append(f"{name} ({divergence.value:.3g} at {sizes[name]:.3g}×)")
    if own and nearer:
        cut = f"{BARE} ({own.value:.3g} at {sizes[BARE]:.3g}× of the weights)"
        sentences.append(f"Nearer than {cut}: {', '.join(nearer)}.")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    return " ".join([*sentences, f"Left out: {reasons or 'nothing'}."])


def optimized_arm(judged: Sequence[ThirdArm], chosen: PrunedModel) -> ThirdArm | None:
    """Return the arm among `controls` that is the optimized model, or None if it was not judged."""
    fitted = BARE if chosen.fitted is chosen.pruned else COMPENSATED
    name = RECOVERED if chosen.lessons.kept else fitted
    return next((arm for arm in judged if arm.name == name), None)


def _variants(arms: RivalCuts) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the name, purpose and options of each cut that refines or restricts the chosen one."""
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
    """Return weight-only int8 and int4, timed on `prompt_BT`, and a cut to int8's bytes; also name → reason if there is
    no such cut.
    """
    text = None if arms is None else arms.text
    measured = rival_arms.yardsticks(setup.baseline, text, prompt_BT, effort, seed=setup.seed)
    name, int8 = f"activation {AT_INT8_BYTES}", measured[0]
    if arms is None:
        return measured, {}
    if not int8.measurements:
        return measured, {name: f"{int8.name} could not be made"}
    decoder_bytes = sum(p.nbytes for block in anatomy(setup.baseline).blocks for p in block.module.parameters())
    try:
        share = rival_arms.removed_bytes(int8) / decoder_bytes
        return [*measured, arms.cut(name, rival_arms.EQUAL_BYTES, ratio=share)], {}
    except UserError as reason:
        return measured, {name: str(reason)}


def impact(arms: RivalCuts | None, judged: Sequence[ThirdArm] = ()) -> pd.DataFrame:
    """Return the divergence in nats per token by the share of the decoder's bytes removed, in percent (`strength`), one
    `arm` per saliency. Where only whole blocks or experts can be removed, several ratios give one point.

    A curve ends at the largest share within the model's reach. Cuts at the run's share that are among the `judged`
    controls are not repeated. Empty without rivals.
    """
    rows: list[dict[str, object]] = []
    if arms is None:
        return pd.DataFrame()
    decoder_bytes = sum(p.nbytes for block in anatomy(arms.setup.baseline).blocks for p in block.module.parameters())
    controls_by_name = {arm.name: arm for arm in judged}
    at_share = {name: controls_by_name[control] for name, control in JUDGED_AS.items() if control in controls_by_name}
    for ratio in PREVIEW_STRENGTHS if arms.setup.effort.preview else STRENGTHS:
        measured = at_share if ratio == arms.ratio else {}
        for saliency in method.SALIENCIES:
            try:
                arm = measured.get(saliency) or arms.cut(saliency, "impact", ratio=ratio, saliency=saliency)
            except UserError:
                continue
            if divergence := claims.interval([arm], [arm.name]):
                removed = round(100 * rival_arms.removed_bytes(arm) / decoder_bytes, 1)
                rows.append({"arm": saliency, **divergence._asdict(), "strength": removed})
    return pd.DataFrame(rows).drop_duplicates(ignore_index=True)
