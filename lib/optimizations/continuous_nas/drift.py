"""Adapt a search to a drift: for a new request profile costs are measured again and the programme is solved again.

Divergences do not depend on the profile and are kept. Each drift is compared with a search that starts from scratch.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.measure.metrics.digits import percent
from lib.optimizations.common.search import pareto
from lib.optimizations.common.search.study import Study
from lib.optimizations.continuous_nas import method, replacement_library
from lib.optimizations.continuous_nas.costs.request_costs import PROFILES, RequestCosts
from lib.optimizations.continuous_nas.method import ChoiceEvaluation, Search, SearchLimits

MOST = 0.8  # largest budget share of the scarce resource after a drift
LEVEL = 0.95  # share of the cold search's final hypervolume to reach


@dataclass(frozen=True)
class Adaptation:
    """The course of a search after a drift: hypervolume after each new evaluation, resumed (warm) and restarted (cold).

    `warm[0]` is the value before any new evaluation. Hypervolumes use the costs of the new profile.
    """

    costs: RequestCosts
    best: ChoiceEvaluation
    warm: list[float]
    cold: list[float]

    def evaluations_until(self, share: float) -> int | None:
        """Return the number of new evaluations after which the warm search reached `share` of the cold search's final
        hypervolume; None if it never did, or if the cold search dominates nothing.
        """
        if not self.cold[-1]:
            return None
        reached = pareto.evaluations_until(self.warm, share * self.cold[-1])
        return None if reached is None else reached - 1

    def cold_until(self, share: float) -> int | None:
        """Return the number of evaluations after which the cold search reached `share` of its own final hypervolume;
        None if that is zero.
        """
        return pareto.evaluations_until(self.cold, share * self.cold[-1]) if self.cold[-1] else None


def adapt(
    search: Search, costs: RequestCosts, *, time_share: float, memory_share: float, refinements: int, count: int = 10
) -> Adaptation:
    """Resume `search` under the costs of a new profile, including evaluations under it that the study holds, and run a
    second search from scratch for comparison.

    Raises the errors of `method.run`.
    """
    options: dict[str, Any] = {
        "time_share": time_share,
        "memory_share": memory_share,
        "refinements": refinements,
        "count": count,
    }
    search.recall(costs.profile.name)
    best = method.run(search, costs, **options)
    phases = [evaluation.phase.startswith(f"{costs.profile.name}:") for evaluation in search.evaluations]
    before = phases.index(True) if any(phases) else len(phases)
    after = len(phases) - phases[::-1].index(True) if any(phases) else len(phases)
    warm = pareto.progress(search.points(costs)[:after], method.REFERENCE)
    cold = search.afresh()
    method.run(cold, costs, **options)
    return Adaptation(costs, best, warm[max(before - 1, 0) :].tolist(), cold.curve(costs))


@dataclass(frozen=True)
class Drifts:
    """All drifts of a run: the adaptations, and a row per drift with seconds, milliseconds and evaluations."""

    adaptations: list[Adaptation]
    rows: list[dict[str, Any]]

    def curves(self) -> pd.DataFrame:
        """Return hypervolumes for `style.impact`: a row per evaluation, arm "<profile>, warm" or "<profile>, cold"."""
        frames = []
        for followed in self.adaptations:
            for arm, curve in (("warm", followed.warm), ("cold", followed.cold)):
                first = int(arm == "cold")
                points = {"strength": range(first, len(curve) + first), "value": curve}
                frames.append(pd.DataFrame(points).assign(arm=f"{followed.costs.profile.name}, {arm}"))
        return pd.concat(frames)

    def reading(self) -> str:
        """Return two sentences on the curves: where the warm searches start, and what resuming saves."""
        starts = " and ".join(f"{a.warm[0] / a.cold[-1]:.3f}" if a.cold[-1] else "–" for a in self.adaptations)
        names = " and ".join(followed.costs.profile.name for followed in self.adaptations)
        until = [(a.evaluations_until(LEVEL), a.cold_until(LEVEL)) for a in self.adaptations]
        counts = " and ".join(f"{_count(warm)} against {_count(cold)}" for warm, cold in until)
        if not all(a.cold[-1] for a in self.adaptations):
            starts += f" (–: no cheaper choice is within {method.REFERENCE[1]:g} nats per token)"
        return (
            f"The warm searches start at {starts} of the cold searches' final hypervolume. To reach {percent(LEVEL)} "
            f"of it they take {counts} evaluations ({names}), warm against cold."
        )

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether starting again is no slower than resuming, in evaluations up to LEVEL, and the counts.

        None if the drifts disagree, or if a cold search dominates nothing.
        """
        slower: list[bool | None] = []
        counts: list[str] = []
        for followed in self.adaptations:
            warm, cold = followed.evaluations_until(LEVEL), followed.cold_until(LEVEL)
            slower.append(warm is None or (cold is not None and cold <= warm) if followed.cold[-1] else None)
            counts.append(f"{followed.costs.profile.name} {_count(warm)} resumed, {_count(cold)} from nothing")
        evidence = f"evaluations to {percent(LEVEL)} of the final hypervolume: {'; '.join(counts)}"
        if not all(followed.cold[-1] for followed in self.adaptations):
            evidence += f"; no such level exists if no cheaper choice is within {method.REFERENCE[1]:g} nats per token"
        return (slower[0] if len(set(slower)) == 1 else None), evidence


def _count(evaluations: int | None) -> str:
    return "never" if evaluations is None else str(evaluations)


def follow(
    search: Search,
    scores: Mapping[str, Mapping[str, float]],
    costs_of: Callable[[str, Study], RequestCosts],
    workload: str,
    limits: SearchLimits,
) -> Drifts:
    """Drift from `workload` to the two other profiles, one after the other, each with half the refinements.

    The scarce resource keeps the search's budget, but at most MOST, since a budget of 1 leaves nothing to choose. If a
    budget cannot be met (a short request, or a busy machine, spends more time outside of all parts), the nearest one
    that leaves room is used and reported (`RequestCosts.relative`). `costs_of` returns the costs of a profile by name,
    stored in the search's study. The live model is left at the last winner.
    """
    assert search.study is not None, "a search without a study keeps no costs"
    shares = {"time": (min(limits.time_share, MOST), 1.0), "memory": (1.0, min(limits.memory_share, MOST))}
    adaptations: list[Adaptation] = []
    rows: list[dict[str, Any]] = []
    for name in [name for name in PROFILES if name != workload]:
        start = time.perf_counter()
        costs = costs_of(name, search.study)
        measured = time.perf_counter() - start
        wanted = shares[costs.profile.limit]
        time_share, memory_share = (costs.relative(t, s) for t, s in zip((costs.time, costs.memory), wanted))
        start = time.perf_counter()
        method.candidates(scores, costs, time_share, memory_share, count=1)
        solved = time.perf_counter() - start
        followed = adapt(
            search,
            costs,
            time_share=time_share,
            memory_share=memory_share,
            refinements=limits.refinements // 2,
            count=limits.count,
        )
        start = time.perf_counter()
        replacement_library.swap(search.library, followed.best.choice)
        swapped = 1000 * (time.perf_counter() - start)
        adaptations.append(followed)
        row: dict[str, Any] = {
            "workload": name,
            "costs measured, s": measured,
            "solved again, s": solved,
            "swapped in, ms": swapped,
        }
        used = time_share if costs.profile.limit == "time" else memory_share
        row |= {"budget asked": wanted[costs.profile.limit != "time"], "budget within reach": used}
        row |= {"evaluations, warm": followed.evaluations_until(LEVEL), "evaluations, cold": followed.cold_until(LEVEL)}
        rows.append(row | {"share of the scarce": costs.share(followed.best.choice), "KL": followed.best.divergence})
    return Drifts(adaptations, rows)


def assert_exact_swaps(search: Search, model: nn.Module, text: Mapping[str, torch.Tensor]) -> None:
    """Assert that the live model differs from `model` on `text` now, and no longer once all slots are whole again."""
    logits, live = model(**text).logits, search.library.student
    assert not (live(**text).logits == logits).all(), "the swap changed nothing"
    whole = replacement_library.swap(search.library, search.library.whole)
    assert (whole(**text).logits == logits).all(), "swapping back is not exact"
