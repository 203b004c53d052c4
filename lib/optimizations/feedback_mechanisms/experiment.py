"""The protocol of the feedback mechanisms: the loops against static settings on scripted disturbances.

Returns plain data (rows, measurements, frames); nothing is displayed and no loop is tuned here. Independent parts have
their own modules: `scenario_table` (all settings on all scripts), `candidates` (for the fast profile), `live_replay`
(the real model, a core stolen), `speculation`, `guard_study` (the guard on real losses); `outcome` has the targets and
the answers to the claims. There is one baseline, the static limit chosen on scripts of other seeds. Every scenario is a
separate measurement: different scenarios are not samples of one quantity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from lib.measure.metrics import catalogue
from lib.measure.metrics.digits import percent, signed
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.serving import policy_comparison, replay
from lib.measure.serving.protocol import Policy
from lib.models.loading import Loaded
from lib.optimizations.feedback_mechanisms import disturbance_comparison, live_replay, scenarios, shadow
from lib.optimizations.feedback_mechanisms.control.laws import PI, Aimd
from lib.optimizations.feedback_mechanisms.control.profile_bandit import ProfileBandit
from lib.optimizations.feedback_mechanisms.disturbance_comparison import PolicyFactory, Row, TwoProfileSetup
from lib.optimizations.feedback_mechanisms.live_replay import LiveTrial
from lib.optimizations.feedback_mechanisms.method import SEARCH_SPACE, LatencyLoop, Switch
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST
from lib.optimizations.feedback_mechanisms.rivals import Routed, Static
from lib.optimizations.feedback_mechanisms.scenario_table import (
    BANDIT_LOOP,
    FAST_ALONE,
    LIMIT_ALONE,
    LOOP,
    ORACLE,
    PI_LOOP,
    ROUTED,
    ScenarioTable,
)
from lib.optimizations.feedback_mechanisms.scenarios import Played, Scenario

SEEDS = {"preview": 6, "quick": 6, "standard": 6, "thorough": 12}  # per scenario; an interval needs at least six
CHOOSING = 4  # seeds of the scripts for choosing the static limit, and whether a fast profile is worthwhile
LEVEL = 0.95  # confidence level for showing that it is
SETPOINT = SEARCH_SPACE["setpoint"]["default"]
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # static limits tried, from the smallest that a loop may reach
ROUTED_RUNS = (0.0, 0.05)  # tolerated lead or lag of routing, as a share of a script's requests
OTHERS = (LIMIT_ALONE, PI_LOOP, BANDIT_LOOP, ROUTED, FAST_ALONE)  # controls besides the loop


# --- the scripts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisturbanceStudy:
    """The setup, the loop's setpoint, every scenario of every seed, and the scripts for choosing the static limit.

    `broken`: scripts whose fast profile is secretly broken. They only test the guard and do not count for the seconds
    missed, since a profile that has to be rolled back cannot help.
    """

    setup: TwoProfileSetup
    setpoint: float
    scripts: tuple[Scenario, ...]
    choosing: tuple[Scenario, ...]
    broken: tuple[Scenario, ...] = ()

    def named(self, name: str) -> list[Scenario]:
        """Return the scripts of one scenario, one per seed."""
        return [scenario for scenario in self.scripts if scenario.name == name]

    @property
    def names(self) -> list[str]:
        """The names of the scenarios, starting with the quiet one."""
        return list(dict.fromkeys(scenario.name for scenario in self.scripts))

    def loop(self, law: type[PI] | type[Aimd] = Aimd, profiles: bool = True) -> LatencyLoop:
        """Return a new loop, with a switch between the profiles or with the limit alone."""
        two = profiles and not self.setup.alone
        return self._with_switch(law, Switch(self.setup.objective, self.setup.saving) if two else None)

    def _with_switch(self, law: type[PI] | type[Aimd], switch: Switch | ProfileBandit | None) -> LatencyLoop:
        patience = self.setup.limits.patience_seconds
        return LatencyLoop(
            law(), self.setup.objective, setpoint=self.setpoint, switch=switch, patience_seconds=patience
        )

    def settings(self, size: int) -> dict[str, PolicyFactory]:
        """Return the settings besides the static limit: oracle, routing, fast profile alone, and the loops, one of them
        with a bandit that chooses the profile.

        The oracle is the best, in hindsight, of the full profile, the fast one, and the fast one in the disturbed third
        and a little beyond, each with `size` rows. Routing gives the fast profile the share that the loop gave it on
        the same scenario and seed, request by request or in long runs, whichever misses fewer seconds. Without a fast
        profile only the loops are returned, with the limit alone: the other settings would equal the static limit.
        """
        wait = 4 * self.setup.objective.first_token_seconds
        loops: dict[str, PolicyFactory] = {
            LOOP: partial(self._loop, Aimd, True),
            PI_LOOP: partial(self._loop, PI, True),
        }
        if self.setup.alone:
            return loops

        def oracle(scenario: Scenario) -> Policy:
            span = scenario.thirds[1], scenario.thirds[2] + wait
            return self._best(
                scenario, [partial(Static, size), partial(Static, size, 1), partial(Static, size, 0, span)]
            )

        def routed(scenario: Scenario) -> Policy:
            share = float(self.setup.ran(scenario, LOOP, loops[LOOP])["fast share"] or 0.0)
            runs = [round(run * len(scenario.trace.requests)) for run in ROUTED_RUNS]
            return self._best(scenario, [partial(Routed, size, share, run) for run in runs])

        others: dict[str, PolicyFactory] = {ORACLE: oracle, FAST_ALONE: lambda _: Static(size, always=1)}
        loops[BANDIT_LOOP] = lambda _: self._with_switch(Aimd, ProfileBandit(self.setup.objective))
        return others | loops | {LIMIT_ALONE: partial(self._loop, Aimd, False), ROUTED: routed}

    def _best(self, scenario: Scenario, makers: Sequence[Callable[[], Policy]]) -> Policy:
        """Return a new policy from the maker whose policy misses the fewest seconds of this scenario, in hindsight."""

        def missed(make: Callable[[], Policy]) -> float:
            return float(self.setup.ran(scenario, repr(make()), lambda _: make())["missed s"] or 0.0)

        return min(makers, key=missed)()

    def _loop(self, law: type[PI] | type[Aimd], profiles: bool, _: Scenario) -> LatencyLoop:
        return self.loop(law, profiles)


def study(setup: TwoProfileSetup, setpoint: float, effort: str, seed: int) -> DisturbanceStudy:
    """Return the study of all scripts; their seeds start at `seed` + 100, those for choosing at `seed` + 5000."""
    seeds = range(seed + 100, seed + 100 + SEEDS[effort])
    choosing_seeds = range(seed + 5000, seed + 5000 + CHOOSING)
    scripts, choosing = (tuple(disturbance_comparison.scripts(setup, numbers)) for numbers in (seeds, choosing_seeds))
    by_seed = [] if setup.alone else [[script for script in scripts if script.trace.seed == number] for number in seeds]
    return DisturbanceStudy(setup, setpoint, scripts, choosing, tuple(map(scenarios.secretly_broken, by_seed)))


def not_worth_it(setup: TwoProfileSetup, effort: str, seed: int, setpoint: float = SETPOINT) -> str | None:
    """Return why the fast profile is of no use to the loop; None if, on the scripts for choosing, the loop is shown to
    miss fewer seconds with it than with its limit alone.

    A faster profile is not enough: while rows of both profiles run, each costs a step of its own, and answers are
    reread while requests wait. A small saving is lost to that.
    """
    disturbances = study(setup, setpoint, effort, seed)
    saved: dict[int, list[float]] = {}
    for script in disturbances.choosing:
        loops = ((name, partial(disturbances._loop, Aimd, both)) for name, both in ((LIMIT_ALONE, False), (LOOP, True)))
        alone, two = (float(setup.ran(script, *loop)["missed s"] or 0.0) for loop in loops)
        saved.setdefault(script.trace.seed, []).append(alone - two)
    means = [float(np.mean(each)) for each in saved.values()]
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) * float(stats.t.ppf(LEVEL, len(means) - 1))
    if np.mean(means) > error:
        return None
    gain = f"{np.mean(means):.2f} s per script, ± {error:.2f}"
    return f"the loop is not shown to miss fewer seconds with it than without, scripts of other seeds: {gain}"


def one_run(disturbances: DisturbanceStudy) -> tuple[LatencyLoop, Played, float]:
    """Return a loop after one simulated run with a stolen core, the run, and the seconds missed.

    Raises AssertionError if requests were lost or the limit left its range.
    """
    stolen = disturbances.named("stolen core")[0]
    loop = disturbances.loop()
    run = disturbances.setup.play(stolen, loop)
    assert len(run.profile_of) + len(run.served.refused) <= len(stolen.trace.requests), "requests were lost"
    assert all(1 <= limit <= 32 for _, limit, _ in loop.course), "the limit left its range"
    return loop, run, scenarios.seconds_beyond(run.served, disturbances.setup.objective)


def compare(disturbances: DisturbanceStudy) -> ScenarioTable:
    """Return the results of the static limit, chosen on scripts of other seeds, and of every setting on all scripts."""
    best, tried = choose(disturbances)
    settings = {_name(best): static(best)} | disturbances.settings(best)
    return ScenarioTable(
        disturbance_comparison.compare(disturbances.setup, disturbances.scripts, settings),
        best,
        tried,
        disturbances.setup.net,
        _broken(disturbances, {_name(best): static(best)} | disturbances.settings(best)),
        disturbances.setup.nets,
    )


def _broken(disturbances: DisturbanceStudy, settings: Mapping[str, PolicyFactory]) -> list[Row]:
    """Return the rows of scripts whose fast profile breaks, for the static limit and the settings that use it."""
    if not disturbances.broken:
        return []
    chosen = {name: make for name, make in settings.items() if name not in (ORACLE, ROUTED, LIMIT_ALONE, BANDIT_LOOP)}
    return disturbance_comparison.compare(disturbances.setup, disturbances.broken, chosen)


def choose(disturbances: DisturbanceStudy) -> tuple[int, list[Row]]:
    """Return the static limit that misses the fewest seconds, and a row per limit tried.

    A limit ties with the best if its excess of seconds missed is within one standard error over the seeds. Of the tied
    limits, the one with the highest share in time is taken; within the practical margin of that, the smallest.
    """
    setup, seeds = disturbances.setup, {script.trace.seed for script in disturbances.choosing}
    runs = {
        size: [[setup.ran(each, _name(size), static(size)) for each in disturbances.choosing if each.trace.seed == seed]
               for seed in sorted(seeds)]
        for size in SIZES
    }  # fmt: skip
    means = {
        key: {
            size: [policy_comparison.averaged(run, (key,))[key] or 0.0 for run in by_seed]
            for size, by_seed in runs.items()
        }
        for key in ("missed s", "goodput share")
    }
    missed, shares = means["missed s"], {size: float(np.mean(each)) for size, each in means["goodput share"].items()}
    fewest = min(SIZES, key=lambda size: float(np.mean(missed[size])))
    tied = [size for size in SIZES if _ties(missed[size], missed[fewest])]
    margin = catalogue.metric("goodput_requests_per_second").margin or 0.0
    best = min(size for size in tied if shares[size] >= (1 - margin) * max(shares[other] for other in tied))
    rows: list[Row] = [
        {"static limit": size, "seconds missed": float(np.mean(missed[size])), "goodput share": shares[size]}
        | {"taken": "yes" if size == best else "ties" if size in tied else "no"}
        for size in SIZES
    ]
    return best, rows


def _ties(missed: Sequence[float], fewest: Sequence[float]) -> bool:
    """Return whether `missed` exceeds `fewest`, seed by seed, by at most one standard error on average."""
    excess = np.subtract(missed, fewest)
    return bool(excess.mean() <= (excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0))


def _name(size: int) -> str:
    return f"static {size}"


def static(size: int) -> PolicyFactory:
    """Return the factory of the policy with at most `size` rows, the same for every scenario."""
    return lambda _: Static(size)


def replayed_policies(disturbances: DisturbanceStudy, compared: ScenarioTable) -> dict[str, Any]:
    """Return the policy factories for the replays, and the limit of the static one."""
    loop = disturbances.settings(compared.best)[LOOP]
    return {"static": static(compared.best), "loop": loop, "size": compared.best}


def primaries(compared: ScenarioTable) -> dict[str, tuple[str, str]]:
    """Return the primary measurement of each dimension, declared before any trace is served.

    They are those of the replays against the static limit chosen on scripts of other seeds, and the weights of both
    profiles against those of one.
    """
    workload = live_replay.workload(compared.best)
    return {
        "performance": ("goodput_requests_per_second", workload),
        "accuracy": ("retrieval_exact_match", "generate"),
        "resources": ("weights_bytes", "load"),
        "efficiency": ("energy_joules_per_token", workload),
    }


def comparison(disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial) -> list[Measurement]:
    """Return a measurement of simulated goodput per scenario, with the simulation error found by the replays; then the
    measurements without verdicts over all scenarios. The baseline is the static limit everywhere.
    """
    results = []
    for name in disturbances.names:
        workload = f"serve, simulated, {name}, {compared.static}"
        results.append(live.carried(_goodput(disturbances, compared, name, LOOP, workload)))
    over_all = f"serve, simulated, {compared.static}"
    setup = disturbances.setup
    return [*results, *disturbance_comparison.measurements(setup, compared.rows, compared.static, LOOP, over_all)]


def _goodput(
    disturbances: DisturbanceStudy, compared: ScenarioTable, scenario: str, setting: str, workload: str
) -> Measurement:
    settings = disturbances.settings(compared.best) | {compared.static: static(compared.best)}
    baseline, optimized = ((name, settings[name]) for name in (compared.static, setting))
    scripts = disturbances.named(scenario)
    return disturbance_comparison.goodput(disturbances.setup, scripts, baseline, optimized, workload)


def controls(
    disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial, alone: Sequence[Measurement]
) -> list[tuple[str, str, list[Measurement]]]:
    """Return (name, purpose, measurements) of each control: the static setting replayed twice, the other settings while
    a core is stolen, and `alone`, the quality of the fast profile without the full one.
    """
    own = replay.control(live.rounds, disturbances.setup.objective, "static", "static again", live.headline.workload)
    name = "stolen core"
    workload = f"serve, simulated, {name}, {compared.static}"
    others = [
        (setting, f"another setting, {name}", [live.carried(_goodput(disturbances, compared, name, setting, workload))])
        for setting in OTHERS
        if setting in disturbances.settings(compared.best)
    ]
    if disturbances.setup.alone:
        return [("A/A", "the static setting replayed twice", [own]), *others]
    purpose = "the fast profile answers everything: points lost at a share of 100 %"
    return [("A/A", "the static setting replayed twice", [own]), *others, ("fast profile", purpose, list(alone))]


def quality(
    loaded: Loaded, fast: nn.Module, share: float, live: LiveTrial, effort: Effort, seed: int
) -> tuple[list[Measurement], list[Measurement]]:
    """Return the quality of a blend with `share` of fast answers and the agreement of answers between the replays; and
    the quality of the fast profile alone.
    """
    blended, alone = shadow.blended(loaded, fast, (share, 1.0), effort, seed)
    return [*blended, *replay.answers_alike(*live.replays, loaded.quality_unavailable)], alone


def points_lost(compared: ScenarioTable, alone: Sequence[Measurement]) -> str:
    """Return one line on the fast profile's share of the answers, and on the points that each score loses per tenth of
    the answers given by it.
    """
    if compared.alone:
        return f"The full profile gives all answers: {NO_FAST}"
    quiet, busy = (percent(compared.share(name)) for name in ("quiet", "load step"))
    shares = f"{quiet} by the fast profile, {busy} during a load step"
    lost = [
        f"{item.metric} {signed(100 * (item.optimized - item.baseline) / 10, '.2f')} points"
        for item in alone
        if item.baseline is not None and item.optimized is not None and item.unit == "share"
    ]
    return f"{shares}. For each tenth of the answers by the fast profile: {'; '.join(lost) or 'unknown'}"


def costs(full: nn.Module, fast: nn.Module, share: float, apply_seconds: float) -> list[Measurement]:
    """Return the bytes of both profiles and the seconds it took to make the fast one."""
    return disturbance_comparison.resources(full, fast, share, apply_seconds)
