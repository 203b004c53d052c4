"""Pre- against post-optimization: a model's best stack, chosen and applied.

The stack is the one that a search stored (`lib.optimizations.common.recipe`), or else one chosen here by a fixed rule
on text that never judges. Applying is timed and its joules are read. Composing itself is `modular_components`. Names no
optimization.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.catalogue import SPEED_MARGIN
from lib.measure.metrics.measurement import Provenance
from lib.measure.quality import evaluate
from lib.measure.roofline import cost_model
from lib.measure.trackers import energy
from lib.models.loading import Loaded
from lib.models.tasks.tasks import text_windows
from lib.optimizations.common import interactions, recipe
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import attempts
from lib.optimizations.modular_components import method as composing

NAME = "pre_vs_post_optimization"
MOST_LOSS = 0.1  # nats per token that the default stack may lose on search text
SEARCH_WINDOWS, WINDOW_TOKENS = 8, 256
ROUNDS = 6


@dataclass(frozen=True)
class ChosenStack:
    """A stack in pipeline order, who chose it, and a row per step that was considered (empty for a stored stack)."""

    steps: list[RecipeStep]
    origin: str
    considered: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class AppliedStack:
    """The model behind a stack, and what applying it took; `provenance` and `source` are those of the joules."""

    model: nn.Module = field(repr=False)
    steps: list[RecipeStep]
    seconds: float
    joules: float
    provenance: Provenance
    source: str


def applies_to(model: nn.Module) -> str | None:
    """Return None, or that no optimization applies, so that there is no after."""
    return None if composing.applicable(model)[0] else "no optimization that can be composed applies to this model"


def chosen(
    loaded: Loaded, calibration: Sequence[dict[str, torch.Tensor]], *, most_loss: float = MOST_LOSS, seed: int = 0
) -> ChosenStack:
    """Return the stack that a search stored for this model at this scale, or else the default stack.

    Where the search chose to change nothing there is no after to compare; then it is the default stack too, and
    `origin` says so. Raises UserError for a stored stack that is damaged, belongs to another model, or cannot be
    ordered.
    """
    composing.parts()  # imported before models are tried: what an import leaves may hold the frames that led to it
    stored = recipe.find(loaded.name, loaded.scale)
    if stored is not None and stored.stack:
        origin = f"{stored.chosen_by}, effort {stored.effort or 'not stated'}"
        return ChosenStack(composing.order(stored.stack, loaded.model), origin)
    default = default_stack(loaded, calibration, most_loss=most_loss, seed=seed)
    gc.collect()  # models refer to themselves: those that were tried are given back now, not some time
    if stored is not None:
        return replace(default, origin=f"{stored.chosen_by} chose to change nothing; instead {default.origin}")
    return default


def default_stack(
    loaded: Loaded, calibration: Sequence[dict[str, torch.Tensor]], *, most_loss: float = MOST_LOSS, seed: int = 0
) -> ChosenStack:
    """Return the parts, at their trial knobs and in pipeline order, that each pay on what stands before them.

    A part pays if with it the loss on search text stays within `most_loss` nats of the baseline, and it is either
    faster by the practical margin (mean of prefill and decode, in logarithms), or smaller and not slower by that
    margin. Where none pays, the one that loses least is taken, so that there is something to compare.
    """
    ids_NT = text_windows(loaded, "search", SEARCH_WINDOWS, WINDOW_TOKENS, seed)
    sample_BT, prompt_BT = ids_NT[:4, :128], ids_NT[:1]
    known = None if loaded.random_weights else float(evaluate.read(loaded.model, ids_NT).loss_N.mean())
    wanted = [composing.trial(stem) for stem in composing.applicable(loaded.model)[0]]
    stack: list[RecipeStep] = []
    fallback: tuple[float, list[RecipeStep]] | None = None
    current = loaded.model
    arranged, left_out = composing.orderable(wanted, loaded.model)
    rows: list[dict[str, Any]] = [
        {"step": stem, "state": "refused", "kept": False, "why": why} for stem, why in left_out.items()
    ]
    for step in arranged:
        options: dict[str, Any] = {"random_weights": loaded.random_weights, "seed": seed}
        tried = attempts.attempt(current, calibration, [step], sample_BT, **options)
        row: dict[str, Any] = {
            "step": step.optimization,
            "state": tried.state,
            "kept": False,
            "why": tried.reason or "",
        }
        rows.append(row)
        if tried.state != "works" or tried.model is None:
            continue
        loss = None if known is None else float(evaluate.read(tried.model, ids_NT).loss_N.mean()) - known
        faster = _faster(current, tried.model, prompt_BT, seed)
        smaller = 1 - cost_model.weights_bytes(tried.model) / cost_model.weights_bytes(current)
        row |= {"loss more, nats": loss, "log-speed": faster, "bytes less": smaller}
        within = loss is None or loss <= most_loss
        if fallback is None or (loss or 0) < fallback[0]:
            fallback = (loss or 0, [step]) if not stack else fallback
        if within and (faster > SPEED_MARGIN or (smaller > 0.01 and faster > -SPEED_MARGIN)):
            row["kept"], current = True, tried.model
            stack.append(step)
        else:
            row["why"] = "loses too much" if not within else "neither faster, nor smaller at the same speed"
    if fallback is None:
        raise UserError(f"{NAME}: no part works alone on this model; there is no stack to compare")
    rule = f"the default rule: within {most_loss} nats, and faster or smaller"
    if stack:
        return ChosenStack(stack, rule, rows)
    return ChosenStack(fallback[1], "the part that loses least; none pays by the default rule", rows)


def _faster(before: nn.Module, after: nn.Module, prompt_BT: torch.Tensor, seed: int) -> float:
    """Return the mean over prefill and decode of the median log-speed of `after` against `before`."""
    arms = {interactions.BASELINE: before, "after": after}
    timed = interactions.time_arms(arms, prompt_BT, ROUNDS, seed, control=False)
    weights = {"after": 1, interactions.BASELINE: -1}
    return float(np.mean([-np.median(rounds.contrast(weights)) for rounds in timed.values()]))


def apply_stack(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], steps: Sequence[RecipeStep], *, seed: int = 0
) -> AppliedStack:
    """Apply the steps to a copy and return it with the seconds and the joules that this took."""
    counter = energy.counter(next(model.parameters()).device.type)
    start, before = time.perf_counter(), counter.joules()
    composed = composing.compose(model, calibration, steps, seed=seed)
    joules = counter.joules() - before
    seconds = time.perf_counter() - start
    return AppliedStack(
        composed.model, composed.steps, seconds, joules, cast(Provenance, counter.provenance), counter.scope
    )
