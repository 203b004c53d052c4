"""Replay every policy on the real model: the fixed size (twice), its rivals and the adaptive policy serve the same
traces, taking turns step by step. This tests the simulation's results for the rivals on the machine itself.

It takes several times as long as the headline, which needs only the fixed size and the adaptive policy, so it is done
at effort thorough or if rounds are requested.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from lib.measure.metrics import paired_stats, process_variance
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import policy_comparison, replay, slo
from lib.measure.serving.replaying.rounds import ServingRounds
from lib.measure.serving.slo import Objectives
from lib.measure.serving.traffic import Trace
from lib.optimizations.adaptive_batch_sizes.simulated import SHOWN, TAIL
from lib.optimizations.adaptive_batch_sizes.study import ADAPTIVE, BLIND, TrafficStudy

ROUNDS = {"preview": 0, "quick": 0, "standard": 0, "thorough": 6}  # default by effort
AGAIN = "fixed again"
PURPOSE = "another policy on the same replays of the real model"


@dataclass(frozen=True)
class RivalReplays:
    """The replays of every policy (`rounds`, None if nothing was replayed), and the name of the fixed size's arm."""

    rounds: ServingRounds | None
    objective: Objectives
    fixed: str
    workload: str

    @property
    def policies(self) -> list[str]:
        """The policies that were replayed, the fixed size first, without its repeated replay."""
        return [name for name in self.rounds.runs if name != AGAIN] if self.rounds else []

    @property
    def caption(self) -> str:
        """What was replayed, or how to replay it."""
        if not self.rounds:
            return "The rivals were not replayed; to replay them, use -p rival_rounds=6 or effort thorough."
        requests = sum(len(trace.requests) for trace in self.rounds.traces)
        return f"{requests} requests under every policy; disturbed by: {self.rounds.disturbed}"

    def goodput(self, policy: str) -> float:
        """Return the mean goodput of a policy, requests/s."""
        assert self.rounds is not None, "nothing was replayed"
        return float(np.mean([slo.goodput(run, self.objective) for run in self.rounds.served(policy)]))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per policy: means over its replays, and its goodput ÷ that of the fixed size."""
        rows: list[dict[str, Any]] = []
        for name in self.policies:
            assert self.rounds is not None
            summaries = [slo.summary(run, self.objective) for run in self.rounds.served(name)]
            fixed = self.goodput(self.fixed)
            row: dict[str, Any] = {"policy": name} | policy_comparison.averaged(summaries, SHOWN)
            row[TAIL] = policy_comparison.in_every(summaries, TAIL)
            rows.append(row | {"÷ fixed": self.goodput(name) / fixed if fixed else None})
        return rows

    def table(self) -> pd.DataFrame:
        """Return `rows` as a frame, or a single row that says that nothing was replayed."""
        return pd.DataFrame(self.rows() or [{"policy": "none was replayed"}])

    @property
    def best(self) -> str | None:
        """The rival (or fixed size) with the highest goodput; None if nothing was replayed."""
        rivals = [name for name in self.policies if name not in (ADAPTIVE, BLIND)]
        return max(rivals, key=self.goodput, default=None)

    @property
    def gain(self) -> float | None:
        """Goodput of the adaptive policy ÷ goodput of the best rival; None if the latter is unknown or zero."""
        best = self.goodput(self.best) if self.best else 0.0
        return self.goodput(ADAPTIVE) / best if best else None

    def reaches(self, least: float) -> bool | str:
        """Return whether the adaptive policy serves at least `least` times as much in time as the best rival.

        The interval of the rounds' ratios decides. It is not judged if the machine was disturbed, a replay served
        nothing in time, or too few requests were counted to judge the headline.
        """
        if self.rounds is None or self.best is None:
            return "unknown"
        if self.rounds.busy:
            return f"not judged: {self.rounds.busy[-1]}"
        runs = [self.rounds.served(name) for name in (self.best, ADAPTIVE)]
        counted = float(np.mean([len(run.counted) for run in runs[0]]))
        if counted < replay.LEAST_COUNTED:
            return f"not judged: {counted:.1f} requests counted in a replay, fewer than {replay.LEAST_COUNTED}"
        theirs, ours = ([slo.goodput(run, self.objective) for run in arm] for arm in runs)
        if min(*theirs, *ours) <= 0:
            return "not judged: a replay served no request in time"
        sigma = process_variance.between_processes(self.workload).sigma
        effect = paired_stats.effect(paired_stats.differences(theirs, ours), process_sigma=sigma)
        low, high = math.exp(effect.low), math.exp(effect.high)
        return "cannot tell" if low < least <= high else low >= least

    def controls(self) -> list[tuple[str, str, list[Measurement]]]:
        """Return (name, purpose, measurements) for each rival against the fixed size, on the same replays."""
        return [
            (f"{name}, real model", PURPOSE, [self._against_fixed(name)])
            for name in self.policies
            if name not in (self.fixed, ADAPTIVE)
        ]

    def _against_fixed(self, policy: str) -> Measurement:
        assert self.rounds is not None
        return replay.goodput(self.rounds, self.objective, self.fixed, AGAIN, policy, self.workload)


def rounds_of(effort: str, requested: int) -> int:
    """Return the number of rounds to replay: `requested`, or the default of the effort if that is negative."""
    return ROUNDS[effort] if requested < 0 else requested


def replayed(
    model: nn.Module,
    study: TrafficStudy,
    size: int,
    traces: Sequence[Trace],
    prompt_of: replay.PromptOf,
    *,
    workload: str,
    device: str = "cpu",
    slowness: Callable[[], float] | None = None,
) -> RivalReplays:
    """Replay the traces under every policy, the fixed `size` twice; without a trace nothing is replayed.

    `slowness` as in `replay.in_turn`. Raises RuntimeError if a cache ever outgrows its bound.
    """
    setup, fixed = study.setup, f"fixed {size}"
    if not traces:
        return RivalReplays(None, setup.objective, fixed, workload)
    policies: dict[str, Callable[[], Any]] = study.policies(size)
    arms = policies | {AGAIN: policies[fixed]}
    options: dict[str, Any] = {"batching": setup.batching, "device": device, "seed": study.seeds[0]}
    options |= {"slowness": slowness}
    rounds = replay.in_turn(model, traces, arms, setup.limits, prompt_of, **options)
    rounds = replace(rounds, calibration=setup.times.disturbed)
    return RivalReplays(rounds, setup.objective, fixed, workload)
