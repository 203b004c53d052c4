"""Controls of a search: random choices, and all blocks alike, with as many evaluations as the search had.

Knows nothing of how the search chose.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.models.calibration.activations import Observation
from lib.optimizations.common import pareto
from lib.optimizations.common.claims import ThirdArm
from lib.optimizations.continuous_nas import method, replacement_library, request_costs
from lib.optimizations.continuous_nas.method import Search
from lib.optimizations.continuous_nas.request_costs import RequestCosts

RANDOM_SEEDS = 3


@dataclass(frozen=True)
class EqualEffort:
    """Points (share of the scarce cost, nats per token) of the search and of controls with as many evaluations.

    `uniform` is the search over `uniform_library` that treats all blocks alike, under `uniform_costs`.
    """

    points: dict[str, list[tuple[float, float]]]
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
        return [volume for arm, volume in self.volumes.items() if arm.startswith("random")]

    @property
    def gain(self) -> float:
        """Hypervolume of the search ÷ the mean of the random ones."""
        return self.volumes["search"] / float(np.mean(self.random_volumes))

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
        """Return the hypervolume of each arm but the search, against the search's."""
        volumes, arms = self.volumes, [arm for arm in self.points if arm != "search"]
        return [ThirdArm(arm, "as many evaluations", [self._against(arm, volumes)]) for arm in arms]

    def spending(self) -> Measurement:
        """Return how many evaluations the search took."""
        how, why = "counted, the library's included", "the baseline needs none"
        return measurement.informative("search_evaluations", "search", None, self.evaluations, how, reason=why)

    def _against(self, arm: str, volumes: Mapping[str, float]) -> Measurement:
        source = f"{self.evaluations} evaluations each, baseline: {arm}"
        return measurement.informative("front_hypervolume", "search", volumes[arm], volumes["search"], source)

    def reading(self) -> str:
        """Return two sentences on the fronts."""
        volumes, others = self.volumes, self.random_volumes
        best = "above" if volumes["search"] > volumes["uniform"] else "not above"
        return (
            f"With {self.evaluations} evaluations the search dominates {volumes['search']:.3f}, random choices "
            f"{min(others):.3f} to {max(others):.3f}. All blocks alike dominate {volumes['uniform']:.3f}, so the "
            f"search is {best} the simplest rule."
        )

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether random choices do as well, and the hypervolumes; None where the search lies among them."""
        own, others = self.volumes["search"], self.random_volumes
        evidence = f"hypervolume {own:.3f}, random {min(others):.3f} to {max(others):.3f} ({len(others)} draws)"
        return (False if own > max(others) else True if own < min(others) else None), evidence


def equal_effort(
    model: nn.Module, observation: Observation, search: Search, costs: RequestCosts, prompt_BP: torch.Tensor
) -> EqualEffort:
    """Give random choices (three seeds) and uniform ones as many evaluations as the search had, its library's included.

    Divergences that are known already are not computed again, but counted.
    """
    count, seed = len(search.evaluations), search.seed
    points = {"search": search.points(costs)}
    for turn in range(RANDOM_SEEDS):
        drawn = search.afresh(seed + turn)
        method.check(drawn, replacement_library.random_choices(search.library.space, count, seed + turn), "random")
        points[f"random {turn + 1}"] = drawn.points(costs)
    alike = method.build(model, observation, replacement_library.UNIFORM)
    times = request_costs.measure(model, alike, costs.profile, prompt_BP, rounds=3, seed=seed)
    alike_costs = request_costs.tables(model, alike, costs.profile, times)
    uniform = Search(alike, search.probe)
    method.check(uniform, replacement_library.uniform_choices(alike.space, count), "uniform")
    points["uniform"] = uniform.points(alike_costs)
    return EqualEffort(points, count, uniform, alike_costs)
