"""The last round of the search: the best configurations are timed again and evaluated on enough items, and a fixed rule
picks one.

Being the fastest of many in a few timings is partly luck. So finalists are timed again, in rounds with the baseline and
a copy of it, and compared by the upper end of their interval. Of those that these rounds do not distinguish from the
best, the least changed one is picked, or a repeated search would pick another. All text and items are separate from
those of the final verdict.
"""

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from lib.errors import NotApplicable
from lib.measure.metrics import paired_stats
from lib.measure.metrics.catalogue import PERPLEXITY_MARGIN, SPEED_MARGIN
from lib.measure.metrics.digits import percent
from lib.measure.timing import disturbance, interleaved, workloads
from lib.measure.timing.control import fresh_copies
from lib.measure.timing.interleaved import Rounds
from lib.optimizations.automl_components.method import nothing, promote
from lib.optimizations.automl_components.successive_filtering import Bench, JudgedStack
from lib.optimizations.common.evidence import interactions, shapley
from lib.optimizations.common.evidence.shapley import Estimate
from lib.optimizations.common.search import choice
from lib.optimizations.common.search.search_quality import NOTHING_LOST, QualityLoss, SearchQuality

WHERE = "automl_components"
ROUNDS, FEWEST_ROUNDS = 8, 6  # at least, for timing the finalists; at effort preview the fewest with an interval
SECONDS = 20.0  # for all rounds at effort standard; short calls get more rounds


@dataclass(frozen=True)
class Finalist:
    """An outcome that was timed again and evaluated on tasks.

    `time` is ln(its time ÷ the baseline's), `rounds` the same for each round, `floor` the noise floor from a copy of
    the baseline, `divergence` nats per token on more text, `lost` the loss in quality.
    """

    outcome: JudgedStack
    time: Estimate
    floor: float
    divergence: float
    lost: QualityLoss
    rounds: tuple[float, ...] = ()

    @property
    def at_most(self) -> float:
        """The upper end of the interval of its share of the baseline's time."""
        return math.exp(self.time.high)

    @property
    def saves(self) -> bool:
        """Whether it surely takes less time, by more than the practical margin and the noise floor."""
        return self.at_most < self.limit

    @property
    def limit(self) -> float:
        """The share of the baseline's time below which the interval must lie to count as saving."""
        return math.exp(-max(SPEED_MARGIN, self.floor))

    def as_good_as(self, best: "Finalist") -> bool:
        """Return whether it takes less time than the baseline and, in the same rounds, is not surely slower than `best`
        by more than the practical margin.
        """
        if not self.outcome.stack or len(self.rounds) != len(best.rounds) or not self.rounds:
            return False
        behind = shapley.over_rounds(np.asarray(self.rounds) - np.asarray(best.rounds))
        return self.time.value < -max(SPEED_MARGIN, self.floor) and behind.low <= SPEED_MARGIN

    @property
    def order(self) -> tuple[int, float, str]:
        """The sort key that settles near-ties without timing: fewest steps, fewest bytes, then by name."""
        named = json.dumps([step.model_dump() for step in self.outcome.stack], sort_keys=True)
        return len(self.outcome.stack), self.outcome.memory_share or 1.0, named


def judge(
    bench: Bench,
    outcomes: Sequence[JudgedStack],
    count: int,
    quality: SearchQuality,
    seed: int,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> list[Finalist]:
    """Return the `count` best, timed again for about `seconds` in at least `rounds` and evaluated.

    The empty stack comes first if the budget allows it. The interval of a time includes the spread between processes.
    """
    best = promote(bench, outcomes, count)
    stacks = {str(at): bench.apply(judged.stack) for at, (judged, _) in enumerate(best)}
    timed = _timed(bench, stacks, seed, seconds, rounds)
    gc.collect()  # a copy with a method bound to itself, such as one that reads in chunks, is a reference cycle
    floor = paired_stats.noise_floor(timed.contrast({"copy": 1, "baseline": -1}))
    finalists, between_processes = [], interactions.process_sigma("generate", (1, -1))
    if bench.memory_budget >= 1:
        itself = Estimate(0.0, 0.0, 0.0, len(timed.orders))
        finalists.append(Finalist(nothing(bench), itself, floor, 0.0, NOTHING_LOST))
    for at, (judged, divergence) in enumerate(best):
        each = timed.contrast({str(at): 1, "baseline": -1})
        time, lost = shapley.over_rounds(each, between_processes), quality.of(stacks[str(at)])
        finalists.append(Finalist(judged, time, floor, divergence, lost, tuple(float(value) for value in each)))
    return finalists


def _timed(bench: Bench, stacks: Mapping[str, nn.Module], seed: int, seconds: float, rounds: int) -> Rounds:
    """Return timed rounds of the stacks, the baseline and a copy of it.

    Small models are all copied first, since a stack built earlier in the search would be slower for its age alone
    (`interactions.of_one_age`).
    """
    copies = fresh_copies({"baseline": bench.model, "copy": bench.model}, seed)
    models = {**{name: model for name, (model, _) in copies.items()}, **stacks}
    arms, _ = interactions.of_one_age(models, bench.prompt_BT[:1, : interactions.DECODE_PROMPT], seed)
    works = {name: workloads.generate(model, bench.prompt_BT, bench.new_tokens) for name, model in arms.items()}
    interleaved.warm_up(*works.values())
    count, calls = interleaved.rounds_for(works, seconds, rounds)
    return interleaved.rounds(works, count, iterations=calls, warmup=0, seed=seed, disturbance=disturbance.watch)


def choose(
    finalists: Sequence[Finalist],
    margin: float,
    perplexity_margin: float = PERPLEXITY_MARGIN,
    *,
    memory_budget: float = 1.0,
    smallest: float | None = None,
) -> Finalist:
    """Return the finalist that surely saves most time within the margins, or the least changed of those that are as
    good (`Finalist.as_good_as`). The rule is fixed. The empty stack must be among the finalists: it is chosen if
    nothing surely saves time.

    Raises NotApplicable if no finalist is within the margins, naming the nearest, or if none meets the memory budget;
    `smallest` is the smallest memory share of any configuration.
    """
    if not finalists:
        tried = f"; the smallest that was tried takes {smallest:.3g}" if smallest is not None else ""
        raise NotApplicable(
            f"{WHERE}: no configuration meets the memory budget of {memory_budget:g} of the baseline's{tried}; raise "
            "memory_budget, or search longer with more trials"
        )
    fit = [finalist for finalist in finalists if finalist.lost.within(margin, perplexity_margin)]
    if not fit:
        nearest = min((finalist.lost for finalist in finalists), key=_how_far)
        raise NotApplicable(
            f"{WHERE}: within the memory budget of {memory_budget:g} no stack loses at most {margin:.3g} of any score "
            f"and {percent(perplexity_margin, 1)} of perplexity; for the nearest "
            f"stack {nearest.why_not(margin, perplexity_margin)}"
        )
    saving = [finalist for finalist in fit if finalist.outcome.stack and finalist.saves]
    idle = [finalist for finalist in fit if not finalist.outcome.stack]
    best = choice.steady(saving or idle or fit, lambda finalist: finalist.at_most, lambda finalist: finalist.order)
    return min([best, *(other for other in fit if other.as_good_as(best))], key=lambda finalist: finalist.order)


def _how_far(lost: QualityLoss) -> tuple[bool, float, float]:
    return lost.lost is None, lost.lost or 0.0, lost.bound


def table(finalists: Sequence[Finalist], margin: float) -> pd.DataFrame:
    """Return a row per finalist: its stack, time with its interval, and loss in quality."""
    rows = []
    for finalist in finalists:
        time, lost = finalist.time, finalist.lost
        row: dict[str, Any] = {"stack": " → ".join(step.optimization for step in finalist.outcome.stack) or "nothing"}
        row |= {"time": math.exp(time.value), "low": math.exp(time.low), "high": math.exp(time.high)}
        row |= {"surely faster below": finalist.limit, "surely faster": finalist.saves}
        row |= {"most lost of a score": lost.lost, "perplexity grows": lost.perplexity}
        rows.append(row | {"beyond a margin": lost.why_not(margin) or "no"})
    return pd.DataFrame(rows)
