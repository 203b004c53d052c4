"""Pre- against post-optimization: a model's best stack, chosen and applied.

The stack is the one stored by a search (`lib.optimizations.common.recipe`), or else one chosen here by a fixed rule on
text that is never used for judging. Applying is timed and its energy read; `modular_components` composes the steps.
Independent of any particular optimization.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.measure.metrics.catalogue import PERPLEXITY_MARGIN, SIZE_MARGIN, SPEED_MARGIN
from lib.measure.metrics.measurement import Provenance
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.measure.trackers import energy
from lib.models.loading import Loaded
from lib.models.tasks.tasks import text_windows
from lib.optimizations.common import recipe
from lib.optimizations.common.evidence import interactions, shapley
from lib.optimizations.common.evidence.shapley import Estimate
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import search_quality
from lib.optimizations.modular_components import attempts
from lib.optimizations.modular_components import method as composing

NAME = "pre_vs_post_optimization"
SEARCH_WINDOWS, WINDOW_TOKENS = 8, 256
ROUNDS, MOST_ROUNDS = 6, 18  # timing rounds of a candidate: first, and at most until the interval is narrow
MOST_SECONDS = 20.0  # no further rounds are started after this


@dataclass(frozen=True)
class ChosenStack:
    """A stack in pipeline order (empty: nothing pays) and its origin.

    `considered`: a row per step that the default rule kept or rejected; empty for a stored stack. `inputs`: path of the
    stored stack's file in the project → its hash, empty if there is none; a changed hash means another choice.
    `effort`: the effort at which a stored stack was judged, if it states one; empty for the default rule.
    """

    steps: list[RecipeStep]
    origin: str
    considered: list[dict] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    effort: str = ""


@dataclass(frozen=True)
class AppliedStack:
    """The model after a stack, and the time and energy of applying it; `provenance` and `source` are of the joules."""

    model: nn.Module = field(repr=False)
    steps: list[RecipeStep]
    seconds: float
    joules: float
    provenance: Provenance
    source: str


def applies_to(model: nn.Module) -> str | None:
    """Return None if some composable optimization applies, else the reason."""
    return None if composing.applicable(model)[0] else "no optimization that can be composed applies to this model"


def chosen(
    loaded: Loaded,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    weights: str = "",
    effort: Effort | None = None,
    perplexity_margin: float = PERPLEXITY_MARGIN,
    seed: int = 0,
) -> ChosenStack:
    """Return the stack that a search stored for this model and scale, or else the choice of the default rule.

    The default rule runs at `effort` (default quick); its stack may be empty: nothing pays here. A stored stack keeps
    the order in which it was judged, unless its parts refuse that. It is refused if it was chosen for weights other
    than `weights` (a hash), lost more than the margins, or cannot be ordered; `origin` gives the reason. Raises
    UserError for a stored stack that is damaged or belongs to another model.
    """
    composing.parts()  # imported before models are tried: a failed import may keep the frames above it alive
    inputs = recipe.hashed(loaded.name, loaded.scale)
    stored, refused = recipe.find(loaded.name, loaded.scale), ""
    if stored is not None:
        refused = recipe.unfit(stored, weights) or ("" if stored.stack else "it chose to change nothing")
        try:
            steps = [] if refused else composing.kept_order(stored.stack, loaded.model)
        except UserError as error:
            refused = str(error)
        if not refused:
            origin = f"{stored.chosen_by}, effort {stored.effort or 'not stated'}"
            return ChosenStack(steps, origin, inputs=inputs, effort=stored.effort)
    options: dict[str, Any] = {"effort": effort, "perplexity_margin": perplexity_margin, "seed": seed}
    default = default_stack(loaded, calibration, **options)
    gc.collect()  # models hold reference cycles: free the tried ones now
    origin = default.origin if stored is None else f"{default.origin} (of {stored.chosen_by}: {refused})"
    return replace(default, origin=origin, inputs=inputs)


def default_stack(
    loaded: Loaded,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    effort: Effort | None = None,
    perplexity_margin: float = PERPLEXITY_MARGIN,
    seed: int = 0,
) -> ChosenStack:
    """Return the stack of parts, at trial knobs and in pipeline order, that each pay on top of the parts before them.

    A part pays if scores and perplexity on the split "search" stay within the margins of the verdict, and the model is
    either faster by the practical margin (log-mean of prefill and decode), or smaller and not slower by that margin.
    The lower end of the interval decides, over more than six rounds if it is wide; undecided parts are left out. If
    none pays, the stack is empty. `effort` (default quick) limits the items asked and the prompt length; at preview
    there are six rounds only.
    """
    effort = effort or settings.read("quick", loaded.scale)
    sample_BT = text_windows(loaded, "search", 4, 128, seed)
    prompt_BT = text_windows(loaded, "search", 1, min(WINDOW_TOKENS, effort.prompt_tokens), seed)
    quality = search_quality.prepare(loaded, effort, seed)
    wanted = [composing.trial(stem) for stem in composing.applicable(loaded.model)[0]]
    stack: list[RecipeStep] = []
    current = loaded.model
    arranged, left_out = composing.orderable(wanted, loaded.model)
    rows: list[dict[str, Any]] = [
        {"step": stem, "state": "refused", "kept": False, "why": why} for stem, why in left_out.items()
    ]
    for step in arranged:
        options: dict[str, Any] = {"random_weights": loaded.random_weights, "seed": seed}
        tried = attempts.attempt(current, calibration, [step], sample_BT, **options)
        row: dict[str, Any] = {"step": step.optimization, "state": tried.state, "kept": False}
        row["why"] = tried.reason or ""
        rows.append(row)
        if tried.state != "works" or tried.model is None:
            continue
        lost = quality.of(tried.model, perplexity_margin)
        smaller = 1 - cost_model.weights_bytes(tried.model) / cost_model.weights_bytes(current)
        row |= {"most lost of a score": lost.lost, "perplexity grows": lost.perplexity, "bytes less": smaller}
        if beyond := lost.why_not(perplexity_margin=perplexity_margin):
            row["why"] = beyond
            continue
        faster = _faster(current, tried.model, prompt_BT, ROUNDS if effort.preview else MOST_ROUNDS, seed)
        row |= {"log-speed": faster.value, "at least": _finite(faster.low)}
        if faster.low > SPEED_MARGIN or (smaller > SIZE_MARGIN and faster.low > -SPEED_MARGIN):
            row["kept"], current = True, tried.model
            stack.append(step)
        else:
            row["why"] = "not surely faster, nor surely smaller at the same speed"
    rule = f"the default rule: within the margins (perplexity {100 * perplexity_margin:g} %), and faster or smaller"
    return ChosenStack(stack, rule if stack else f"{rule}; nothing pays", rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _faster(before: nn.Module, after: nn.Module, prompt_BT: torch.Tensor, most: int, seed: int) -> Estimate:
    """Return the log-speed of `after` against `before`, the mean of prefill and decode, with its interval.

    Times six rounds, and six more until the interval is no wider than the practical margin to either side, `most`
    rounds are done, or MOST_SECONDS have passed. The interval's position never ends the rounds: one of three looks
    would be lucky. If each six rounds use fresh copies, the difference between copies is drawn anew for each.
    """
    arms, weights = {interactions.BASELINE: before, "after": after}, {"after": 1, interactions.BASELINE: -1}
    gains: list[float] = []
    copied: list[bool] = []
    start = time.perf_counter()
    while True:
        timed = interactions.time_arms(arms, prompt_BT, ROUNDS, seed + len(gains))
        gains += np.mean([-rounds.contrast(weights) for rounds in timed.values()], axis=0).tolist()
        copied.append(all(rounds.copied for rounds in timed.values()))
        sigma = np.mean([interactions.process_sigma(name, weights.values()) for name in timed])
        # Number of six-round groups per draw of copies; all groups without copies share one draw.
        draws = [1] * copied.count(True) + [copied.count(False)]
        shrinkage = math.sqrt(sum(groups**2 for groups in draws)) / len(copied)
        gain = shapley.over_rounds(gains, float(sigma) * shrinkage)
        narrow = gain.high - gain.low <= 2 * SPEED_MARGIN
        if narrow or len(gains) >= most or time.perf_counter() - start > MOST_SECONDS:
            return gain


def apply_stack(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], steps: Sequence[RecipeStep], *, seed: int = 0
) -> AppliedStack:
    """Apply the steps to a copy, in the order given, and return it with the seconds and joules spent.

    Waits for pending work of the device at both ends.
    """
    counter = energy.counter(next(model.parameters()).device.type)
    synchronize = workloads.barrier(model)
    if synchronize:
        synchronize()
    start, before = time.perf_counter(), counter.joules()
    composed = composing.compose(model, calibration, steps, arrange=False, seed=seed)
    if synchronize:
        synchronize()
    joules = counter.joules() - before
    seconds = time.perf_counter() - start
    return AppliedStack(
        composed.model, composed.steps, seconds, joules, cast(Provenance, counter.provenance), counter.scope
    )
