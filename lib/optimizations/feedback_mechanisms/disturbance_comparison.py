"""A server with two profiles under scripted disturbances, simulated on measured step times: settings side by side.

Rates, objectives and lengths of the scripts follow from the measured times by rules fixed here. Settings come in as
functions that make a fresh policy; this module knows but the static ones. Profile 0 is the full one, 1 the fast one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import cost_model
from lib.measure.serving import policy_comparison, slo, step_times
from lib.measure.serving.server import MOST_ROWS, Decision, Limits, Policy, RequestOutcome, ServerStep, View
from lib.measure.serving.slo import Objectives, Single, objectives
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths
from lib.measure.timing import disturbance
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.feedback_mechanisms import scenarios
from lib.optimizations.feedback_mechanisms.scenarios import Played, Scenario

LENGTHS = Lengths(48, 16)
CONTEXTS = (32, 96, 256)  # columns at which steps are timed
NEW_JITTER = 7919  # added to a seed for the same trace with other jitter: the A/A control

Make = Callable[[Scenario], Policy]


@dataclass
class Static:
    """At most `size` rows, with the profile `always`; or, with `span`, the oracle: the fast profile in [span)."""

    size: int
    always: int = 0
    span: tuple[float, float] | None = None
    profile: int = 0

    @property
    def name(self) -> str:
        """What the setting is called in tables."""
        kind = "oracle" if self.span else "static, fast" if self.always == 1 else "static"
        return f"{kind} {self.size}"

    def decide(self, view: View) -> Decision:
        """Admit whoever fits below the size."""
        inside = self.span is not None and self.span[0] <= view.now < self.span[1]
        self.profile = 1 if inside else self.always
        return Decision(max(0, min(self.size - len(view.running), view.room)))

    def observe(self, step: ServerStep, finished: Sequence[RequestOutcome]) -> None:
        """Learn nothing."""


@dataclass(frozen=True)
class ServingSetup:
    """What all settings share: step times of the full and the fast profile, objectives, limits, seconds of a script;
    and what disturbed the machine while the steps were timed (None: nothing noticed).
    """

    times: tuple[StepTimes, StepTimes]
    wanted: Objectives
    limits: Limits
    seconds: float
    disturbed: str | None = None

    @property
    def rate(self) -> float:
        """Requests per second that the full profile can serve within the objective per token."""
        return self.times[0].capacity(LENGTHS, self.wanted.token_seconds)[0]

    @property
    def saving(self) -> float:
        """How many times as long a request takes with the full profile as with the fast one, at a batch of eight."""
        full, fast = (one.sustained(8, LENGTHS)[0] for one in self.times)
        return full / fast

    def play(self, scenario: Scenario, policy: Policy, jitter: int = 0) -> Played:
        """Serve a scenario in virtual time; the jitter follows from the trace's seed, so settings meet the same one."""
        return scenarios.play(scenario, policy, self.times, self.limits, scenario.trace.seed + jitter)


def prepare(
    loaded: Loaded,
    fast: nn.Module,
    *,
    first_token_factor: float,
    token_factor: float,
    requests: int,
    rounds: int = 3,
    seed: int = 0,
) -> ServingSetup:
    """Time the steps of both profiles in turn and return the ground for all settings.

    A third of a script lasts as long as `requests` requests at capacity. Raises UserError where no request can be
    served within the objectives.
    """
    text_T = tasks.text_windows(loaded, "final", 4, CONTEXTS[-1], seed).flatten()
    close = disturbance.watch()
    times = step_times.measure_together((loaded.model, fast), text_T, CONTEXTS, rounds=rounds)
    disturbed, times = close(), tuple(step_times.by_mean(one) for one in times)
    single = Single.of(times[0], LENGTHS)
    wanted = objectives(single, first_token_factor, token_factor)
    rate, _ = times[0].capacity(LENGTHS, wanted.token_seconds)
    if not rate:
        raise UserError("trials: no batch keeps the objective per token; give a larger token_factor")
    patience = max(0.0, wanted.first_token_seconds - single.prefill_seconds)
    return ServingSetup(times, wanted, Limits(MOST_ROWS, patience_seconds=patience), 3 * requests / rate, disturbed)


def scripts(ground: ServingSetup, seeds: Sequence[int]) -> list[Scenario]:
    """Return every scenario for every seed."""
    made = [scenarios.script(ground.times[0], ground.wanted, LENGTHS, ground.seconds, seed) for seed in seeds]
    return [one for several in made for one in several]


def compare(ground: ServingSetup, every: Sequence[Scenario], settings: dict[str, Make]) -> list[dict[str, object]]:
    """Return a row per scenario and setting: means over the seeds of that scenario.

    `missed s`: seconds in which too few of those arriving were served in time; `fast share`: of the answers, given by
    the fast profile; `settled s`: from the disturbance until served well for good, of the seeds that settle.
    """
    rows = []
    for name in dict.fromkeys(one.name for one in every):
        chosen = [one for one in every if one.name == name]
        for setting, fresh in settings.items():
            rows.append({"scenario": name, "setting": setting} | _row(ground, chosen, fresh))
    return rows


def _row(ground: ServingSetup, chosen: Sequence[Scenario], fresh: Make) -> dict[str, object]:
    found = []
    for one in chosen:
        policy = fresh(one)
        run = ground.play(one, policy)
        limits = [limit for _, limit, _ in getattr(policy, "course", [])]
        third = one.trace.seconds / 3
        found.append(
            {
                "missed s": scenarios.seconds_beyond(run.served, ground.wanted),
                "goodput share": slo.goodput_share(run.served, ground.wanted),
                "fast share": run.share(1),
                "settled s": slo.settling_seconds(run.served, ground.wanted, third, 2 * third),
                "overshoot": scenarios.overshoot(run.served, ground.wanted),
                "reversals": float(scenarios.reversals(limits)) if limits else None,
                "changes": float(len(policy.switch.course)) if getattr(policy, "switch", None) else None,
            }
        )
    known = {key: [one[key] for one in found if one[key] is not None] for key in found[0]}
    row: dict[str, object] = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    return row | {"never settled": sum(one["settled s"] is None for one in found), "seeds": len(found)}


def totals(rows: Sequence[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Return setting → means over the scenarios, each weighing the same: missed s, goodput share, fast share."""
    found = {}
    for name in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == name]
        found[name] = {key: float(np.mean([row[key] for row in mine])) for key in ("missed s", "goodput share")}
        found[name]["fast share"] = float(np.mean([row["fast share"] for row in mine]))
        found[name]["overshoot"] = float(np.mean([row["overshoot"] for row in mine]))
    return found


def goodput(
    ground: ServingSetup, every: Sequence[Scenario], baseline: Make, optimized: Make, workload: str = "serve, disturbed"
) -> Measurement:
    """Return the goodput of two settings, script by script, simulated; floor: the baseline with other jitter."""
    arms = [
        [slo.goodput(ground.play(one, fresh(one)).served, ground.wanted) for one in every]
        for fresh in (baseline, optimized)
    ]
    again = [slo.goodput(ground.play(one, baseline(one), NEW_JITTER).served, ground.wanted) for one in every]
    source = f"simulated: {len(every)} scripts, step times from {_samples(ground)} timed calls of this run"
    return policy_comparison.judged_goodput(workload, arms, again, source)


def measurements(
    ground: ServingSetup, rows: Sequence[dict[str, object]], baseline: str, optimized: str
) -> list[Measurement]:
    """Return what `compare` showed of two settings as measurements, over all scenarios, not judged."""
    names = {
        "objective_missed_seconds": "missed s",
        "goodput_share": "goodput share",
        "settling_seconds": "settled s",
        "overshoot_share": "overshoot",
        "limit_reversals": "reversals",
    }
    found = []
    for metric, key in names.items():
        arms = [[row[key] for row in rows if row["setting"] == name] for name in (baseline, optimized)]
        known = [[value for value in arm if value is not None] for arm in arms]
        means = [float(np.mean(arm)) if arm else None for arm in known]
        missing = sum(len(arm) - len(some) for arm, some in zip(arms, known))
        source = f"simulated: mean of {len(arms[0])} scenarios, step times from {_samples(ground)} timed calls"
        source += f"; {missing} of {2 * len(arms[0])} have no such number" if missing else ""
        if means == [None, None]:
            found.append(measurement.unavailable(metric, "serve", "no run has such a number", source))
            continue
        fields = {} if means[0] and means[1] is not None else {"ratio": None}
        fields |= {"reason": "one arm has no such number"} if None in means else {}
        found.append(measurement.informative(metric, "serve", *means, source, "estimated", **fields))
    return found


def resources(full: nn.Module, fast: nn.Module, share: float, apply_seconds: float) -> list[Measurement]:
    """Return what two profiles take against the full one alone, `share` of the answers by the fast one."""
    weights = [float(cost_model.weights_bytes(one)) for one in (full, fast)]
    cache = [float(cost_model.kv_cache_bytes_per_token(one)) for one in (full, fast)]
    mixed = (1 - share) * cache[0] + share * cache[1]
    by = "by formula from the caches' shapes, blend of both profiles"
    return [
        measurement.counted("weights_bytes", "load", weights[0], sum(weights), "full alone; full and fast, as stored"),
        measurement.counted("kv_cache_bytes_per_token", "decode", cache[0], mixed, by),
        measurement.informative("apply_seconds", "calibrate", 0.0, apply_seconds, "perf_counter, once", ratio=None),
    ]


def _samples(ground: ServingSetup) -> int:
    return sum(one.samples for one in ground.times)
