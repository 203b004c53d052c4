"""Search over every optimization that can be composed: which of them, in which order, with which knobs.

Components are all other optimizations with `apply` and `SEARCH_SPACE`. A configuration switches each on or off, orders
them, and sets their knobs. It is judged by two objectives to minimize, request time and divergence, under a memory
budget. Judging goes in rungs: bytes, then divergence on little text, then time; the best go on to more text, the best
of those to tasks. A configuration that fails a rung costs nothing more. Proposals come from Optuna's tree of Parzen
estimators, after the defaults of each component and stacks that served other models. All trials are kept in a
resumable study.

The rule that picks the final configuration is fixed beforehand: `finalists`.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.catalogue import METRICS
from lib.optimizations.automl_components.successive_filtering import Bench, JudgedStack, unchanged, utility
from lib.optimizations.common import discovery, recipe
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search.study import Study

INNER = (0.05, 0.75)  # searched part of a knob's range, extended to its default: the ends change nothing or all
STEM = "automl_components"
STARTUP = 4  # configurations, including the initial ones, before the sampler uses the trials
PERPLEXITY_MARGIN = METRICS["perplexity"].margin or 0.0
MORE_TEXT = 2  # times the number of finalists: configurations judged on more text
PROPOSALS = 8  # attempts to propose a stack that has not been judged
STEPS = 16  # largest increase above its minimum for an integer knob without levels (training steps)


@dataclass(frozen=True)
class Component:
    """An optimization that can be composed: its stem, its module, and the knobs that the search may set."""

    stem: str
    module: ModuleType
    knobs: Mapping[str, Mapping]
    most_steps: int = STEPS

    @property
    def defaults(self) -> dict[str, Any]:
        """The default knobs, overridden by the `trial` values of `COMPOSES`; training steps are at most `most_steps`
        above their minimum.
        """
        values = {name: knob["default"] for name, knob in self.knobs.items()}
        trial = getattr(self.module, "COMPOSES", {}).get("trial", {})
        values |= {name: value for name, value in trial.items() if name in values}
        most = {name: knob["range"][0] + self.most_steps for name, knob in self.knobs.items() if counts_steps(knob)}
        return {name: min(value, most[name]) if name in most else value for name, value in values.items()}


def counts_steps(knob: Mapping) -> bool:
    """Return whether a knob is an integer without `levels`, such as training steps: a larger value only costs more."""
    return knob["type"] == "int" and "levels" not in knob


def applies_to(model: nn.Module) -> str | None:
    """Return None if any component applies to `model`, else the reason why the search does not."""
    return None if any(part.module.applies_to(model) is None for part in components()) else "no optimization applies"


def components(declared: Mapping[str, Collection[str]] | None = None, most_steps: int = STEPS) -> list[Component]:
    """Return every other optimization that offers `apply` and `SEARCH_SPACE`, sorted by name.

    `declared` maps each stem to the parameters of its template. Other knobs stay at their defaults, so that a template
    can run the chosen configuration; stems not in it are left out. `most_steps` is the largest increase of an integer
    knob without levels above its minimum.
    """
    parts = []
    for stem in discovery.stems():
        if stem == STEM or (declared is not None and stem not in declared):
            continue
        module = discovery.method(stem)
        if callable(getattr(module, "apply", None)) and getattr(module, "SEARCH_SPACE", None):
            knobs = {name: k for name, k in module.SEARCH_SPACE.items() if declared is None or name in declared[stem]}
            parts.append(Component(stem, module, knobs, most_steps))
    return parts


def modules(parts: Sequence[Component]) -> dict[str, ModuleType]:
    """Return the modules of components by stem, for `successive_filtering`."""
    return {part.stem: part.module for part in parts}


def space(parts: Sequence[Component]) -> dict[str, BaseDistribution]:
    """Return the search space: per component a switch, a position in the order, and its knobs.

    Raises UserError for a knob with an empty range, or if there is no component.
    """
    if not parts:
        raise UserError("automl_components: no optimization offers apply and SEARCH_SPACE; there is nothing to search")
    every: dict[str, BaseDistribution] = {}
    for part in parts:
        every[part.stem] = CategoricalDistribution((False, True))
        every[f"{part.stem}.order"] = FloatDistribution(0, 1)
        every |= {f"{part.stem}.{name}": _distribution(part, name, knob) for name, knob in part.knobs.items()}
    return every


def _distribution(part: Component, name: str, knob: Mapping) -> BaseDistribution:
    choices = knob.get("levels", knob.get("choices"))
    if choices is not None:
        if not choices:
            raise UserError(f'{part.stem}: knob "{name}" has no choices; expected at least one in SEARCH_SPACE')
        return CategoricalDistribution(tuple(choices))
    low, high = knob["range"]
    if not low <= high:
        raise UserError(
            f'{part.stem}: knob "{name}" has an empty range ({low}, {high}); expected low <= high in SEARCH_SPACE'
        )
    if knob["type"] == "int":
        return IntDistribution(int(low), int(min(high, low + part.most_steps)))
    inside, default = [low + share * (high - low) for share in INNER], part.defaults[name]
    return FloatDistribution(min(inside[0], default), max(inside[1], default))


def in_words(distribution: BaseDistribution) -> str:
    """Return the possible values of a knob in words: `row or matrix`, `0.05 to 0.75`, `0 to 4, whole`."""
    if isinstance(distribution, CategoricalDistribution):
        *others, last = map(str, distribution.choices)
        return f"{', '.join(others)} or {last}" if others else last
    if isinstance(distribution, IntDistribution):
        return f"{distribution.low} to {distribution.high}, whole"
    assert isinstance(distribution, FloatDistribution), "the space has no other kind"
    return f"{distribution.low:g} to {distribution.high:g}"


def stack_of(params: Mapping[str, Any], parts: Sequence[Component]) -> list[RecipeStep]:
    """Return the steps of a configuration in their order."""
    chosen = sorted((part for part in parts if params[part.stem]), key=lambda part: params[f"{part.stem}.order"])
    return [
        RecipeStep(optimization=part.stem, knobs={name: rounded(params[f"{part.stem}.{name}"]) for name in part.knobs})
        for part in chosen
    ]


def params_of(stack: Sequence[RecipeStep], parts: Sequence[Component]) -> dict[str, Any]:
    """Return the configuration of a stack: the inverse of `stack_of`, with defaults for whatever the stack omits."""
    where = {step.optimization: (at, step.knobs) for at, step in enumerate(stack)}
    params: dict[str, Any] = {}
    every = space(parts)
    for part in parts:
        at, knobs = where.get(part.stem, (0, {}))
        params |= {part.stem: part.stem in where, f"{part.stem}.order": at / max(1, len(stack))}
        for name, value in (part.defaults | dict(knobs)).items():
            distribution = every.get(f"{part.stem}.{name}")
            if isinstance(distribution, (FloatDistribution, IntDistribution)):
                value = min(max(value, distribution.low), distribution.high)
            elif isinstance(distribution, CategoricalDistribution) and "levels" in part.knobs.get(name, {}):
                value = min(distribution.choices, key=lambda level: abs(level - value))
            if distribution is not None:
                params[f"{part.stem}.{name}"] = value
    return params


def rounded(value: Any) -> Any:
    """Return a knob's value as stored and written into commands: floats are rounded to four decimals."""
    return round(value, 4) if isinstance(value, float) else value


def run(
    bench: Bench,
    parts: Sequence[Component],
    study: Study,
    trials: int,
    *,
    seed: int = 0,
    first: Sequence[Sequence[RecipeStep]] = (),
    stop_after: int | None = None,
) -> list[JudgedStack]:
    """Return the outcomes of `trials` configurations, resuming where the study ended.

    The initial ones are `first` (stacks that served other models) and each component's defaults alone; each later
    proposal depends only on the seed and the trials before it. Stops early after `stop_after` trials in all.
    """
    every = space(parts)
    begin = [
        params_of(stack, parts)
        for stack in [*first, *([RecipeStep(optimization=p.stem, knobs=p.defaults)] for p in parts)]
    ]
    most = trials if stop_after is None else min(trials, stop_after)
    while (number := len(study.trials)) < most:
        params = begin[number] if number < len(begin) else _proposal(study, every, parts, seed)
        judged = bench.judge(stack_of(params, parts))
        facts = asdict(judged) | {"stack": [step.model_dump() for step in judged.stack]}
        study.add(params, every, judged.point, {"outcome": json.dumps(facts)})
    return outcomes(study)[:trials]


def _proposal(study: Study, every: Mapping[str, BaseDistribution], parts: Sequence[Component], seed: int) -> dict:
    """Return a configuration whose stack has not been judged yet, if PROPOSALS attempts give one.

    Many configurations are the same stack, since the knobs of a switched-off component change nothing.
    """
    judged = [outcome.stack for outcome in outcomes(study)]
    for attempt in range(PROPOSALS):
        params = study.propose(every, partial(_sampler, seed, attempt))
        if stack_of(params, parts) not in judged:
            break
    return params


def _sampler(seed: int, attempt: int, number: int) -> optuna.samplers.BaseSampler:
    draw = (seed * 1_000_003 + attempt * 7919 + number) % 2**32
    return optuna.samplers.TPESampler(seed=draw, multivariate=True, n_startup_trials=STARTUP)


def outcomes(study: Study) -> list[JudgedStack]:
    """Return the outcomes stored in a study, in order."""
    stored = [json.loads(trial.user_attrs["outcome"]) for trial in study.trials]
    return [JudgedStack(**facts | {"stack": [RecipeStep(**step) for step in facts["stack"]]}) for facts in stored]


def elsewhere(
    stacks: Path, model: str, effort: str, parts: Sequence[Component], most: int = 2
) -> list[list[RecipeStep]]:
    """Return stacks that served other models: the recipes in the folder `stacks` that were not judged to lose.

    Recipes chosen at a lower effort are skipped, or those of an earlier, smaller run would change where a search
    starts. So are unreadable and empty recipes, and stacks with components, knobs or values unknown to `parts`.
    """
    known = {part.stem: part for part in parts}
    served: list[list[RecipeStep]] = []
    for path in sorted(Path(stacks).glob("*.yaml")):
        if path.stem == model:
            continue
        try:
            chosen = recipe.read(path)
        except UserError:  # a faulty file of another model does not stop this search
            continue
        fit = all(step.optimization in known and _fits(step, known[step.optimization]) for step in chosen.stack)
        measured_enough = recipe.EFFORTS.index(chosen.effort) >= recipe.EFFORTS.index(effort)
        if chosen.stack and fit and measured_enough and chosen.accuracy not in recipe.LOSING:
            served.append(chosen.stack)
    return served[:most]


def _fits(step: RecipeStep, part: Component) -> bool:
    """Return whether the knobs of a stored step belong to its component and have values of the right type."""

    def valid(value: Any, knob: Mapping) -> bool:
        if "choices" in knob:
            return value in knob["choices"]
        number = isinstance(value, int) or (isinstance(value, float) and knob["type"] != "int")
        return number and not isinstance(value, bool) and math.isfinite(value)

    return all(name in part.knobs and valid(value, part.knobs[name]) for name, value in step.knobs.items())


def promote(bench: Bench, outcomes: Sequence[JudgedStack], keep: int) -> list[tuple[JudgedStack, float]]:
    """Return the `keep` best outcomes with their divergence on the next rung's text.

    MORE_TEXT times as many are judged on that text. Before and after it the order is the same: first the stacks within
    the perplexity margin, fastest first, then those that dominate most. Repeated stacks count once.
    """
    every = [judged for judged in outcomes if judged.reason is None and judged.stack]
    unique = [judged for at, judged in enumerate(every) if judged.stack not in [other.stack for other in every[:at]]]
    ranked = sorted(unique, key=_rank)
    last = len(bench.texts) - 1
    read = [(judged, bench.divergence(bench.apply(judged.stack), last)) for judged in ranked[: MORE_TEXT * keep]]
    return sorted(read, key=lambda pair: _rank(replace(pair[0], divergence=pair[1])))[:keep]


def _rank(judged: JudgedStack) -> tuple[bool, float]:
    within = judged.point[1] <= math.log(1 + PERPLEXITY_MARGIN)
    return (False, judged.point[0]) if within else (True, -utility(judged))


def nothing(bench: Bench) -> JudgedStack:
    """Return the outcome of the empty stack: the baseline itself, cut if its memory is over budget."""
    return unchanged(bench.memory_budget)


def automation(parts: Sequence[Component], personal: Sequence[str]) -> float:
    """Return the share of decisions made by the search; `personal` names those left to a person."""
    automatic = len(space(parts))
    return automatic / (automatic + len(personal))
