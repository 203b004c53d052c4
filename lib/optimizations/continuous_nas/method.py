"""Continuous architecture search: keep each block's attention and feed-forward part, or replace them by cheaper ones.

Puzzle's steps (Bercovich et al. 2024): build a library of replacements per block, score each once by the divergence it
causes alone, measure costs on this device, and pick one option per slot by a mixed-integer programme under budgets of
time and memory. The best choices are then evaluated as whole models, and refined around them with Optuna. Every
evaluation is stored in a study, so an interrupted search resumes. The library's modules stay in memory, so swapping
back is exact and loads nothing.

An option that makes the model's outputs NaN is left out, with the reason. A whole choice that does so has an infinite
divergence and is never the best.

A choice maps each slot ("03.attention", "03.feed_forward") to an option.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from torch import nn

from lib.errors import NotApplicable
from lib.measure.metrics.settings import Effort
from lib.models.calibration.activations import Observation
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.search import choice as near_ties
from lib.optimizations.common.search import pareto
from lib.optimizations.common.search.study import Study
from lib.optimizations.continuous_nas import mip
from lib.optimizations.continuous_nas import replacement_library as libraries
from lib.optimizations.continuous_nas.costs.request_costs import RequestCosts
from lib.optimizations.continuous_nas.mip import Budget
from lib.optimizations.continuous_nas.replacement_library import WHOLE, Choice, Library, locate, swap
from lib.optimizations.continuous_nas.scoring import Probe, divergence
from lib.optimizations.structured_pruning import method as pruning

LEVELS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # budgets of the front, as shares of the whole; unreachable ones skipped
NEAR = 0.05  # relative: divergences that differ by less are equally good
PREVIEW_REFINEMENTS = 6  # at most, at effort preview
REFERENCE = (1.0, 0.1)  # of hypervolumes: the whole model's cost, and 0.1 nats per token
LIBRARY = "library"  # the phase in which each replacement is scored alone
NO_NUMBER = "used alone, its divergence is not finite"  # why an option is left out

SEARCH_SPACE = {
    "workload": {
        "type": "categorical",
        "choices": ("prefill_heavy", "decode_heavy", "memory_limited"),
        "default": "prefill_heavy",
    },
    "time_budget": {"type": "float", "range": (0.0, 1.0), "default": 0.8, "help": "share of the baseline's time"},
    "memory_budget": {"type": "float", "range": (0.0, 1.0), "default": 1.0, "help": "share of the baseline's bytes"},
    "refinements": {
        "type": "int",
        "range": (0, 1000),
        "default": 16,
        "help": "evaluations around the programme's best",
    },
    "finetune_steps": {"type": "int", "range": (0, 1000), "default": 30, "help": "steps of distillation afterwards"},
}


def applies_to(model: nn.Module) -> str | None:
    """Return None: the search applies to every decoder."""
    return None


def build(
    model: nn.Module,
    observation: Observation,
    options: Mapping[str, Sequence[str]] | None = None,
    ordered: dict[str, nn.Module] | None = None,
) -> Library:
    """Return the library of `model`, cut by the saliency from `observation`; see `replacement_library.build`."""
    return libraries.build(model, saliency(model, observation), options, ordered)


def saliency(model: nn.Module, observation: Observation) -> list[pruning.Scores]:
    """Return the saliency of each block's heads, channels and experts, by which the library cuts them."""
    return [pruning.saliency_scores(*pair) for pair in zip(anatomy(model).blocks, observation.blocks)]


class SearchStopped(Exception):
    """The search reached `stop_after` evaluations; all of them are stored."""


@dataclass(frozen=True)
class ChoiceEvaluation:
    """A choice, its divergence from the whole model in nats per token, and the phase of the search."""

    choice: Choice
    divergence: float
    phase: str


@dataclass(frozen=True)
class SearchLimits:
    """Budgets as shares of the whole model's time and memory, the number of evaluations around the best choices, and
    the number of the programme's choices to evaluate.
    """

    time_share: float
    memory_share: float
    refinements: int
    count: int = 10

    def within(self, effort: Effort) -> "SearchLimits":
        """Return the limits at `effort`: at preview half of the programme's choices, and few refinements."""
        if not effort.preview:
            return self
        return replace(self, refinements=min(self.refinements, PREVIEW_REFINEMENTS), count=self.count // 2)


@dataclass
class Search:
    """One search over a library, stored in `study` (None: in memory only).

    `known` are the divergences computed so far, `solved` the solutions of the programme. Controls share both, so that
    an evaluation counted twice is computed once. `workload`: take over from the study only library scores and
    evaluations under this profile, not those of drifts in an earlier run (None: all); `taken_over` is the seconds these
    took. `left_out`: (slot, option) of options never to choose → the reason, known once the library is scored.
    """

    library: Library
    probe: Probe
    study: Study | None = None
    seed: int = 0
    stop_after: int | None = None
    known: dict[tuple, float] = field(default_factory=dict)
    solved: dict[str, list[Choice]] = field(default_factory=dict)
    evaluations: list[ChoiceEvaluation] = field(default_factory=list)
    workload: str | None = None
    taken_over: float = field(default=0.0, init=False)
    left_out: dict[tuple[str, str], str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for trial in self._stored():
            evaluation = self._evaluation(trial)
            self.known[_key(evaluation.choice)] = evaluation.divergence
            if self.workload is None or _profile(evaluation) in (LIBRARY, self.workload):
                self.evaluations.append(evaluation)
                self.taken_over += trial.user_attrs["seconds"]

    def recall(self, profile: str) -> None:
        """Take over the study's evaluations under `profile`, unless this search already has some."""
        if not any(_profile(evaluation) == profile for evaluation in self.evaluations):
            stored = map(self._evaluation, self._stored())
            self.evaluations += [evaluation for evaluation in stored if _profile(evaluation) == profile]

    def _stored(self) -> list[FrozenTrial]:
        return self.study.trials if self.study else []

    def _evaluation(self, trial: FrozenTrial) -> ChoiceEvaluation:
        choice = {slot: trial.params[slot] for slot in self.library.modules}
        return ChoiceEvaluation(choice, trial.values[0], trial.user_attrs["phase"])

    def afresh(self, seed: int | None = None) -> "Search":
        """Return a new search of the same library, without evaluations and without a study."""
        seed = self.seed if seed is None else seed
        return Search(self.library, self.probe, None, seed, None, self.known, self.solved)

    def evaluated(self, choice: Choice) -> bool:
        """Return whether this search has evaluated `choice`."""
        return any(evaluation.choice == choice for evaluation in self.evaluations)

    @property
    def space(self) -> dict[str, tuple[str, ...]]:
        """The options to choose from: those of the library by slot, except those left out."""
        return {
            slot: tuple(option for option in options if (slot, option) not in self.left_out)
            for slot, options in self.library.space.items()
        }

    def open_to(self, choice: Choice) -> bool:
        """Return whether a choice uses no option that was left out."""
        return self.left_out.keys().isdisjoint(choice.items())

    @property
    def exhausted(self) -> bool:
        """Whether every possible choice has been evaluated."""
        different = {_key(evaluation.choice) for evaluation in self.evaluations if self.open_to(evaluation.choice)}
        return len(different) >= math.prod(len(options) for options in self.space.values())

    def evaluate(self, choice: Choice, phase: str) -> float:
        """Return the divergence of a choice, swapped into the model, and store it with the seconds it took.

        A divergence that is not finite counts as infinite. Raises SearchStopped after `stop_after` evaluations.
        """
        if self.stop_after is not None and len(self.evaluations) >= self.stop_after:
            raise SearchStopped
        start = time.perf_counter()
        if _key(choice) not in self.known:
            changed = [locate(slot)[0] for slot, option in choice.items() if option != WHOLE]
            model = swap(self.library, choice)
            nats = divergence(model, self.probe, min(changed, default=0))
            self.known[_key(choice)] = nats if math.isfinite(nats) else math.inf
            swap(self.library, self.library.whole)
        nats = self.known[_key(choice)]
        if self.study:
            facts = {"phase": phase, "seconds": time.perf_counter() - start}
            self.study.add(choice, _distributions(self.library.space), [nats], facts)
        self.evaluations.append(ChoiceEvaluation(choice, nats, phase))
        return nats

    def points(self, costs: RequestCosts) -> list[tuple[float, float]]:
        """Return (share of the whole model's cost, divergence) for every evaluation, in order."""
        return [(costs.share(e.choice), e.divergence) for e in self.evaluations]

    def curve(self, costs: RequestCosts) -> list[float]:
        """Return the hypervolume (share of cost × nats per token, within REFERENCE) after each evaluation."""
        return pareto.progress(self.points(costs), REFERENCE).tolist()


def _profile(evaluation: ChoiceEvaluation) -> str:
    """Return the profile under which a choice was evaluated, or LIBRARY."""
    return evaluation.phase.partition(":")[0]


def _key(choice: Choice) -> tuple:
    return tuple(sorted(choice.items()))


def _distributions(space: Mapping[str, Sequence[str]]) -> dict:
    return {slot: optuna.distributions.CategoricalDistribution(options) for slot, options in space.items()}


def score(search: Search) -> dict[str, dict[str, float]]:
    """Return the divergence of each replacement alone, in nats per token, with one evaluation each unless stored.

    An option whose divergence is not finite has no score; `search.left_out` holds the reason.
    """
    scores = {slot: {WHOLE: 0.0} for slot in search.library.modules}
    stored = {_key(e.choice): e.divergence for e in search.evaluations if e.phase == LIBRARY}
    for slot, options in search.library.space.items():
        for option in options:
            choice = search.library.whole | {slot: option}
            if option != WHOLE and _key(choice) not in stored:
                stored[_key(choice)] = search.evaluate(choice, LIBRARY)
            if option != WHOLE and math.isfinite(stored[_key(choice)]):
                scores[slot][option] = stored[_key(choice)]
            elif option != WHOLE:
                search.left_out[slot, option] = NO_NUMBER
    return scores


def candidates(
    scores: Mapping[str, Mapping[str, float]],
    costs: RequestCosts,
    time_share: float,
    memory_share: float,
    count: int = 10,
) -> list[Choice]:
    """Return `count` choices of the programme: one per reachable level of the front, and the best within the budgets.

    Raises NotApplicable if no choice meets the budgets, naming the nearest within reach.
    """
    budgets = costs.budgets(time_share, memory_share)
    levels = []
    for level in LEVELS:
        limit = Budget(costs.scarce, level * costs.scarce.of(costs.whole))
        try:
            levels += [choice for choice in mip.solve(scores, [limit]) if choice not in levels]
        except NotApplicable:
            break  # lower ones are out of reach as well
    levels = levels[: count - 1]
    within = mip.solve(scores, budgets, count=count)
    rest = [choice for choice in within if choice not in levels]
    return [choice for choice in levels if choice not in rest][: count - 1] + rest[: max(1, count - len(levels))]


def greedy(scores: Mapping[str, Mapping[str, float]], costs: RequestCosts, count: int) -> list[Choice]:
    """Return at most `count` choices, evenly spread over a greedy path from the whole model: each step makes the
    replacement with the least added divergence per cost saved.
    """
    table, choice, path = costs.scarce.values, dict(costs.whole), []
    while True:
        steps = [
            ((scores[slot][option] - scores[slot][choice[slot]]) / saved, slot, option)
            for slot, options in table.items()
            for option in options
            if option in scores[slot] and (saved := table[slot][choice[slot]] - table[slot][option]) > 0
        ]
        if not steps:
            break
        _, slot, option = min(steps)
        choice = choice | {slot: option}
        path.append(choice)
    places = np.linspace(0, len(path) - 1, min(count, len(path))).round().astype(int) if path else []
    return [path[place] for place in dict.fromkeys(int(place) for place in places)]


def check(search: Search, choices: Sequence[Choice], phase: str) -> None:
    """Evaluate the choices that this search has not evaluated yet."""
    for choice in choices:
        if not search.evaluated(choice):
            search.evaluate(choice, phase)


def refine(search: Search, costs: RequestCosts, phase: str, count: int) -> None:
    """Evaluate `count` choices around the best ones, or all that are left, proposed by Optuna's tree of Parzen
    estimators.

    Each proposal depends only on the seed and the evaluations before it, so a resumed search proposes the same.
    """
    done = sum(evaluation.phase == phase for evaluation in search.evaluations)
    space = search.space
    for _ in range(done, count):
        if search.exhausted:
            break
        search.evaluate(_proposal(search, costs, space), phase)


def _proposal(search: Search, costs: RequestCosts, space: Mapping[str, Sequence[str]]) -> Choice:
    """Return a choice not evaluated yet: Optuna's proposal or, if that repeats itself, a random variation of it."""
    memory = optuna.create_study(directions=["minimize", "minimize"])
    distributions = _distributions(space)
    memory.add_trials(
        optuna.trial.create_trial(params=evaluation.choice, distributions=distributions, values=point)
        for evaluation, point in zip(search.evaluations, search.points(costs))
        if math.isfinite(evaluation.divergence) and search.open_to(evaluation.choice)
    )
    number = len(search.evaluations)
    for attempt in range(3):
        own = (search.seed * 1_000_003 + number * 17 + attempt) % 2**32  # the sampler's limit on seeds
        memory.sampler = optuna.samplers.TPESampler(seed=own, multivariate=True, n_startup_trials=1)
        choice = dict(memory.ask(distributions).params)
        if not search.evaluated(choice):
            return choice
    draw = np.random.default_rng((search.seed, number))
    while search.evaluated(choice):
        slot = sorted(space)[int(draw.integers(len(space)))]
        choice = choice | {slot: space[slot][int(draw.integers(len(space[slot])))]}
    return choice


def best(search: Search, costs: RequestCosts, time_share: float = 1.0, memory_share: float = 1.0) -> ChoiceEvaluation:
    """Return the evaluated choice of lowest divergence within the budgets; near-ties go to the fewest replacements.

    Measured times decide what is within the budgets, so choices of nearly equal divergence would otherwise alternate as
    winners from run to run. Raises NotApplicable if no evaluated choice is within the budgets.
    """
    budgets = costs.budgets(time_share, memory_share)
    within = [
        evaluation
        for evaluation in search.evaluations
        if math.isfinite(evaluation.divergence) and all(budget.held_by(evaluation.choice) for budget in budgets)
    ]
    if not within:
        raise NotApplicable("continuous_nas: no evaluated choice is within the budgets; raise them or evaluate more")
    return near_ties.steady(within, lambda evaluation: evaluation.divergence, _least_replaced, NEAR)


def _least_replaced(evaluation: ChoiceEvaluation) -> tuple:
    return sum(option != WHOLE for option in evaluation.choice.values()), _key(evaluation.choice)


def run(
    search: Search, costs: RequestCosts, *, time_share: float, memory_share: float, refinements: int, count: int = 10
) -> ChoiceEvaluation:
    """Score the library, solve the programme, evaluate its choices, refine around the best; return the best evaluation
    within the budgets.

    Resumes where the search's study ended. Raises SearchStopped, and NotApplicable if no choice meets the budgets.
    """
    name = costs.profile.name
    scores = score(search)
    problem = repr((scores, costs, time_share, memory_share, count))
    if problem not in search.solved:
        search.solved[problem] = candidates(scores, costs, time_share, memory_share, count)
    check(search, search.solved[problem], f"{name}: check")
    refine(search, costs, f"{name}: refine", refinements)
    return best(search, costs, time_share, memory_share)
