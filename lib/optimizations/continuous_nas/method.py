"""Continuous architecture search: each block's attention and feed-forward part is replaced by a cheaper one, or kept.

Puzzle's steps (Bercovich et al. 2024): a library of replacements per block; each scored once by the divergence that it
alone causes; costs measured on this device; a mixed-integer programme picks one per place under budgets of time and
memory. Then the best choices are judged whole, and refined with Optuna around them.

Continuous: every evaluation lies in a study that survives a kill. When the workload drifts, the costs are measured
again; what was learnt of quality stays; the programme is solved anew, and the winner is swapped into the live model.
Nothing is loaded again: the library's modules stay in memory, so a swap back is exact.

A choice maps each slot ("03.attention", "03.feed_forward") to an option. Knows nothing of how a final arm is judged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.roofline import cost_model
from lib.models.calibration.activations import Observation
from lib.models.structure.anatomy import anatomy
from lib.models.structure.anatomy import attention as view_attention
from lib.optimizations.common import pareto
from lib.optimizations.common.study import Study
from lib.optimizations.continuous_nas import mip, subblock_costs
from lib.optimizations.continuous_nas import replacement_library as libraries
from lib.optimizations.continuous_nas.mip import Budget, Table
from lib.optimizations.continuous_nas.replacement_library import WHOLE, Choice, Library, locate, swap
from lib.optimizations.continuous_nas.scoring import Probe, divergence
from lib.optimizations.continuous_nas.subblock_costs import BlockTimes
from lib.optimizations.structured_pruning import method as pruning

LEVELS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # budgets of the front, as shares of the whole; those within reach
REFERENCE = (1.0, 1.0)  # of hypervolumes: the whole model's cost, and one nat per token

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


@dataclass(frozen=True)
class Workload:
    """What one request asks of the model: so many sequences, each read and then answered. `limit`: what is scarce."""

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    limit: str


WORKLOADS = {
    one.name: one
    for one in (
        Workload("prefill_heavy", 512, 8, 1, "time"),
        Workload("decode_heavy", 64, 128, 1, "time"),
        Workload("memory_limited", 256, 32, 8, "memory"),
    )
}


def applies_to(model: nn.Module) -> str | None:
    """Return None: every decoder has blocks to choose for."""
    return None


def build(model: nn.Module, seen: Observation, options: Mapping[str, Sequence[str]] | None = None) -> Library:
    """Return the library of `model`, cut by what `seen` saw pass through it; see
    `lib.optimizations.continuous_nas.replacement_library.build`.
    """
    blocks = anatomy(model).blocks
    return libraries.build(model, [pruning.saliency_scores(*pair) for pair in zip(blocks, seen.blocks)], options)


# --- what a choice costs ---------------------------------------------------------------------------------------------


def time_table(times: BlockTimes, workload: Workload) -> Table:
    """Return the seconds of one request: the prompt once, then every new token."""
    values = {
        slot: {name: seconds + workload.new_tokens * times.decode[slot][name] for name, seconds in options.items()}
        for slot, options in times.prefill.items()
    }
    return Table("time", values, times.prefill_rest + workload.new_tokens * times.decode_rest, "s")


def memory_table(model: nn.Module, library: Library, workload: Workload) -> Table:
    """Return the bytes of weights and cache while a request is answered."""
    element = next(model.parameters()).element_size()
    tokens = workload.batch * (workload.prompt_tokens + workload.new_tokens)
    values: dict[str, dict[str, float]] = {}
    for slot, options in library.modules.items():
        values[slot] = {}
        for name, module in options.items():
            cached = view_attention(module).cache_elements_per_token if slot.endswith(".attention") else 0
            held = sum(cost_model.tensor_bytes(tensor) for tensor in [*module.parameters(), *module.buffers()])
            values[slot][name] = float(held + cached * tokens * element)
    whole = sum(options[WHOLE] for options in values.values())
    cache = tokens * cost_model.kv_cache_bytes_per_token(model)
    return Table("memory", values, cost_model.weights_bytes(model) + cache - whole, "bytes")


@dataclass(frozen=True)
class Costs:
    """Of one workload: its tables of time and memory, and the whole model's sums."""

    workload: Workload
    time: Table
    memory: Table
    whole: Choice

    @property
    def scarce(self) -> Table:
        """The table that the front is about."""
        return self.time if self.workload.limit == "time" else self.memory

    def share(self, choice: Choice, table: Table | None = None) -> float:
        """Return the cost of a choice as a share of the whole model's, by default of what is scarce."""
        table = table or self.scarce
        return table.of(choice) / table.of(self.whole)

    def budgets(self, time_share: float = 1.0, memory_share: float = 1.0) -> list[Budget]:
        """Return budgets as shares of the whole model's costs."""
        shares = ((self.time, time_share), (self.memory, memory_share))
        return [Budget(table, share * table.of(self.whole)) for table, share in shares]


def measure_costs(
    model: nn.Module, library: Library, workload: Workload, prompt_BP: torch.Tensor, *, rounds: int = 7, seed: int = 0
) -> dict:
    """Return the seconds of every replacement for this workload, as plain JSON for a study."""
    prompt_BP = prompt_BP[:, : workload.prompt_tokens].repeat(workload.batch, 1)
    modules = {slot: dict(options) for slot, options in library.modules.items()}
    return subblock_costs.measure(model, modules, locate, prompt_BP, rounds=rounds, seed=seed).__dict__


def costs(model: nn.Module, library: Library, workload: Workload, times: Mapping[str, object]) -> Costs:
    """Return both tables of a workload from stored seconds."""
    tables = time_table(BlockTimes(**times), workload), memory_table(model, library, workload)
    return Costs(workload, *tables, library.whole)


# --- the search ------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The search was told to stop after so many evaluations; what it had found is stored."""


@dataclass(frozen=True)
class Evaluation:
    """A choice as it was judged: nats per token from the whole model, and in which phase of the search."""

    choice: Choice
    divergence: float
    phase: str


@dataclass
class Search:
    """One search over a library. `study` keeps it (None: in memory only).

    `known` are divergences computed so far: controls share them, so that what is counted twice is computed once.
    """

    library: Library
    probe: Probe
    study: Study | None = None
    seed: int = 0
    stop_after: int | None = None
    known: dict[tuple, float] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)

    def __post_init__(self) -> None:
        for trial in self.study.trials if self.study else ():
            choice = {slot: trial.params[slot] for slot in self.library.modules}
            self.evaluations.append(Evaluation(choice, trial.values[0], trial.user_attrs["phase"]))
            self.known[_key(choice)] = trial.values[0]

    def afresh(self, seed: int | None = None) -> "Search":
        """Return a search of the same library that has found nothing yet and stores nothing."""
        return Search(self.library, self.probe, None, self.seed if seed is None else seed, None, self.known)

    def seen(self, choice: Choice) -> bool:
        """Whether this search has evaluated the choice."""
        return any(one.choice == choice for one in self.evaluations)

    def evaluate(self, choice: Choice, phase: str) -> float:
        """Return the divergence of a choice, really swapped in, and store it. Raises Stopped."""
        if self.stop_after is not None and len(self.evaluations) >= self.stop_after:
            raise Stopped
        if _key(choice) not in self.known:
            changed = [locate(slot)[0] for slot, option in choice.items() if option != WHOLE]
            model = swap(self.library, choice)
            self.known[_key(choice)] = divergence(model, self.probe, min(changed, default=0))
            swap(self.library, self.library.whole)
        found = self.known[_key(choice)]
        if self.study:
            self.study.add(choice, _distributions(self.library.space), [found], {"phase": phase})
        self.evaluations.append(Evaluation(choice, found, phase))
        return found

    def points(self, costs: Costs) -> list[tuple[float, float]]:
        """Return (share of the whole model's cost, divergence) of every evaluation, in order."""
        return [(costs.share(one.choice), one.divergence) for one in self.evaluations]

    def curve(self, costs: Costs) -> list[float]:
        """Return the hypervolume after each evaluation, of share of cost times nats per token within REFERENCE."""
        return pareto.progress(self.points(costs), REFERENCE).tolist()


def _key(choice: Choice) -> tuple:
    return tuple(sorted(choice.items()))


def _distributions(space: Mapping[str, Sequence[str]]) -> dict:
    return {slot: optuna.distributions.CategoricalDistribution(options) for slot, options in space.items()}


def score(search: Search) -> dict[str, dict[str, float]]:
    """Return what each replacement costs alone, in nats per token: one evaluation each, those missing are made."""
    scores = {slot: {WHOLE: 0.0} for slot in search.library.modules}
    stored = {_key(one.choice): one.divergence for one in search.evaluations if one.phase == "library"}
    for slot, options in search.library.space.items():
        for option in options:
            choice = search.library.whole | {slot: option}
            if option != WHOLE and _key(choice) not in stored:
                stored[_key(choice)] = search.evaluate(choice, "library")
            if option != WHOLE:
                scores[slot][option] = stored[_key(choice)]
    return scores


def candidates(
    scores: Mapping[str, Mapping[str, float]], costs: Costs, time_share: float, memory_share: float, count: int = 10
) -> list[Choice]:
    """Return the programme's `count` best: within the budgets, and one at each level of the front that is in reach.

    Raises UserError where no choice meets the budgets, with the nearest in reach.
    """
    budgets = costs.budgets(time_share, memory_share)
    levels = []
    for level in LEVELS:
        limit = Budget(costs.scarce, level * costs.scarce.of(costs.whole))
        try:
            levels += mip.solve(scores, [limit])
        except UserError:
            break  # lower ones are out of reach as well
    levels = levels[: count - 1]
    found = mip.solve(scores, budgets, count=count)
    rest = [one for one in found if one not in levels]
    return [one for one in levels if one not in rest][: count - 1] + rest[: max(1, count - len(levels))]


def check(search: Search, choices: Sequence[Choice], phase: str) -> None:
    """Evaluate the choices that this search has not evaluated yet."""
    for choice in choices:
        if not search.seen(choice):
            search.evaluate(choice, phase)


def refine(search: Search, costs: Costs, phase: str, count: int) -> None:
    """Evaluate `count` choices around the best ones, proposed by Optuna's tree of Parzen estimators.

    Each proposal follows from the seed and the evaluations before it alone: stopped and begun again, it is the same.
    """
    done = sum(one.phase == phase for one in search.evaluations)
    space = search.library.space
    for _ in range(done, count):
        search.evaluate(_proposal(search, costs, space), phase)


def _proposal(search: Search, costs: Costs, space: Mapping[str, Sequence[str]]) -> Choice:
    """Return a choice that was not evaluated yet: Optuna's, or, where it repeats itself, a neighbour of the front."""
    memory = optuna.create_study(directions=["minimize", "minimize"])
    distributions = _distributions(space)
    memory.add_trials(
        optuna.trial.create_trial(params=one.choice, distributions=distributions, values=point)
        for one, point in zip(search.evaluations, search.points(costs))
    )
    number = len(search.evaluations)
    for attempt in range(3):
        memory.sampler = optuna.samplers.TPESampler(
            seed=search.seed * 1_000_003 + number * 17 + attempt, multivariate=True, n_startup_trials=1
        )
        choice = dict(memory.ask(distributions).params)
        if not search.seen(choice):
            return choice
    draw = np.random.default_rng((search.seed, number))
    while search.seen(choice):
        slot = sorted(space)[draw.integers(len(space))]
        choice = choice | {slot: space[slot][draw.integers(len(space[slot]))]}
    return choice


def best(search: Search, costs: Costs, time_share: float = 1.0, memory_share: float = 1.0) -> Evaluation:
    """Return the evaluated choice of least divergence within the budgets. Raises UserError where there is none."""
    budgets = costs.budgets(time_share, memory_share)
    within = [
        one
        for one in search.evaluations
        if all(budget.table.of(one.choice) <= budget.most * (1 + mip.SLACK) for budget in budgets)
    ]
    if not within:
        raise UserError("continuous_nas: nothing that was evaluated is within the budgets")
    return min(within, key=lambda one: (one.divergence, _key(one.choice)))


def run(
    search: Search, costs: Costs, *, time_share: float, memory_share: float, refinements: int, count: int = 10
) -> Evaluation:
    """Score the library, solve the programme, check its best, refine around them; return the best within the budgets.

    Goes on where the search's study ended. Raises Stopped, and UserError for budgets that no choice meets.
    """
    name = costs.workload.name
    scores = score(search)
    check(search, candidates(scores, costs, time_share, memory_share, count), f"{name}: check")
    refine(search, costs, f"{name}: refine", refinements)
    return best(search, costs, time_share, memory_share)


# --- drift -----------------------------------------------------------------------------------------------------------


def around(points: Sequence[tuple[float, float]], share: float, count: int = 5) -> list[int]:
    """Return at most `count` indices of points (time, divergence) that none beats in both, nearest in time first."""
    return sorted(pareto.front(points), key=lambda index: abs(points[index][0] - share))[:count]


def bracketing(gains: Mapping[int, float]) -> list[int]:
    """Return the rivals nearest in speed: of those that are not faster, and of those that are; one where a side is
    empty. `gains`: index → measured speed of what is judged ÷ that of the rival.
    """
    slower, faster = ([at for at in gains if (gains[at] >= 1) == side] for side in (True, False))
    return [min(side, key=lambda at: abs(math.log(gains[at]))) for side in (slower, faster) if side]


def at_equal_speed(gains: Sequence[float], divergences: Sequence[float]) -> float:
    """Return the divergence of rivals at the speed of what is judged: on the line between the two in logarithms of
    speed and divergence; beyond both, or of one rival alone, the nearer one's.
    """
    order = np.argsort(gains)
    logs = np.log(gains)[order], np.log(divergences)[order]
    return float(np.exp(np.interp(0.0, *logs)))


@dataclass(frozen=True)
class Adaptation:
    """How a search followed a drift: hypervolume after each new evaluation, warm and begun again from nothing.

    `warm[0]` is what was known before any new evaluation. Hypervolumes are of the new workload's costs.
    """

    costs: Costs
    found: Evaluation
    warm: list[float]
    cold: list[float]

    def evaluations_until(self, share: float) -> int | None:
        """Return how many new evaluations the warm search took to `share` of the cold one's final hypervolume."""
        reached = pareto.evaluations_until(self.warm, share * self.cold[-1])
        return None if reached is None else reached - 1


def adapt(
    search: Search, costs: Costs, *, time_share: float, memory_share: float, refinements: int, count: int = 10
) -> Adaptation:
    """Go on under the costs of a new workload, and compare with a search that begins again from nothing.

    What is known of divergences stays true, so only costs are new. Raises what `run` raises.
    """
    options = {"time_share": time_share, "memory_share": memory_share, "refinements": refinements, "count": count}
    found = run(search, costs, **options)
    phases = [one.phase.startswith(f"{costs.workload.name}:") for one in search.evaluations]
    before = phases.index(True) if any(phases) else len(phases)
    after = len(phases) - phases[::-1].index(True) if any(phases) else len(phases)
    warm = pareto.progress(search.points(costs)[:after], REFERENCE)
    cold = search.afresh()
    run(cold, costs, **options)
    return Adaptation(costs, found, warm[max(before - 1, 0) :].tolist(), cold.curve(costs))
