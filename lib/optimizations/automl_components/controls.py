"""Controls of the search over configurations: random configurations for the same seconds, and a small grid with every
cell judged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.metrics.digits import percent
from lib.optimizations.automl_components.method import (
    INNER,
    PROPOSALS,
    Component,
    counts_steps,
    rounded,
    space,
    stack_of,
)
from lib.optimizations.automl_components.successive_filtering import (
    REFERENCE,
    Bench,
    JudgedStack,
    surely_faster,
    utility,
)
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import pareto

OPTIMUM_SHARE = 0.95  # to be reached with a quarter of a grid's evaluations
VOLUME_MARGIN = 0.05  # of a hypervolume: timing the same stacks again changes it by this much
SCATTER = "no gain in time among these is sure, so the areas may be timing noise"
AS_GOOD = f"at most {percent(VOLUME_MARGIN)} more is as good"


def at_random(
    bench: Bench, parts: Sequence[Component], seconds: float, seed: int, first: Sequence[JudgedStack] = ()
) -> list[JudgedStack]:
    """Return outcomes of configurations for `seconds` of judging: `first`, the start of the search, then at least one
    random configuration.
    """
    draw = np.random.default_rng(seed)
    every = space(parts)
    judged = list(first)
    while len(judged) == len(first) or sum(outcome.seconds for outcome in judged) < seconds:
        params = {name: drawn(distribution, draw) for name, distribution in every.items()}
        judged.append(bench.judge(stack_of(params, parts)))
    return judged


def drawn(distribution: BaseDistribution, draw: np.random.Generator) -> object:
    """Return a value of the distribution, drawn uniformly."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[draw.integers(len(distribution.choices))]
    if isinstance(distribution, IntDistribution):
        return int(draw.integers(distribution.low, distribution.high + 1))
    assert isinstance(distribution, FloatDistribution)
    return float(draw.uniform(distribution.low, distribution.high))


def grid(outcomes: Sequence[JudgedStack], parts: Sequence[Component], levels: int) -> list[list[list[RecipeStep]]]:
    """Return stacks [levels][levels] of two components: level 0 leaves one out, the others spread its strength.

    The two components are those whose defaults alone dominate most; ties go to one that was not cut (a component that
    does not apply is cut at once), then to the faster to judge. The strength of a component is its first float knob.
    Training steps are at their minimum, since every cell is built. Raises UserError for fewer than two such components.
    """
    alone = {judged.stack[0].optimization: judged for judged in reversed(outcomes) if len(judged.stack) == 1}
    worth = {stem: (-utility(judged), judged.reason is not None, judged.seconds) for stem, judged in alone.items()}
    strong = [part for part in parts if any(knob["type"] == "float" for knob in part.knobs.values())]
    pair = sorted(strong, key=lambda part: worth.get(part.stem, (0.0, True, math.inf)))[:2]

    def step(part: Component, level: int) -> list[RecipeStep]:
        if not level:
            return []
        name, knob = next((name, knob) for name, knob in part.knobs.items() if knob["type"] == "float")
        share = (level - 1) / max(1, levels - 2)
        if "levels" in knob:
            value = knob["levels"][round(share * (len(knob["levels"]) - 1))]
        else:
            low, high = knob["range"]
            value = low + (INNER[0] + share * (INNER[1] - INNER[0])) * (high - low)
        least = {knob: about["range"][0] for knob, about in part.knobs.items() if counts_steps(about)}
        return [RecipeStep(optimization=part.stem, knobs=part.defaults | least | {name: rounded(value)})]

    if len(pair) < 2:
        raise UserError("automl_components: the grid needs two components with a float knob")
    return [[step(pair[0], row) + step(pair[1], column) for column in range(levels)] for row in range(levels)]


def regret(utilities: np.ndarray, evaluations: int, seed: int) -> list[float]:
    """Return the best utility ÷ the optimum after each of `evaluations` by Optuna on a judged grid [L, L].

    It starts with the middle and one random cell, and skips cells already evaluated, as the search does.
    """
    study = optuna.create_study(direction="maximize")
    middle = utilities.shape[0] // 2
    study.enqueue_trial({"first": middle, "second": middle})
    limits: dict[str, BaseDistribution] = {
        name: IntDistribution(0, size - 1) for name, size in zip(("first", "second"), utilities.shape)
    }
    values: list[float] = []
    evaluated: set[tuple[int, int]] = set()
    for number in range(evaluations):
        for attempt in range(PROPOSALS):
            draw = seed * 1009 + number + 7919 * attempt
            study.sampler = optuna.samplers.TPESampler(seed=draw, multivariate=True, n_startup_trials=2)
            trial = study.ask(limits)
            cell = trial.params["first"], trial.params["second"]
            if cell not in evaluated or attempt == PROPOSALS - 1:
                break
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        evaluated.add(cell)
        values.append(float(utilities[cell]))
        study.tell(trial, values[-1])
    return (np.maximum.accumulate(values) / utilities.max()).tolist()


def by_chance(areas_LL: np.ndarray, evaluations: int, draws: int = 200) -> float:
    """Return the mean share of the optimum reached by `evaluations` cells: the middle, where `regret` starts too, and
    others drawn at random.
    """
    middle = areas_LL.shape[0] // 2
    first = middle * areas_LL.shape[1] + middle
    others = np.delete(areas_LL.flatten(), first)
    drawn = [np.random.default_rng(n).permutation(others)[: evaluations - 1] for n in range(draws)]
    reached = [max([areas_LL[middle, middle], *cells]) for cells in drawn]
    return float(np.mean(reached) / max(areas_LL.max(), 1e-9))


def seconds(outcomes: Sequence[JudgedStack]) -> float:
    """Return the total seconds of judging."""
    return sum(judged.seconds for judged in outcomes)


@dataclass(frozen=True)
class EqualSeconds:
    """Outcomes of the search, of random arms with the same first trials and the same seconds, and of the defaults among
    these trials.
    """

    arms: dict[str, list[JudgedStack]]

    @property
    def volumes(self) -> dict[str, float]:
        """Hypervolume of each arm within REFERENCE."""
        points = {arm: [judged.point for judged in outcomes] for arm, outcomes in self.arms.items()}
        return {arm: pareto.hypervolume(judged, REFERENCE) for arm, judged in points.items()}

    @property
    def random_volumes(self) -> list[float]:
        """Hypervolumes of the random arms."""
        return pareto.of_random(self.volumes)

    @property
    def gain(self) -> float | None:
        """Hypervolume of the search ÷ the mean of the random arms; None if these dominate nothing."""
        return pareto.gain(self.volumes)

    @property
    def unsure(self) -> bool:
        """Whether the search dominates an area, but no stack that does is surely faster than the baseline."""
        return bool(self.volumes["search"]) and surely_faster(self.arms["search"]) is False

    @property
    def _each(self) -> list[tuple[str, JudgedStack]]:
        """Every outcome once, with the first arm that holds it: the arms share the first trials."""
        first: dict[int, tuple[str, JudgedStack]] = {}
        for arm, outcomes in self.arms.items():
            for judged in outcomes:
                first.setdefault(id(judged), (arm, judged))
        return list(first.values())

    @property
    def crashed(self) -> int:
        """The number of configurations that raised an error other than UserError."""
        return sum((judged.reason or "").startswith("crashed: ") for _, judged in self._each)

    def table(self) -> pd.DataFrame:
        """Return a row per arm: configurations judged and cut, seconds, hypervolume."""
        lines = []
        for arm, outcomes in self.arms.items():
            line = {"arm": arm, "configurations": len(outcomes), "cut": sum(bool(j.reason) for j in outcomes)}
            lines.append(line | {"seconds": seconds(outcomes), "hypervolume": self.volumes[arm]})
        return pd.DataFrame(lines)

    def points(self) -> pd.DataFrame:
        """Return time (x, percent of the baseline) and divergence (y) of every timed configuration once; no row if all
        were refused or cut.
        """
        points = [
            {"x": 100 * judged.point[0], "y": judged.point[1], "arm": arm}
            for arm, judged in self._each
            if judged.reason is None and judged.stack and arm != "defaults"
        ]
        return pd.DataFrame(points, columns=["x", "y", "arm"])

    def impact(self) -> list[dict]:
        """Return hypervolume (value) by number of configurations judged (strength), per arm."""
        return [
            {"arm": arm, "strength": n, "value": pareto.hypervolume([j.point for j in outcomes[:n]], REFERENCE)}
            for arm, outcomes in self.arms.items()
            if arm != "defaults"
            for n in range(1, len(outcomes) + 1)
        ]

    def controls(self) -> list[ThirdArm]:
        """Return each arm except the search, with its hypervolume as the baseline of the search's."""
        volumes, rows = self.volumes, []
        for arm in [arm for arm in self.arms if arm != "search"]:
            source = f"time and KL on search text, reference {REFERENCE}, baseline: {arm}"
            values = (volumes[arm], volumes["search"], source)
            volume = measurement.informative("front_hypervolume", "search", *values)
            rows.append(ThirdArm(arm, "same start, equal seconds" if "random" in arm else "no search", [volume]))
        return rows

    def reading(self) -> str:
        """Return two sentences on the configurations: how many were timed, and the area each arm's front dominates."""
        own, timed = self.volumes["search"], len(self.points())
        others = ", ".join(f"{volume:.4g}" for volume in self.random_volumes)
        defaults = f"the defaults {self.volumes['defaults']:.4g}"
        first = f"{timed} configurations were timed, and those of the search dominate {own:.4g} of time × divergence"
        if self.unsure:
            return f"{first}, random ones {others}, {defaults}. {SCATTER[:1].upper()}{SCATTER[1:]}."
        return f"{first}. Random ones from the same start in the same seconds dominate {others}, {defaults}."

    def described(self) -> str:
        """Return the alternative text of a figure of `points`."""
        start = f"{len(self.points())} configurations; the search dominates "
        if self.gain is None:
            return f"{start}{self.volumes['search']:.4g}, random configurations dominate nothing."
        return f"{start}{self.gain:.2f} times the area of random configurations."

    def random_refuted(self) -> tuple[bool | None, str]:
        """Return whether random configurations are as good, and the hypervolumes.

        None if there is only one random arm, if no gain in time is sure, or if the search is better than some random
        arms but not all. Better means more than VOLUME_MARGIN above.
        """
        own, others = self.volumes["search"], self.random_volumes
        evidence = f"hypervolume {own:.4g}, random {', '.join(f'{volume:.4g}' for volume in others)}"
        if len(others) < 2:
            return None, f"{evidence}; one draw has no spread"
        if self.unsure:
            return None, f"{evidence}; {SCATTER}"
        beaten = [own > (1 + VOLUME_MARGIN) * volume for volume in others]
        return (False if all(beaten) else None if any(beaten) else True), f"{evidence}; {AS_GOOD}"

    def defaults_refuted(self) -> tuple[bool | None, str]:
        """Return whether the defaults are as good as the search, which judged them first, and both hypervolumes.

        They are as good if the search is at most VOLUME_MARGIN above. None if no gain in time is sure.
        """
        own, defaults = self.volumes["search"], self.volumes["defaults"]
        evidence = f"hypervolume {own:.4g}, defaults {defaults:.4g}; {AS_GOOD}"
        if self.unsure:
            return None, f"{evidence}; {SCATTER}"
        return own <= (1 + VOLUME_MARGIN) * defaults, evidence


@dataclass(frozen=True)
class SmallGrid:
    """Two components at several levels with every pair judged: dominated areas [L, L], and searches on this grid.

    `pair` names the component of the rows, then that of the columns. `curves`: share of the optimum after each of
    `evaluations`, per seed; empty if no pair dominates anything. `chance`: the mean share reached by as many random
    cells from the same start. `sure`: whether any cell is surely faster than the baseline (None: not known).
    """

    pair: str
    areas_LL: np.ndarray
    evaluations: int
    curves: list[list[float]]
    chance: float
    sure: bool | None = None

    @property
    def reached(self) -> float:
        """The lowest share of the optimum reached by any seed."""
        return min((curve[-1] for curve in self.curves), default=0.0)

    @property
    def axes(self) -> dict[str, Any]:
        """The labels for the figure of `frame`, and its reference line, the share to reach."""
        labels = {"x_label": f"evaluations, of {self.areas_LL.size}", "y_label": "share of the optimum"}
        return labels | {"reference": OPTIMUM_SHARE, "reference_name": f"{percent(OPTIMUM_SHARE)} of the optimum"}

    def frame(self) -> pd.DataFrame:
        """Return the curves for `style.impact`."""
        evaluations = range(1, self.evaluations + 1)
        frames = [
            pd.DataFrame({"strength": evaluations, "value": curve}).assign(arm=f"seed {seed}")
            for seed, curve in enumerate(self.curves)
        ]
        return pd.concat(frames) if frames else pd.DataFrame(columns=["strength", "value", "arm"])

    def reading(self) -> str:
        """Return two sentences on the curves: the shares at their ends, and the share reached by chance."""
        if not self.curves:
            return "No pair of the grid dominates anything. So there is no optimum to find."
        ends = ", ".join(f"{curve[-1]:.2f}" for curve in self.curves)
        return (
            f"After {self.evaluations} of {self.areas_LL.size} evaluations the seeds reach {ends} of the optimum. "
            f"As many cells from the same start, drawn at random, reach {self.chance:.2f} on average."
        )

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether a quarter of the evaluations reaches less than OPTIMUM_SHARE, and the shares.

        None if the seeds disagree, or if no cell is surely faster than the baseline.
        """
        if not self.curves:
            return None, "no pair of the grid dominates anything"
        ends = [curve[-1] for curve in self.curves]
        missed = {end < OPTIMUM_SHARE for end in ends}
        looked = f"share of the optimum after {self.evaluations} of {self.areas_LL.size} cells"
        evidence = f"{looked} {', '.join(f'{end:.2f}' for end in ends)}; by chance {self.chance:.2f}"
        if self.sure is False:
            return None, f"{evidence}; {SCATTER}"
        return (missed.pop() if len(missed) == 1 else None), evidence
