"""The protocol of comparing before with after: the applied stack, its subsets, the identity transform, the sweeps.

The identity transform goes through the same steps as the optimized model, to test the comparison itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.measure.compare import speed
from lib.measure.compare.speed import Compared
from lib.measure.metrics import settings
from lib.measure.metrics.digits import signed
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.roofline import cost_model
from lib.models.checkpoints import io, placement
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks
from lib.optimizations.common import judgement
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.evidence import interactions
from lib.optimizations.common.judgement import Judgement
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import method as composing
from lib.optimizations.modular_components import traits
from lib.optimizations.pre_vs_post_optimization import attribution, method, sweeps
from lib.optimizations.pre_vs_post_optimization.method import AppliedStack, ChosenStack

# The measurement that decides the verdict of each dimension, declared before any is taken.
PRIMARIES = {
    "performance": ("generate_tokens_per_second", "generate"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
MOST_PARTS = 4
CURVES = ["arm", "strength", "value", "low", "high"]
SHARES = ["what", "part", "value", "low", "high"]
EMPTY_STACK = "an empty stack"


@dataclass(frozen=True)
class StackSetup:
    """A model, the stack chosen for it, and the calibration text; `weights` is the hash of the model's weights."""

    loaded: Loaded
    effort: Effort
    quick: Effort
    seed: int
    calibration: list[dict[str, torch.Tensor]]
    stack: ChosenStack
    weights: str

    @property
    def pays(self) -> bool:
        """Whether the stack has steps; if it is empty, nothing pays and the optimized model is a copy."""
        return bool(self.stack.steps)

    @property
    def in_words(self) -> str:
        """The stack and who chose it."""
        order = " → ".join(step.optimization for step in self.stack.steps) or "nothing pays here"
        return f"The stack: {order}; chosen by {self.stack.origin}."

    def table(self) -> pd.DataFrame:
        """Return a row per step of the stack or, for the default rule, a row per part that it kept or rejected."""
        if self.stack.considered:
            return pd.DataFrame(self.stack.considered)
        rows = [{"step": step.optimization, "knobs": str(step.knobs or "defaults")} for step in self.stack.steps]
        return pd.DataFrame(rows)


def prepare(loaded: Loaded, effort: Effort, seed: int, perplexity_margin: float) -> StackSetup:
    """Return the setup with the stored stack or the one chosen by the default rule; see `method.chosen`.

    A stored stack gets the calibration text with which it was judged, and with which `apply` saves it.
    """
    quick = effort if effort.brief else settings.read("quick", loaded.scale)
    weights = io.weights_hash(loaded.model)
    calibration = calibration_text.of_stack(loaded, quick, seed)
    options: dict[str, Any] = {"weights": weights, "perplexity_margin": perplexity_margin, "seed": seed}
    stack = method.chosen(loaded, calibration, effort=quick, **options)
    if stack.effort:
        calibration = calibration_text.of_stack(loaded, quick, seed, chosen_at=stack.effort)
    return StackSetup(loaded, effort, quick, seed, calibration, stack, weights)


def applied(setup: StackSetup) -> tuple[AppliedStack, pd.DataFrame]:
    """Apply the stack, measuring seconds and joules; return it and the shapes of the middle block before and after.

    Asserts that a stack meant to change weights did so.
    """
    baseline = setup.loaded.model
    middle = len(anatomy(baseline).blocks) // 2
    stack = method.apply_stack(baseline, setup.calibration, setup.stack.steps, seed=setup.seed)
    modules = [composing.parts()[step.optimization] for step in setup.stack.steps]
    touched = {aspect for module in modules for aspect in module.COMPOSES["touches"]}
    in_weights = touched & {"shapes", "weights", "storage"}  # attention and execution do not change them
    assert not in_weights or io.weights_hash(stack.model) != setup.weights, "the stack changed nothing"
    shapes = {name: traits.shapes(model, middle) for name, model in (("before", baseline), ("after", stack.model))}
    return stack, pd.DataFrame(shapes).fillna("–").rename_axis("tensor").reset_index()


@dataclass(frozen=True)
class Subsets:
    """The models of all subsets of the stack's parts, by name, and the seconds it took to build them.

    `refused`: why a subset could not be built, in which case the whole stack is one part.
    """

    parts: dict[str, list[RecipeStep]]
    models: dict[str, nn.Module]
    seconds: float
    refused: str = ""

    def table(self) -> pd.DataFrame:
        """Return the megabytes of weights of each subset."""
        rows = [
            {"subset": name, "MB of weights": cost_model.weights_bytes(model) / 1e6}
            for name, model in self.models.items()
        ]
        return pd.DataFrame(rows)


def _fit(model: nn.Module, copies: int) -> bool:
    """Return whether that many further models fit into memory; the baseline and the whole stack exist already."""
    try:
        placement.require_room(model, copies, "attribution")
    except NotApplicable:
        return False
    return True


def subsets(setup: StackSetup, stack: AppliedStack, attribution_seconds: float) -> Subsets:
    """Build every subset of the stack's parts and return them.

    The stack is cut into as many parts as can be built within `attribution_seconds`, estimated from the time to apply
    the whole, and held in memory; into one if a part refuses a model that another did not prepare for it. Asserts that
    the baseline is unchanged.
    """
    baseline, steps = setup.loaded.model, setup.stack.steps
    affordable = (
        count
        for count in range(MOST_PARTS, 1, -1)
        if stack.seconds * 2 ** (min(count, len(steps)) - 1) <= attribution_seconds
        and _fit(baseline, 2 ** min(count, len(steps)) - 2)
    )
    parts = attribution.groups(steps, next(affordable, 1))
    start, refused = time.perf_counter(), ""
    options: dict[str, Any] = {"whole": stack.model, "seed": setup.seed}
    try:
        models = attribution.every_subset(baseline, setup.calibration, parts, **options)
    except UserError as error:
        parts, refused = attribution.groups(steps, 1), str(error)
        models = attribution.every_subset(baseline, setup.calibration, parts, **options)
    seconds = time.perf_counter() - start
    assert io.weights_hash(baseline) == setup.weights, "the baseline was changed"
    return Subsets(parts, {interactions.named(*subset): model for subset, model in models.items()}, seconds, refused)


def judge(setup: StackSetup, optimized: nn.Module, distances: Sequence[int]) -> Judgement:
    """Return the judgement of `optimized`, including retrieval at the further `distances`, in tokens."""
    loaded, effort, seed = setup.loaded, setup.effort, setup.seed
    judged = judgement.judge(loaded, optimized, effort, seed)
    if loaded.random_weights:
        return judged
    options = {"resamples": effort.resamples, "seed": seed}
    further = sweeps.retrieval(loaded, optimized, effort, distances, **options)
    if judged.degenerate:
        further = judgement.invalid(further, judged.degenerate)
    return replace(judged, measurements=[*judged.measurements, *further])


def identity_control(
    setup: StackSetup, prompt_BT: torch.Tensor, judged: Judgement, compared: Compared
) -> list[Measurement]:
    """Return the measurements of the identity transform, an unchanged copy of the model.

    Answers at effort quick, then prefill and decode. An empty stack is itself the identity transform, so its own
    measurements in `judged` and `compared` are returned.
    """
    if not setup.pays:
        return [*judged.measurements, *(m for m in compared.measurements if m.dimension == "performance")]
    baseline, seed = setup.loaded.model, setup.seed
    identity = composing.compose(baseline, setup.calibration, []).model
    assert io.weights_hash(identity) == setup.weights, "the identity transform changed a weight"
    answers = [evaluate.evaluate(setup.loaded, setup.quick, model=model, seed=seed) for model in (baseline, identity)]
    same = answer_comparison.compare(*answers, resamples=setup.effort.resamples, seed=seed)
    arms = (baseline, identity, prompt_BT, setup.effort)
    unchanged = judgement.timed(speed.compare(*arms, names=("prefill", "decode"), with_energy=False, seed=seed))
    return [*same, *(m for m in unchanged.measurements if m.dimension == "performance")]


@dataclass(frozen=True)
class GainSweep:
    """Gains at several prompt lengths and batch sizes: the new measurements, and all points as a frame of curves."""

    measurements: list[Measurement]
    curves: pd.DataFrame

    def of(self, arm: str) -> pd.DataFrame:
        """Return the points of "prefill" or "decode", for `style.impact`."""
        return self.curves[self.curves["arm"] == arm]

    def alt(self, arm: str) -> str:
        """Return the points of one arm in words."""
        points = ", ".join(f"{row.strength:.0f}: {row.value:.2f}" for row in self.of(arm).itertuples())
        return f"Gain of the whole stack in {arm}, 95 % intervals. {points}."


def sweep(
    setup: StackSetup, optimized: nn.Module, prompt_BT: torch.Tensor, compared: Compared, *, skip: bool
) -> GainSweep:
    """Time prefill by prompt length and decode by batch size; points in `compared` are not timed again.

    At preview only one further length is timed, with the minimum of rounds. Nothing is measured with `skip` (the output
    has degenerated) or if nothing pays.
    """
    effort = setup.effort
    further: set[int] = set() if effort.preview else {64, 256}
    lengths = sorted((further | {effort.prompt_tokens * 2}) - {effort.prompt_tokens})
    batches = sorted({4, effort.batch * 2} - {effort.batch})
    points: dict[str, Any] = {"lengths": lengths, "batches": batches, "new_tokens": min(effort.new_tokens, 8)}
    points |= {"seconds": 0.0} if effort.preview else {}
    baseline = setup.loaded.model
    measured = [] if skip or not setup.pays else sweeps.sweep(baseline, optimized, prompt_BT, **points, seed=setup.seed)
    known = sweeps.points_known(compared.measurements, effort.prompt_tokens, effort.batch)
    return GainSweep(measured, pd.DataFrame(sweeps.gains([*known, *measured]), columns=CURVES))


@dataclass(frozen=True)
class Attribution:
    """Shapley values of the parts and the whole: a row per quantity (`what`) and part, with intervals.

    `source` describes the measurement; without rows it is the reason.
    """

    shares: pd.DataFrame
    source: str

    def speeds(self) -> pd.DataFrame:
        """Return the shares of log-speed for `style.bars`, an arm per part and workload."""
        rows = self.shares[self.shares["what"] != "loss"]
        return rows.assign(arm=rows["part"] + ", " + rows["what"])

    def losses(self) -> pd.DataFrame:
        """Return the shares of loss for `style.bars`; empty without text."""
        rows = self.shares[self.shares["what"] == "loss"]
        return rows.assign(arm=rows["part"])

    def alt(self, rows: pd.DataFrame) -> str:
        """Return shares in words."""
        shares = (f"{arm} {signed(value, '.3f')}" for arm, value in zip(rows["arm"], rows["value"]))
        return f"Shapley values: {'; '.join(shares)}."

    def reading(self) -> str:
        """Return two sentences: the whole gain in prefill, and the part with the largest share; or why there is none.

        The share is called "most of it" if it is more than half of a gain.
        """
        if self.shares.empty:
            if self.source == EMPTY_STACK:
                return "Nothing pays here, so the stack is empty. There is no gain to attribute."
            return f"{self.source}. So the gain is not attributed to parts."
        rows = self.shares[self.shares["what"] == "prefill"]
        whole = rows[rows["part"] == attribution.WHOLE].iloc[0]
        parts = rows[rows["part"] != attribution.WHOLE]
        first = (
            f"In prefill the whole stack {'gains' if whole.value > 0 else 'changes by'} {signed(whole.value, '.3f')} "
            f"of log-speed ({signed(whole.low, '.3f')} to {signed(whole.high, '.3f')})."
        )
        if len(parts) == 1:
            return f"{first} All of it comes from {parts.iloc[0].part}, its only part."
        best = parts.loc[parts["value"].idxmax()]
        most = whole.value > 0 and best.value > whole.value / 2
        share = "Most of it" if most else "The largest share"
        value, low, high = (signed(number, ".3f") for number in (best.value, best.low, best.high))
        return f"{first} {share} comes from {best.part}, {value} ({low} to {high})."


def attributed(
    setup: StackSetup, every: Subsets, prompt_BT: torch.Tensor, compared: Compared, invalid: str | None = None
) -> Attribution:
    """Time all subsets in common rounds, read the same windows with each, and return the gain attributed to parts.

    A stack of one part needs no rounds of its own: the timings in `compared` are used. Nothing is attributed if the
    stack's output has degenerated (`invalid` says why) or a subset's losses are not finite. Asserts that shares add up.
    """
    effort, quick, seed, parts = setup.effort, setup.quick, setup.seed, every.parts
    nothing = pd.DataFrame(columns=SHARES)
    if not parts:
        return Attribution(nothing, EMPTY_STACK)
    if invalid:
        return Attribution(nothing, f"The output has degenerated: {invalid}")
    size = "final", 2 * quick.windows, quick.window_tokens, seed + 1
    windows_NT, source_N = tasks.text_windows(setup.loaded, *size), tasks.window_sources(setup.loaded, *size)
    losses = {} if setup.loaded.random_weights else interactions.losses(every.models, windows_NT)
    if broken := [name for name, loss_N in losses.items() if not np.isfinite(loss_N).all()]:
        return Attribution(nothing, f"Losses are not finite (NaN or infinite) after {', '.join(broken)}")
    if len(parts) == 1 and compared.timed:
        timed = attribution.one_part(next(iter(parts)), compared.timed)
        rounds = "; ".join(f"{name}: {compared.timed[name].pairs.describe()}" for name in timed)
    else:
        timed = interactions.time_arms(every.models, prompt_BT[:, :256], effort.blocks, seed)
        rounds = f"{effort.blocks} common rounds of every subset of {len(parts)} parts"
        rounds += f", on {interactions.timed_on([timed])}"
    shares = pd.DataFrame(attribution.attribute(list(parts), timed, losses, seed, source_N))
    whole = shares[shares["part"] == attribution.WHOLE].set_index("what")["value"]
    summed = shares[shares["part"] != attribution.WHOLE].groupby("what")["value"].sum()
    assert np.allclose(summed[whole.index], whole, atol=1e-9), "the shares do not add up to the whole"
    undivided = f"; one part only, because a subset cannot be built: {every.refused}" if every.refused else ""
    return Attribution(shares, f"{rounds}; {len(windows_NT) if losses else 0} windows{undivided}")


def history_path(history: str) -> Path | None:
    """Return the path of the build history named by the parameter `history`; None for the default."""
    return Path(history) if history else None
