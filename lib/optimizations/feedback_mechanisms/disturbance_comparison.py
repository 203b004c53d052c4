"""Compares settings of a server with two profiles under scripted disturbances, simulated on measured step times.

Rates, objectives and lengths of the scripts follow from the measured times by rules fixed here. Settings are passed in
as functions from a scenario to a new policy; those without a loop are in `rivals`. Profile 0 is the full one, 1 the
fast one. The part shared by all comparisons of policies is in `lib.measure.serving.policy_comparison`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from lib.errors import NotApplicable
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.roofline import cost_model
from lib.measure.serving import policy_comparison, slo, step_timing
from lib.measure.serving.policy_comparison import NEW_JITTER, seed_of
from lib.measure.serving.protocol import MOST_ROWS, Limits, Policy
from lib.measure.serving.slo import Objectives, Single
from lib.measure.serving.step_times import StepTimes, drawn_again
from lib.measure.serving.traffic import Lengths
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.feedback_mechanisms import scenarios
from lib.optimizations.feedback_mechanisms.guarding import net_saving
from lib.optimizations.feedback_mechanisms.guarding.net_saving import NetSaving
from lib.optimizations.feedback_mechanisms.scenarios import SPOTLESS, Losses, Played, Scenario

LENGTHS = Lengths(48, 16)
CONTEXTS = (32, 96, 256)  # context lengths at which steps are timed
KEYS = (
    "missed s", "goodput", "goodput share", "fast share", "shadow s", "settled s", "overshoot", "swing", "reversals",
    "moves", "changes", "rollbacks", "rolled back after s", "broken answers",
)  # fmt: skip
MOST_IN_TIME = "in time at most, full profile"  # share of the requests at a scenario's peak

PolicyFactory = Callable[[Scenario], Policy]
Row = dict[str, object]
Ran = dict[str, float | None]  # the results of one run, by KEYS


@dataclass(frozen=True)
class TwoProfileSetup:
    """What all settings share.

    times: step times of the full and the fast profile. seconds: length of a script. shadow_share: share of the fast
    profile's answers that the full one rereads (a fifth of it after a clean start). net: net saving of the timed
    profile at the usual lengths; if it is refused, there is no fast profile (`alone`). nets: its net saving at the
    lengths of each scenario, by name. bound: of the guard. losses: of answers of the sound and of a broken fast
    profile. kept: cached results of `ran`.
    """

    times: tuple[StepTimes, StepTimes]
    objective: Objectives
    limits: Limits
    seconds: float
    shadow_share: float = 0.0
    net: NetSaving | None = None
    bound: float = 0.1
    losses: Losses = SPOTLESS
    nets: Mapping[str, NetSaving] = field(default_factory=dict, compare=False)
    kept: dict[tuple, Ran] = field(default_factory=dict, compare=False, repr=False)

    @property
    def alone(self) -> bool:
        """Whether there is no fast profile: both have the same times."""
        return self.times[0] is self.times[1]

    @property
    def rate(self) -> float:
        """Requests per second that the full profile can serve within the objective per token."""
        return self.times[0].capacity(LENGTHS, self.objective.token_seconds)[0]

    @property
    def saving(self) -> float:
        """The time per request with the full profile ÷ that with the fast one, at a batch of eight."""
        full, fast = (times.sustained(8, LENGTHS)[0] for times in self.times)
        return full / fast

    def savings(self, scenario: str) -> dict[str, float | None]:
        """Return, for the peak of a scenario, the net saving that a fast profile needs for the server to keep up, the
        net saving measured at these request lengths, and the largest share of requests that the full profile alone can
        keep in time (`net_saving`).
        """
        demands = scenarios.demands(self.times[0], self.objective, LENGTHS)
        if scenario not in demands:
            return {}
        lengths, rate, slowness = demands[scenario]
        peak = self.times[0], lengths, rate, self.objective.token_seconds, slowness
        net = self.nets.get(scenario, self.net)
        saved = {"required net saving": net_saving.required(*peak), "net saving measured": net.middle if net else None}
        return saved | {MOST_IN_TIME: net_saving.most_in_time(*peak)}

    @property
    def samples(self) -> int:
        """The number of timed calls."""
        return sum(times.samples for times in (self.times[:1] if self.alone else self.times))

    def play(self, scenario: Scenario, policy: Policy, jitter: int = 0) -> Played:
        """Serve a scenario in virtual time and return the run.

        Step times and jitter are resampled per seed, the same for all settings.
        """
        seed = seed_of(scenario.trace, jitter)
        times = [drawn_again(each, seed) for each in (self.times[:1] if self.alone else self.times)]
        guarded: dict[str, Any] = {"bound": self.bound, "losses": self.losses}
        return scenarios.play(scenario, policy, times, self.limits, seed, self.shadow_share, **guarded)

    def ran(self, scenario: Scenario, setting: str, make_policy: PolicyFactory, jitter: int = 0) -> Ran:
        """Return the results of a setting on a scenario; each combination is played once and cached."""
        key = scenario.name, scenario.trace.seed, setting, jitter
        if key not in self.kept:
            self.kept[key] = _ran(self, scenario, make_policy(scenario), jitter)
        return self.kept[key]


def prepare(
    loaded: Loaded,
    fast: nn.Module,
    *,
    first_token_factor: float,
    token_factor: float,
    requests: int,
    rounds: int = 3,
    shadow_share: float = 0.0,
    quality_bound: float = 0.1,
    preview: bool = False,
    seed: int = 0,
) -> TwoProfileSetup:
    """Time the steps of both profiles in turn and return the setup that all settings share.

    A third of a script lasts as long as `requests` requests at capacity. A profile not shown to be faster, with the
    guard's rereading charged, is dropped: both profiles then have the same times. At a `preview` the fewest points are
    timed, once. Raises NotApplicable if no request can be served within the objectives.
    """
    text_T = tasks.text_windows(loaded, "final", 4, CONTEXTS[-1], seed).flatten()
    same = fast is loaded.model
    models = (loaded.model,) if same else (loaded.model, fast)
    options: dict[str, Any] = policy_comparison.AT_A_PREVIEW if preview else {}
    times = step_timing.measure_together(models, text_T, CONTEXTS, rounds=rounds, **options)
    full_times, fast_times = times[0], times[-1]
    single = Single.of(full_times, LENGTHS)
    objective = slo.objectives(single, first_token_factor, token_factor)
    rate, _ = full_times.capacity(LENGTHS, objective.token_seconds)
    if not rate:
        raise NotApplicable("feedback_mechanisms: no batch keeps the objective per token; give a larger token_factor")
    limits = Limits(MOST_ROWS, patience_seconds=slo.patience_seconds(objective, single))
    seconds = 3 * requests / rate
    nets = {} if same else _nets(full_times, fast_times, objective, shadow_share)
    net = nets.get("quiet")
    fast_times = full_times if net and net.refused else fast_times
    both = full_times, fast_times
    return TwoProfileSetup(both, objective, limits, seconds, shadow_share, net, quality_bound, nets=nets)


def _nets(full: StepTimes, fast: StepTimes, objective: Objectives, share: float) -> dict[str, NetSaving]:
    """Return scenario → net saving of a profile, at the scenario's request lengths and the batch at which the full
    profile serves most requests within the objective.
    """
    demands = scenarios.demands(full, objective, LENGTHS)
    saved = {}
    for lengths in dict.fromkeys(lengths for lengths, *_ in demands.values()):
        rows = max(1, full.capacity(lengths, objective.token_seconds)[1])
        saved[lengths] = net_saving.measured(full, fast, lengths, share, rows)
    return {name: saved[lengths] for name, (lengths, *_) in demands.items()}


def scripts(setup: TwoProfileSetup, seeds: Sequence[int]) -> list[Scenario]:
    """Return every scenario for every seed."""
    return [
        scenario
        for seed in seeds
        for scenario in scenarios.script(setup.times[0], setup.objective, LENGTHS, setup.seconds, seed)
    ]


def _ran(setup: TwoProfileSetup, scenario: Scenario, policy: Policy, jitter: int) -> Ran:
    played = setup.play(scenario, policy, jitter)
    course = getattr(policy, "course", [])
    limits = [limit for _, limit, _ in course]
    since, until = scenario.thirds[1:3]
    switch = getattr(policy, "switch", None)
    return {
        "missed s": scenarios.seconds_beyond(played.served, setup.objective),
        "goodput": slo.goodput(played.served, setup.objective),
        "goodput share": slo.goodput_share(played.served, setup.objective),
        "fast share": played.share(1),
        "shadow s": played.shadow_seconds,
        "settled s": slo.settling_seconds(played.served, setup.objective, since, until),
        "overshoot": scenarios.overshoot(played.served, setup.objective),
        "swing": scenarios.swing(course, since, until),
        "reversals": float(scenarios.reversals(limits)) if limits else None,
        "moves": float(np.count_nonzero(np.diff(limits))) if limits else None,
        "changes": float(len(switch.course)) if switch else None,
    } | _guarded(scenario, played)


def _guarded(scenario: Scenario, played: Played) -> Ran:
    """Return the guard's results: the number of rollbacks and, if the fast profile breaks, the seconds from then to the
    first rollback, and the share of answers given by the broken profile.
    """
    delays = [second - scenario.broken for second in played.rollbacks if second >= scenario.broken]
    arrivals = [request.arrival for request in scenario.trace.requests]
    broken = sum(index == 1 and arrivals[request] >= scenario.broken for request, index in played.profile_of.items())
    return {
        "rollbacks": float(len(played.rollbacks)),
        "rolled back after s": delays[0] if delays else None,
        "broken answers": broken / max(1, len(played.profile_of)),
    }


def compare(setup: TwoProfileSetup, every: Sequence[Scenario], settings: Mapping[str, PolicyFactory]) -> list[Row]:
    """Return a row per scenario and setting: means over the seeds of that scenario.

    - `missed s`: seconds in which too few of the arriving requests were served in time.
    - `fast share`: share of answers given by the fast profile.
    - `shadow s`: the server's time for rereading answers.
    - `settled s`: median time from the disturbance until requests are served in time for good, counting a seed that
      never settles as infinite (None if half of them never do).
    - `swing`: back-and-forth movement of the limit per decision, late in the disturbance.
    - `rolled back after s`: time from the break of the fast profile to its rollback, over runs with a rollback.
    - `taken back`: share of such runs among those in which the broken profile answered at all.
    - `broken answers`: share of answers given by a broken profile.
    - `required net saving`: speed-up, guard charged, that a profile needs for the server to keep up at the peak.
    - MOST_IN_TIME: the largest share of requests that can be kept in time then without one.
    """
    rows = []
    for name in dict.fromkeys(scenario.name for scenario in every):
        chosen = [scenario for scenario in every if scenario.name == name]
        for setting, make_policy in settings.items():
            runs = [setup.ran(scenario, setting, make_policy) for scenario in chosen]
            row: Row = {"scenario": name, "setting": setting} | dict(policy_comparison.averaged(runs, KEYS))
            row["settled s"] = slo.percentiles([run["settled s"] for run in runs]).get("p50")
            row |= setup.savings(name)
            if chosen[0].broken < chosen[0].trace.seconds:
                broken = [run for run in runs if run["broken answers"]]  # elsewhere there was nothing to roll back
                row["taken back"] = float(np.mean([_taken_back(run) for run in broken])) if broken else None
            rows.append(row | {"never settled": sum(run["settled s"] is None for run in runs), "seeds": len(runs)})
    return rows


def _taken_back(run: Ran) -> bool:
    return run["rolled back after s"] is not None


def totals(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return setting → means over the scenarios, with equal weights."""
    frame = pd.DataFrame(rows)
    keys, means = ("missed s", "goodput share", "fast share", "overshoot"), {}
    for name in dict.fromkeys(frame["setting"]):
        chosen = frame[frame["setting"] == name]
        means[str(name)] = {key: float(np.mean(chosen[key].tolist())) for key in keys}
    return means


def goodput(
    setup: TwoProfileSetup,
    every: Sequence[Scenario],
    baseline: tuple[str, PolicyFactory],
    optimized: tuple[str, PolicyFactory],
    workload: str,
) -> Measurement:
    """Return the simulated goodput of two settings (name, factory) on the seeds of one scenario.

    The noise floor comes from the baseline with other jitter and step times.
    """
    source = f"simulated: {len(every)} seeds, step times resampled for each from {setup.samples} timed calls"

    def goodputs(arm: tuple[str, PolicyFactory], jitter: int) -> list[float]:
        runs = [setup.ran(script, *arm, jitter=NEW_JITTER if jitter else 0) for script in every]
        return [float(run["goodput"] or 0.0) for run in runs]

    return policy_comparison.goodput_of(goodputs, baseline, optimized, workload, source)


def measurements(
    setup: TwoProfileSetup, rows: Sequence[Row], baseline: str, optimized: str, workload: str
) -> list[Measurement]:
    """Return the rows of `compare` for two settings as measurements without verdicts.

    Each is a mean over the scenarios in which both settings have a value, so that both means are of the same scenarios.
    """
    names = {
        "objective_missed_seconds": "missed s",
        "goodput_share": "goodput share",
        "settling_seconds": "settled s",
        "overshoot_share": "overshoot",
        "limit_reversals": "reversals",
    }
    reasons = "no run has such a number", "one arm has no such number"
    results = []
    for metric, key in names.items():
        arms = [[_number(row[key]) for row in rows if row["setting"] == name] for name in (baseline, optimized)]
        pairs = list(zip(*arms))
        both = [pair for pair in pairs if None not in pair]
        arms = [list(arm) for arm in zip(*both)] if both else arms
        count = f"{len(arms[0])} scenario{'' if len(arms[0]) == 1 else 's'}"
        source = f"simulated: mean of {count}, step times from {setup.samples} timed calls"
        if left_out := len(pairs) - len(both):
            source += f"; in {left_out} of {len(pairs)} scenarios a setting has no such number"
        results.append(policy_comparison.mean_measurement(metric, workload, arms, source, reasons))
    return results


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def resources(full: nn.Module, fast: nn.Module, share: float, apply_seconds: float) -> list[Measurement]:
    """Return the resources of two profiles against the full one alone, with `share` of the answers by the fast one."""
    alone, both = (float(cost_model.weights_bytes(model)) for model in (full, nn.ModuleList([full, fast])))
    cache = [float(cost_model.kv_cache_bytes_per_token(model)) for model in (full, fast)]
    mixed = (1 - share) * cache[0] + share * cache[1]
    by = "by formula from the caches' shapes, blend of both profiles"
    return [
        measurement.counted("weights_bytes", "load", alone, both, "full alone; full and fast, shared tensors once"),
        measurement.counted("kv_cache_bytes_per_token", "decode", cache[0], mixed, by),
        measurement.informative("apply_seconds", "calibrate", 0.0, apply_seconds, "perf_counter, once", ratio=None),
    ]
