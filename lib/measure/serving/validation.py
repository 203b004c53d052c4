"""Validates the simulation against the real server, and adds its error to simulated numbers.

The same traces are served by the real model and in simulation. Simulated numbers carry the relative error of the means
over the traces, at least that of goodput, which is the simulated quantity that is judged. The error widens intervals in
quadrature; if it exceeds a tenth, nothing simulated is judged. Knows nothing about policies.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lib.measure.metrics import decision, measurement, paired_stats
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import slo
from lib.measure.serving.protocol import Served
from lib.measure.serving.slo import Objectives

GOODPUT = "goodput share"
COMPARED = (GOODPUT, "latency p50", "latency p95", "time per output token", "output tokens/s")
MOST_ERROR = 0.10  # above this, nothing simulated is judged
WHAT = "the simulation's error against the real server"

Row = dict[str, Any]


class SimulationError(NamedTuple):
    """The relative error of simulated numbers (None: unknown), and the quantity and policy (`of`) that determine it."""

    share: float | None
    of: str = ""

    @property
    def forbids(self) -> str | None:
        """Why nothing simulated is judged; None if simulated numbers are judged."""
        if self.share is None:
            return f"{WHAT} is unknown"
        if self.share > MOST_ERROR:
            return f"{WHAT} is {percent(self.share, 1)} ({self.of}), the limit {percent(MOST_ERROR)}"
        return None

    def widened(self, middle: float, low: float, high: float) -> tuple[float, float]:
        """Return the ends of an interval of a logarithm around `middle`, with the error added in quadrature (unchanged
        if it is unknown).
        """
        error = self.share or 0.0
        return (
            middle - math.hypot(max(0.0, middle - low), error),
            middle + math.hypot(max(0.0, high - middle), error),
        )


def compare(
    simulated: Mapping[str, Sequence[Sequence[Served]]], real: Mapping[str, Sequence[Served]], objective: Objectives
) -> list[Row]:
    """Return a row per policy and compared quantity: the real value (mean over the traces), the simulated value (mean,
    least and most over the jitters, each a mean over the traces), and the relative error of the simulated mean (1 if
    only the real value is 0). Both serve the same requests, so a value that only one of them lacks is infinite there:
    an error of 1.

    `real[policy]` has a run per trace; `simulated[policy]` has, for each jitter, a run per trace. If least and most are
    far apart, the quantity depends on single requests, and the replays say little about it either.
    """
    rows = []
    for policy, replays in real.items():
        for name in COMPARED:
            truth = _mean(replays, name, objective)
            values = [_mean(runs, name, objective) for runs in simulated[policy]]
            known = [value for value in values if value is not None]
            row: Row = {"policy": policy, "quantity": name, "real": truth, "error": None}
            row |= dict.fromkeys(("simulated", "least", "most"))
            if known and len(known) == len(values):
                row |= {"simulated": float(np.mean(known)), "least": min(known), "most": max(known)}
                row["error"] = _relative(row["simulated"], truth)
            elif truth is not None and values:
                row["error"] = 1.0
            rows.append(row)
    return rows


def _relative(simulated: float, truth: float | None) -> float | None:
    if truth == simulated == 0:
        return None
    return abs(simulated - truth) / truth if truth else 1.0


def _mean(runs: Sequence[Served], name: str, objective: Objectives) -> float | None:
    """Return the mean of the quantity `name` over the runs; None if a run lacks it."""
    values = [slo.summary(run, objective)[name] for run in runs]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def simulation_error(rows: Sequence[Row], source: str) -> Measurement:
    """Return the simulation's mean relative error for the first and the last policy in `rows` (see `compare`)."""
    source = f"{source}; mean error of {', '.join(COMPARED)}"
    names = list(dict.fromkeys(row["policy"] for row in rows))
    arms = [[row["error"] for row in rows if row["policy"] == name] for name in (names[0], names[-1])] if names else []
    known = [[error for error in arm if error is not None] for arm in arms]
    if not known or not all(known):
        return measurement.unavailable("simulation_error", "serve, real model", "nothing to compare", source)
    first, last = (float(np.mean(arm)) for arm in known)
    return measurement.informative("simulation_error", "serve, real model", first, last, source)


def error_of(simulation: Measurement, rows: Sequence[Row] = ()) -> SimulationError:
    """Return the error of simulated goodput: the largest of both arms' mean errors and of goodput's own errors in the
    `rows` of `compare`, so that quantities that are easy to simulate cannot hide these. Unknown without a measurement.
    """
    if simulation.baseline is None or simulation.optimized is None:
        return SimulationError(None)
    names = list(dict.fromkeys(row["policy"] for row in rows)) or ["baseline", "optimized"]
    means = ((simulation.baseline, names[0]), (simulation.optimized, names[-1]))
    errors = [SimulationError(mean, f"mean of all quantities, {name}") for mean, name in means]
    errors += [
        SimulationError(row["error"], f"{GOODPUT}, {row['policy']}")
        for row in rows
        if row["quantity"] == GOODPUT and row["error"] is not None
    ]
    return max(errors, key=lambda error: error.share or 0.0)


def with_error(simulated: Measurement, error: SimulationError) -> Measurement:
    """Return a simulated measurement that includes the `error` of the simulation.

    The half-widths of its interval (natural logarithm) and the error add in quadrature, and the verdict follows from
    the wider interval. If the error is unknown or exceeds MOST_ERROR, it is not judged, and the reason says so.
    """
    if simulated.ratio is None or simulated.verdict in ("unavailable", "invalid"):
        return simulated
    wider = _widened(simulated, error)
    carried = simulated.model_copy(update={"ci": wider}) if error.share is not None else simulated
    if error.forbids:
        return measurement.unjudged(carried, f"not judged: {error.forbids}")
    if wider is None or simulated.margin is None or simulated.noise_floor is None:
        return carried
    low, high = (math.log(end) for end in wider)
    rule: dict[str, Any] = {"floor": simulated.noise_floor, "margin": simulated.margin}
    ruling = decision.decide(
        math.log(simulated.ratio),
        low,
        high,
        n=simulated.n or 0,
        higher_is_better=simulated.higher_is_better,
        **rule,
    )
    half = (high - low) / 2
    return carried.model_copy(
        update={
            "verdict": ruling.verdict,
            "reason": ruling.reason,
            "source": f"{simulated.source}; interval includes {WHAT}, {percent(error.share or 0.0, 1)} ({error.of})",
            "mde": decision.detectable(half, half / paired_stats.NORMAL, **rule),
        }
    )


def _widened(simulated: Measurement, error: SimulationError) -> tuple[float, float] | None:
    if simulated.ci is None or simulated.ratio is None or simulated.ci[0] <= 0:
        return None
    low, high = error.widened(math.log(simulated.ratio), *(math.log(end) for end in simulated.ci))
    return math.exp(low), math.exp(high)
