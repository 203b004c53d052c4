"""Modular components: discover the optimizations as parts, and compose them in a working order.

A module of `lib/optimizations` with `apply`, `SEARCH_SPACE` and `COMPOSES` is a part. `COMPOSES` is plain data: the
aspects of a model that the part touches, the traits (`traits.py`) that it needs and those that it invalidates, and the
knobs for a quick trial. Optional keys are `mildest`, the knobs at which it does next to nothing, towards which it can
be weakened, and `at`, different needs and invalidations at certain knobs. A part that changes how weights are stored
may have `saves_bytes`, which predicts whether knobs make a model smaller.

A pipeline puts a part that invalidates a trait after those that need it, refuses steps that cannot be ordered, checks
the real model before every step, and collects calibration statistics again once they are out of date. The caller's
model is never changed; `hot_swap` changes and reverts a live one.
"""

import copy
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lib.errors import UserError, suggest
from lib.models.calibration.activations import Observation, observe
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common import discovery
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import traits

NAME = "modular_components"
KEYS = ("touches", "needs", "invalidates", "trial")
FURTHER = ("mildest", "at")
STORED = ("shapes", "storage")  # a part that touches one of these aspects should make a model smaller


@dataclass(frozen=True)
class Composed:
    """A model after all steps, the ordered steps, and the seconds of each; `observations`: how often statistics were
    collected.
    """

    model: nn.Module = field(repr=False)
    steps: list[RecipeStep]
    seconds: list[float]
    observations: int


def applies_to(model: nn.Module) -> str | None:
    """Return None if at least two parts apply to `model`, else the reason why there is nothing to compose."""
    count = len(applicable(model)[0])
    return None if count > 1 else f"{count} optimization applies to this model; composing needs two"


def parts() -> dict[str, ModuleType]:
    """Return every optimization that can be composed, by its stem, sorted. Raises UserError for a faulty descriptor."""
    modules = {stem: discovery.method(stem) for stem in discovery.stems()}
    composable = {stem: module for stem, module in modules.items() if hasattr(module, "COMPOSES")}
    for stem, module in composable.items():
        check(stem, module)
    return composable


def check(stem: str, module: ModuleType) -> None:
    """Raise UserError, naming the fault, if a module cannot be a part."""
    for name in ("apply", "SEARCH_SPACE", "applies_to"):
        if not hasattr(module, name):
            raise UserError(f"{discovery.source(stem)}: it has COMPOSES, but no {name}; a part needs both")
    described = module.COMPOSES
    if set(described) - set(FURTHER) != set(KEYS):
        key = sorted(set(described) - set(FURTHER) ^ set(KEYS))[0]
        raise UserError(f'{discovery.source(stem)}: COMPOSES: unknown or missing key "{key}"; expected {KEYS}')
    valid = {"touches": traits.ASPECTS, "needs": tuple(traits.TRAITS)}
    knobs = tuple(module.SEARCH_SPACE)
    valid |= {"invalidates": (*traits.TRAITS, traits.STATISTICS), "trial": knobs, "mildest": knobs, "knobs": knobs}
    listed = [(key, names) for key, names in described.items() if key != "at"]
    for special in described.get("at", ()):
        listed += special.items()
    for key, names in listed:
        for name in names:
            if name not in valid[key]:
                hint = suggest(name, valid[key])
                raise UserError(f'{discovery.source(stem)}: COMPOSES, {key}: unknown "{name}".{hint}')


def described(step: RecipeStep) -> Mapping[str, Any]:
    """Return the descriptor of a part at the knobs of `step`."""
    module = module_of(step.optimization)
    knobs = {name: knob.get("default") for name, knob in module.SEARCH_SPACE.items()} | dict(step.knobs)
    for special in module.COMPOSES.get("at", ()):
        if all(knobs.get(name) == value for name, value in special["knobs"].items()):
            return {**module.COMPOSES, **special}
    return module.COMPOSES


def applicable(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Return the stems of the parts that apply to `model`, in pipeline order, and for the others the reason why not."""
    reasons = {stem: module.applies_to(model) for stem, module in parts().items()}
    fitting = [RecipeStep(optimization=stem) for stem, reason in reasons.items() if reason is None]
    ranked = sorted(fitting, key=lambda step: _rank(parts()[step.optimization], step))
    return [step.optimization for step in ranked], {stem: reason for stem, reason in reasons.items() if reason}


def trial(stem: str) -> RecipeStep:
    """Return the step for a quick trial: the part's defaults, overridden by its `trial` knobs."""
    return RecipeStep(optimization=stem, knobs=dict(module_of(stem).COMPOSES["trial"]))


def module_of(stem: str) -> ModuleType:
    """Return the module of a part. Raises UserError, with the nearest stem, if there is none."""
    known = parts()
    if stem not in known:
        hint = suggest(stem, known) or f" Known: {', '.join(known)}."
        raise UserError(f'{NAME}: no optimization "{stem}" that can be composed.{hint}')
    return known[stem]


def saves_bytes(model: nn.Module, step: RecipeStep) -> bool:
    """Return False if a part predicts, before it is applied, that it would make the model no smaller."""
    predicts = getattr(module_of(step.optimization), "saves_bytes", None)
    return predicts is None or predicts(model, **step.knobs)


def _rank(module: ModuleType, step: RecipeStep) -> tuple[int, str]:
    touched = [traits.ASPECTS.index(name) for name in module.COMPOSES["touches"]]
    return min(touched, default=len(traits.ASPECTS)), step.optimization


def conflict(first: RecipeStep, second: RecipeStep, concerning: set[str]) -> str | None:
    """Return a trait among `concerning` that `first` invalidates and `second` needs, or None."""
    invalidated, needed = described(first)["invalidates"], described(second)["needs"]
    return next((name for name in needed if name in invalidated and name in concerning), None)


def order(steps: Sequence[RecipeStep], model: nn.Module) -> list[RecipeStep]:
    """Return the steps in an order in which no step invalidates what a later one needs.

    Among the possible next steps, those that touch shapes come before weights, storage and attention. Raises UserError,
    naming the conflicting steps and traits, if there is no such order.
    """
    concerning, waiting, arranged = traits.concerning(model), list(steps), []
    modules = {step.optimization: module_of(step.optimization) for step in steps}
    while waiting:
        free = [
            step
            for step in waiting
            if not any(conflict(step, rival, concerning) for rival in waiting if rival is not step)
        ]
        if not free:
            raise UserError(_knot(waiting, concerning))
        chosen = min(free, key=lambda step: _rank(modules[step.optimization], step))
        arranged.append(chosen)
        waiting = [step for step in waiting if step is not chosen]
    return arranged


def orderable(steps: Sequence[RecipeStep], model: nn.Module) -> tuple[list[RecipeStep], dict[str, str]]:
    """Return the steps that fit together, in order, and by stem the reason why each of the others was left out.

    Steps are considered in the order of what they touch; a step that no order fits in with those before is left out.
    """
    arranged: list[RecipeStep] = []
    reasons: dict[str, str] = {}
    for step in sorted(steps, key=lambda step: _rank(module_of(step.optimization), step)):
        try:
            arranged = order([*arranged, step], model)
        except UserError as error:
            reasons[step.optimization] = str(error).removeprefix(f"{NAME}: ")
    return arranged, reasons


def _knot(waiting: Sequence[RecipeStep], concerning: set[str]) -> str:
    clashes = []
    for step in waiting:
        rival = next(o for o in waiting if o is not step and conflict(step, o, concerning))
        lost = conflict(step, rival, concerning)
        clashes.append(f"{step.optimization} takes away {lost}, which {rival.optimization} needs")
    return f"{NAME}: these steps cannot be ordered: {'; '.join(dict.fromkeys(clashes))}. Leave one of them out"


def refusal(steps: Sequence[RecipeStep], model: nn.Module) -> str | None:
    """Return why the steps cannot be applied to `model` in the given order, judged by their descriptors, or None."""
    concerning = traits.concerning(model)
    for index, step in enumerate(steps):
        for before in steps[:index]:
            if lost := conflict(before, step, concerning):
                return (
                    f"{step.optimization} needs {lost}, which {before.optimization} takes away; "
                    f"put {step.optimization} first"
                )
    return None


def kept_order(steps: Sequence[RecipeStep], model: nn.Module) -> list[RecipeStep]:
    """Return the steps in the given order, in which a search may have judged them, or in that of `order` if a
    descriptor refuses it. Raises UserError if there is no order, and for an unknown part.
    """
    arranged = order(steps, model)
    return list(steps) if refusal(steps, model) is None else arranged


def compose(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    steps: Iterable[RecipeStep],
    *,
    arrange: bool = True,
    recalibrate: bool = True,
    checked: bool = True,
    observation: Observation | None = None,
    seed: int = 0,
) -> Composed:
    """Return the model after all steps; `model` itself is unchanged. Without steps it is a copy (the identity
    pipeline). Embeddings and head may be shared with `model`: train neither in place.

    arrange: order the steps first instead of using the given order. Statistics of activations are observed once, and
    again after a step that invalidates them; without `recalibrate` the first ones are used to the end. `observation`:
    the statistics of `model` on this text, if known. Without `checked` nothing is refused, to find out whether a
    refusal was right. Raises UserError for a refused order, an unknown part or knob, and the refusal of a part.
    """
    steps = order(list(steps), model) if arrange else list(steps)
    for step in steps:
        _check_knobs(step)
    if checked and (reason := refusal(steps, model)):
        raise UserError(f"{NAME}: {reason}")
    current, seconds, observations = model, [], 0
    for step in steps:
        module, start = module_of(step.optimization), time.perf_counter()
        if checked and (reason := traits.lacking(current, described(step)["needs"]) or module.applies_to(current)):
            raise UserError(f"{NAME}: {step.optimization} cannot be applied here: {reason}")
        options: dict[str, object] = dict(step.knobs)
        accepted = inspect.signature(module.apply).parameters
        if "seed" in accepted:
            options.setdefault("seed", seed)
        if "observation" in accepted:
            if observation is None:
                observation, observations = observe(current, calibration), observations + 1
            options["observation"] = observation
        current = module.apply(current, calibration, **options)
        if recalibrate and traits.STATISTICS in described(step)["invalidates"]:
            observation = None
        seconds.append(time.perf_counter() - start)
    return Composed(_copy(model) if current is model else current, steps, seconds, observations)


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares embeddings and head, as after any pipeline: no part ever copies these."""
    view = anatomy(model)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (view.embeddings.weight, view.head.weight)})


def _check_knobs(step: RecipeStep) -> None:
    known = module_of(step.optimization).SEARCH_SPACE
    for name in step.knobs:
        if name not in known:
            hint = suggest(name, known) or f" Known: {', '.join(known)}."
            raise UserError(f'{NAME}: {step.optimization} has no knob "{name}".{hint}')
