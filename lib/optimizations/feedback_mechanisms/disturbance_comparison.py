"""A server with two profiles under scripted disturbances, simulated on measured step times: settings side by side.

Rates, objectives and lengths of the scripts follow from the measured times by rules fixed here. Settings come in as
functions from a scenario to a new policy; those without a loop are in `rivals`. Profile 0 is the full one, 1 the fast
one. What is shared with every comparison of policies is in `lib.measure.serving.policy_comparison`.
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
CONTEXTS = (32, 96, 256)  # columns at which steps are timed
KEYS = (
    "missed s", "goodput", "goodput share", "fast share", "shadow s", "settled s", "overshoot", "swing", "reversals",
    "moves", "changes", "rollbacks", "rolled back after s", "broken answers",
)  # fmt: skip
MOST_IN_TIME = "in time at most, full profile"  # at a scenario's worst, share of the requests

PolicyFactory = Callable[[Scenario], Policy]
Row = dict[str, object]
Ran = dict[str, float | None]  # what one run came to, by KEYS


@dataclass(frozen=True)
class TwoProfileSetup:
    """What all settings share: step times of the full and the fast profile, objectives, limits, seconds of a script,
    the share of the fast profile's answers that the full one reads again (a fifth of it after a clean start). `net`:
    what the profile that was timed saves at the usual lengths; where that refuses it, there is no fast profile
    (`alone`). `nets`: what it saves at the lengths of each scenario, by name. `bound` is the guard's, `losses` are
    those of answers of the fast profile as it is and of a broken one.
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
        """Whether there is no fast profile: the same times stand for both."""
        return self.times[0] is self.times[1]

    @property
    def rate(self) -> float:
        """Requests per second that the full profile can serve within the objective per token."""
        return self.times[0].capacity(LENGTHS, self.objective.token_seconds)[0]

    @property
    def saving(self) -> float:
        """How many times as long a request takes with the full profile as with the fast one, at a batch of eight."""
        full, fast = (times.sustained(8, LENGTHS)[0] for times in self.times)
        return full / fast

    def savings(self, scenario: str) -> dict[str, float | None]:
        """Return the net saving that a scenario requires of a fast profile at its worst, so that the server keeps up,
        the one that was measured at the lengths of its requests then, and the share of them that the full profile alone
        can keep in time at most (`net_saving`).
        """
        demands = scenarios.demands(self.times[0], self.objective, LENGTHS)
        if scenario not in demands:
            return {}
        lengths, rate, slowness = demands[scenario]
        worst = self.times[0], lengths, rate, self.objective.token_seconds, slowness
        net = self.nets.get(scenario, self.net)
        saved = {"required net saving": net_saving.required(*worst), "net saving measured": net.middle if net else None}
        return saved | {MOST_IN_TIME: net_saving.most_in_time(*worst)}

    @property
    def samples(self) -> int:
        """How many calls were timed."""
        return sum(times.samples for times in (self.times[:1] if self.alone else self.times))

    def play(self, scenario: Scenario, policy: Policy, jitter: int = 0) -> Played:
        """Serve a scenario in virtual time. Step times are drawn again for each seed, and so is the jitter: settings
        meet the same ones.
        """
        seed = seed_of(scenario.trace, jitter)
        times = [drawn_again(each, seed) for each in (self.times[:1] if self.alone else self.times)]
        guarded: dict[str, Any] = {"bound": self.bound, "losses": self.losses}
        return scenarios.play(scenario, policy, times, self.limits, seed, self.shadow_share, **guarded)

    def ran(self, scenario: Scenario, setting: str, make_policy: PolicyFactory, jitter: int = 0) -> Ran:
        """Return what a setting came to on a scenario, played once and kept."""
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

    A third of a script lasts as long as `requests` requests at capacity. A profile that is not shown to be faster, the
    guard's reading charged, is none: then the same times stand for both. At a `preview` the fewest points are timed,
    and once. Raises NotApplicable where no request can be served within the objectives.
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
    """Return what a profile saves in each scenario, at the lengths of its requests and the batch at which the full one
    serves most of them within the objective.
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
    """Return what the guard did: rollbacks; where the fast profile breaks, the seconds until the first one after that,
    and the share of the answers that the broken profile gave.
    """
    late = [second - scenario.broken for second in played.rollbacks if second >= scenario.broken]
    arrivals = [request.arrival for request in scenario.trace.requests]
    wrong = sum(index == 1 and arrivals[request] >= scenario.broken for request, index in played.profile_of.items())
    return {
        "rollbacks": float(len(played.rollbacks)),
        "rolled back after s": late[0] if late else None,
        "broken answers": wrong / max(1, len(played.profile_of)),
    }


def compare(setup: TwoProfileSetup, every: Sequence[Scenario], settings: Mapping[str, PolicyFactory]) -> list[Row]:
    """Return a row per scenario and setting: means over the seeds of that scenario.

    `missed s`: seconds in which too few of the requests arriving were served in time; `fast share`: of the answers,
    given by the fast profile; `shadow s`: the server's time for reading answers again; `settled s`: from the
    disturbance until served well for good, the median, in which a seed that never settles takes for ever (None where
    that is half of them); `swing`: how far the limit goes back and forth per decision late in the disturbance; `rolled
    back after s`: from the second at which the fast profile breaks, of those in which it was taken back (`taken back`,
    their share of those in which it answered at all); `broken answers`: share of a broken profile's; `required net
    saving`: how many times as fast a profile must be, guard charged, for the server to keep up at the scenario's worst,
    and MOST_IN_TIME what can be kept in time then without one.
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
                broken = [run for run in runs if run["broken answers"]]  # elsewhere there was nothing to take back
                row["taken back"] = float(np.mean([_taken_back(run) for run in broken])) if broken else None
            rows.append(row | {"never settled": sum(run["settled s"] is None for run in runs), "seeds": len(runs)})
    return rows


def _taken_back(run: Ran) -> bool:
    return run["rolled back after s"] is not None


def totals(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return setting → means over the scenarios, all of equal weight."""
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
    """Return the goodput of two settings (name, factory) on the seeds of one scenario, simulated; floor: the baseline
    with other jitter and step times.
    """
    source = f"simulated: {len(every)} seeds, step times drawn again for each from {setup.samples} timed calls"

    def goodputs(arm: tuple[str, PolicyFactory], jitter: int) -> list[float]:
        runs = [setup.ran(script, *arm, jitter=NEW_JITTER if jitter else 0) for script in every]
        return [float(run["goodput"] or 0.0) for run in runs]

    return policy_comparison.goodput_of(goodputs, baseline, optimized, workload, source)


def measurements(
    setup: TwoProfileSetup, rows: Sequence[Row], baseline: str, optimized: str, workload: str
) -> list[Measurement]:
    """Return the rows of `compare` for two settings as measurements, not judged: means over all scenarios in which both
    have such a number, since a mean over others would be one of other scenarios.
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
    """Return what two profiles take against the full one alone, `share` of the answers by the fast one."""
    alone, both = (float(cost_model.weights_bytes(model)) for model in (full, nn.ModuleList([full, fast])))
    cache = [float(cost_model.kv_cache_bytes_per_token(model)) for model in (full, fast)]
    mixed = (1 - share) * cache[0] + share * cache[1]
    by = "by formula from the caches' shapes, blend of both profiles"
    return [
        measurement.counted("weights_bytes", "load", alone, both, "full alone; full and fast, shared tensors once"),
        measurement.counted("kv_cache_bytes_per_token", "decode", cache[0], mixed, by),
        measurement.informative("apply_seconds", "calibrate", 0.0, apply_seconds, "perf_counter, once", ratio=None),
    ]
