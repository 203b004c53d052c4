"""Controls of a search: random choices, and choices that treat all blocks alike, with as many evaluations as the
search, or as many as there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.models.calibration.activations import Observation
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.common.search import pareto
from lib.optimizations.continuous_nas import method, replacement_library
from lib.optimizations.continuous_nas.costs import request_costs
from lib.optimizations.continuous_nas.costs.request_costs import RequestCosts
from lib.optimizations.continuous_nas.method import Search
from lib.optimizations.continuous_nas.replacement_library import Library

RANDOM_SEEDS, FEWEST_RANDOM_SEEDS = 3, 2  # the fewest at effort quick


@dataclass(frozen=True)
class EqualEffort:
    """Points (share of the scarce cost, nats per token) of the search and its controls: random and uniform choices with
    as many evaluations, or as many as there are.

    "programme" is the search before refinement, "greedy" as many choices by divergence per cost saved; both include the
    `library`'s points, which cost evaluations as well. `uniform` is the search over a finer library that treats all
    blocks alike, under `uniform_costs`.
    """

    points: dict[str, list[tuple[float, float]]]
    library: list[tuple[float, float]]
    evaluations: int
    uniform: Search
    uniform_costs: RequestCosts

    @property
    def volumes(self) -> dict[str, float]:
        """Hypervolume of each arm within `method.REFERENCE`."""
        return {arm: pareto.hypervolume(points, method.REFERENCE) for arm, points in self.points.items()}

    @property
    def random_volumes(self) -> list[float]:
        """Hypervolumes of the random arms."""
        return pareto.of_random(self.volumes)

    @property
    def gain(self) -> float | None:
        """Hypervolume of the search ÷ the mean of the random arms; None if these dominate nothing."""
        return pareto.gain(self.volumes)

    @property
    def credits(self) -> dict[str, float]:
        """Hypervolume after the library, the programme and its refinement, and that of greedy choice."""
        volumes = self.volumes
        return {
            "library": pareto.hypervolume(self.library, method.REFERENCE),
            "programme, before refinement": volumes["programme"],
            "refined": volumes["search"],
            "greedy, KL per cost": volumes["greedy"],
        }

    def fronts(self) -> pd.DataFrame:
        """Return the fronts for `style.impact`: cost in percent of the baseline, nats per token."""
        frames = [
            pd.DataFrame([points[index] for index in pareto.front(points)], columns=["strength", "value"]).assign(
                arm=arm
            )
            for arm, points in self.points.items()
        ]
        fronts = pd.concat(frames)
        fronts = fronts[(fronts.strength <= 1) & fronts.value.between(1e-4, 1)]
        return fronts.assign(strength=100 * fronts.strength)

    def controls(self) -> list[ThirdArm]:
        """Return each arm except the search, with its hypervolume as the baseline of the search's."""
        volumes, arms = self.volumes, [arm for arm in self.points if arm != "search"]
        purposes = {"programme": "before refinement", "greedy": "as many choices as the programme's"}
        fewer = {
            arm: "fewer evaluations: no more were found" for arm in arms if len(self.points[arm]) < self.evaluations
        }
        purposes = dict.fromkeys(arms, "as many evaluations") | fewer | purposes
        return [ThirdArm(arm, purposes[arm], [self._against(arm, volumes)]) for arm in arms]

    def spending(self) -> Measurement:
        """Return the number of evaluations of the search as a measurement."""
        how, why = "counted, the library's included", "the baseline needs none"
        return measurement.informative("search_evaluations", "search", None, self.evaluations, how, reason=why)

    def _against(self, arm: str, volumes: Mapping[str, float]) -> Measurement:
        source = f"{len(self.points[arm])} evaluations, the search {self.evaluations}; baseline: {arm}"
        return measurement.informative("front_hypervolume", "search", volumes[arm], volumes["search"], source)

    def reading(self) -> str:
        """Return two sentences on the fronts, which name simpler rules that dominate more than the search."""
        volumes, others = self.volumes, self.random_volumes
        best = "above" if volumes["search"] > volumes["uniform"] else "not above"
        greedier = ", and below greedy choice" if volumes["greedy"] > volumes["search"] else ""
        return (
            f"With {self.evaluations} evaluations the search dominates {volumes['search']:.4f} (before refinement "
            f"{volumes['programme']:.4f}, greedy choice {volumes['greedy']:.4f}), random choices {min(others):.4f} to "
            f"{max(others):.4f}. All blocks alike dominate {volumes['uniform']:.4f}, so the search is {best} the "
            f"simplest rule{greedier}."
        )

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether random choices do as well, and the hypervolumes; None if the search lies among them."""
        own, others = self.volumes["search"], self.random_volumes
        evidence = f"hypervolume {own:.4f}, random {min(others):.4f} to {max(others):.4f} ({len(others)} draws)"
        return (False if own > max(others) else True if own < min(others) else None), evidence


def equal_effort(
    model: nn.Module,
    observation: Observation,
    search: Search,
    costs: RequestCosts,
    times_of: Callable[[Library, Mapping[str, Sequence[str]]], dict],
    random_seeds: int = RANDOM_SEEDS,
    alike_options: Mapping[str, Sequence[str]] = replacement_library.UNIFORM,
) -> EqualEffort:
    """Evaluate random choices (of several seeds) and uniform ones as often as the search, its library included, or as
    many as there are.

    Divergences already known are counted but not computed again. `times_of` measures the seconds of a library of these
    options under the profile; `alike_options` are the options of the uniform control.
    """
    count, seed = len(search.evaluations), search.seed
    points = {"search": search.points(costs)}
    known = {phase: _points(search, costs, phase) for phase in ("library", "check")}
    points["programme"] = known["library"] + known["check"]
    chosen = search.afresh()
    greedy = method.greedy(method.score(search), costs, len(known["check"]))
    method.check(chosen, greedy, "greedy")
    points["greedy"] = known["library"] + chosen.points(costs)
    for turn in range(random_seeds):
        drawn = search.afresh(seed + turn)
        method.check(drawn, replacement_library.random_choices(search.space, count, seed + turn), "random")
        points[f"random {turn + 1}"] = drawn.points(costs)
    alike = method.build(model, observation, alike_options, search.library.ordered)
    times = times_of(alike, alike_options)
    alike_costs = request_costs.tables(model, alike, costs.profile, times)
    uniform = Search(alike, search.probe)
    method.check(uniform, replacement_library.uniform_choices(alike.space, count), "uniform")
    points["uniform"] = uniform.points(alike_costs)
    return EqualEffort(points, known["library"], count, uniform, alike_costs)


def _points(search: Search, costs: RequestCosts, phase: str) -> list[tuple[float, float]]:
    """Return the points of one phase: "library", or "check", the choices of the programme under this profile."""
    named = phase if phase == "library" else f"{costs.profile.name}: {phase}"
    return [point for point, e in zip(search.points(costs), search.evaluations) if e.phase == named]
