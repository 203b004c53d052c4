"""What a cut is compared with: other choices of what to remove at the same share, weight-only int8 and int4, and a
sweep of shares.

Returns plain data. Knows nothing of tables, figures or records.
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
JUDGED_AS = {"magnitude": "magnitude", "random": "random 1"}  # saliency → what the control is called that it chose
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


def set_up(setup: PruningSetup, text: Text | None, ratio: float, granularity: str) -> RivalCuts | None:
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


def sized(bars: pd.DataFrame, arms: Sequence[ThirdArm]) -> pd.DataFrame:
    """Return the rows of `bars`, one per arm, with what each has left of the baseline's weights: parts come whole, so
    not every arm can lose the same share.
    """
    if not len(bars):
        return bars
    sizes = {arm.name: m.ratio for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    return bars.assign(**{"weights, ×": bars["arm"].map(sizes)})


def heading(arms: Sequence[ThirdArm], left_out: Mapping[str, str]) -> str:
    """Return what heads a table of `controls`: its unit, which other choices are surely nearer than the cut itself,
    with the weights that each has left, and what was left out, with its reason.
    """
    said, own = ["KL in nats per token."], claims.interval(arms, [BARE])
    sizes = {arm.name: m.ratio or 1.0 for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    nearer = []
    for name in [arm.name for arm in arms if arm.name not in (BARE, COMPENSATED, RECOVERED)]:
        known = claims.interval(arms, [name])
        if own and known and known.high < own.low:
            nearer.append(f"{name} ({known.value:.3g} at {sizes[name]:.3g}×)")
    if own and nearer:
        said.append(f"Nearer than {BARE} ({own.value:.3g} at {sizes[BARE]:.3g}× of the weights): {', '.join(nearer)}.")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    return " ".join([*said, f"Left out: {reasons or 'nothing'}."])


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
