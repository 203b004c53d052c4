"""The protocol of the feedback mechanisms: the loops against static settings on scripted disturbances, and the answers.

The functions return plain data (rows, measurements, frames); nothing is displayed and no loop is tuned here. The parts
that stand alone have modules of their own: `scenario_table` (all settings on all scripts), `candidates` (of the fast
profile), `live_replay` (the real model, a core stolen), `speculation`, `guard_study` (the guard on real losses);
`outcome` has the targets and the answers. There is one baseline, the static limit that is chosen on scripts of other
seeds, and every scenario is a separate measurement: different scenarios are not samples of one quantity.
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

SEEDS = {"preview": 6, "quick": 6, "standard": 6, "thorough": 12}  # of each scenario: the fewest that give an interval
CHOOSING = 4  # seeds of the scripts on which the static limit is chosen, and whether a fast profile is worth it
LEVEL = 0.95  # at which it has to be shown that it is
SETPOINT = SEARCH_SPACE["setpoint"]["default"]
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # static limits that are tried: from the least a loop may reach
ROUTED_RUNS = (0.0, 0.05)  # of a script's requests: by so many routing may be ahead of its share or behind it
OTHERS = (LIMIT_ALONE, PI_LOOP, BANDIT_LOOP, ROUTED, FAST_ALONE)  # controls beside the loop


# --- the scripts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisturbanceStudy:
    """The setup, the loop's setpoint, every scenario of every seed, and those on which the static limit is chosen.

    `broken`: scripts whose fast profile is secretly broken. They test the guard; the seconds that the loop must not
    miss are those of the other ones, since nothing can be gained by a profile that has to be taken back.
    """

    setup: TwoProfileSetup
    setpoint: float
    scripts: tuple[Scenario, ...]
    choosing: tuple[Scenario, ...]
    broken: tuple[Scenario, ...] = ()

    def named(self, name: str) -> list[Scenario]:
        """Return the seeds of one scenario."""
        return [scenario for scenario in self.scripts if scenario.name == name]

    @property
    def names(self) -> list[str]:
        """The scenarios, the quiet one first."""
        return list(dict.fromkeys(scenario.name for scenario in self.scripts))

    def loop(self, law: type[PI] | type[Aimd] = Aimd, profiles: bool = True) -> LatencyLoop:
        """Return a new loop, with a switch between the profiles or by the limit alone."""
        two = profiles and not self.setup.alone
        return self._with_switch(law, Switch(self.setup.objective, self.setup.saving) if two else None)

    def _with_switch(self, law: type[PI] | type[Aimd], switch: Switch | ProfileBandit | None) -> LatencyLoop:
        patience = self.setup.limits.patience_seconds
        return LatencyLoop(
            law(), self.setup.objective, setpoint=self.setpoint, switch=switch, patience_seconds=patience
        )

    def settings(self, size: int) -> dict[str, PolicyFactory]:
        """Return the settings beside the static limit: the oracle, routing, the fast profile alone, the loops, of which
        one has a bandit choose the profile. Without a fast profile only the loops, which then have the limit alone: the
        others would be the static limit.

        The oracle is the best, in hindsight, of the full profile, the fast one, and the fast one in the disturbed third
        and a little beyond, each with `size` rows. Routing gives the fast profile the share that the loop gave it on
        the same scenario and seed, request by request or in long runs, whichever misses fewer seconds.
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
        """Return a new policy of the kind that misses the fewest seconds of this scenario, in hindsight."""

        def missed(make: Callable[[], Policy]) -> float:
            return float(self.setup.ran(scenario, repr(make()), lambda _: make())["missed s"] or 0.0)

        return min(makers, key=missed)()

    def _loop(self, law: type[PI] | type[Aimd], profiles: bool, _: Scenario) -> LatencyLoop:
        return self.loop(law, profiles)


def study(setup: TwoProfileSetup, setpoint: float, effort: str, seed: int) -> DisturbanceStudy:
    """Return the study of all scripts; their seeds begin at `seed` + 100, those for choosing at `seed` + 5000."""
    seeds = range(seed + 100, seed + 100 + SEEDS[effort])
    others = range(seed + 5000, seed + 5000 + CHOOSING)
    scripts, choosing = (tuple(disturbance_comparison.scripts(setup, each)) for each in (seeds, others))
    each = [] if setup.alone else [[script for script in scripts if script.trace.seed == number] for number in seeds]
    return DisturbanceStudy(setup, setpoint, scripts, choosing, tuple(map(scenarios.secretly_broken, each)))


def not_worth_it(setup: TwoProfileSetup, effort: str, seed: int, setpoint: float = SETPOINT) -> str | None:
    """Return why the fast profile is none for the loop; None where, on the scripts for choosing, the loop is shown to
    miss fewer seconds with it than by its limit alone.

    To be faster once it is in charge is not enough. Until the rows of both profiles have ended a step of each is made,
    its answers are read again while requests wait, and a small saving is lost to that.
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
    told = f"{np.mean(means):.2f} s of a script, ± {error:.2f}"
    return f"the loop is not shown to miss fewer seconds with it than without, scripts of other seeds: {told}"


def one_run(disturbances: DisturbanceStudy) -> tuple[LatencyLoop, Played, float]:
    """Return a loop after one simulated run while a core is stolen, the run, and the seconds missed.

    Raises AssertionError where requests were lost or the limit left its range.
    """
    stolen = disturbances.named("stolen core")[0]
    loop = disturbances.loop()
    run = disturbances.setup.play(stolen, loop)
    assert len(run.profile_of) + len(run.served.refused) <= len(stolen.trace.requests), "requests were lost"
    assert all(1 <= limit <= 32 for _, limit, _ in loop.course), "the limit left its range"
    return loop, run, scenarios.seconds_beyond(run.served, disturbances.setup.objective)


def compare(disturbances: DisturbanceStudy) -> ScenarioTable:
    """Return the static limit and every other setting on all scripts. The limit is chosen on scripts of other seeds."""
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
    """Return the rows of the scripts whose fast profile breaks, under the settings that use it and the static limit."""
    if not disturbances.broken:
        return []
    chosen = {name: make for name, make in settings.items() if name not in (ORACLE, ROUTED, LIMIT_ALONE, BANDIT_LOOP)}
    return disturbance_comparison.compare(disturbances.setup, disturbances.broken, chosen)


def choose(disturbances: DisturbanceStudy) -> tuple[int, list[Row]]:
    """Return the static limit that misses the fewest seconds, which is what it is judged by, and a row per limit tried.

    A limit ties with that one where it misses no more beyond it than one standard error over the seeds. Of those the
    one with the highest share in time is taken; within the practical margin of that, the smallest.
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
    """Return whether seconds missed, seed by seed, exceed the fewest by no more than a standard error."""
    excess = np.subtract(missed, fewest)
    return bool(excess.mean() <= (excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0))


def _name(size: int) -> str:
    return f"static {size}"


def static(size: int) -> PolicyFactory:
    """Return what makes the policy with `size` rows at most, the same for every trace."""
    return lambda _: Static(size)


def replayed_policies(disturbances: DisturbanceStudy, compared: ScenarioTable) -> dict[str, Any]:
    """Return the policies of the replays, and the size of the static one."""
    loop = disturbances.settings(compared.best)[LOOP]
    return {"static": static(compared.best), "loop": loop, "size": compared.best}


def primaries(compared: ScenarioTable) -> dict[str, tuple[str, str]]:
    """Return the primary measurement of each dimension: those of the replays against the static limit that was chosen
    on scripts of other seeds, and the weights of both profiles against those of one. Declared before any is served.
    """
    workload = live_replay.workload(compared.best)
    return {
        "performance": ("goodput_requests_per_second", workload),
        "accuracy": ("retrieval_exact_match", "generate"),
        "resources": ("weights_bytes", "load"),
        "efficiency": ("energy_joules_per_token", workload),
    }


def comparison(disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial) -> list[Measurement]:
    """Return the simulated goodput of each scenario, a measurement each, with the error that the replays have shown;
    and what is not judged, over all of them. The baseline is the static limit everywhere.
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
    """Return (name, purpose, measurements): the static setting replayed twice, the other settings while a core is
    stolen, and `alone`, the quality of the fast profile without the full one.
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
    """Return the quality of a blend with `share` of fast answers and how alike the replays answered; and the quality
    of the fast profile alone.
    """
    blended, alone = shadow.blended(loaded, fast, (share, 1.0), effort, seed)
    return [*blended, *replay.answers_alike(*live.replays, loaded.quality_unavailable)], alone


def points_lost(compared: ScenarioTable, alone: Sequence[Measurement]) -> str:
    """Return the fast profile's share of the answers, and how many points each score loses per tenth of the answers
    that it gives, as one line.
    """
    if compared.alone:
        return f"All answers are the full profile's: {NO_FAST}"
    quiet, busy = (percent(compared.share(name)) for name in ("quiet", "load step"))
    shares = f"{quiet} by the fast profile, {busy} during a load step"
    lost = [
        f"{item.metric} {signed(100 * (item.optimized - item.baseline) / 10, '.2f')} points"
        for item in alone
        if item.baseline is not None and item.optimized is not None and item.unit == "share"
    ]
    return f"{shares}. For each tenth of the answers by the fast profile: {'; '.join(lost) or 'unknown'}"


def costs(full: nn.Module, fast: nn.Module, share: float, apply_seconds: float) -> list[Measurement]:
    """Return bytes of both profiles and the seconds to make the fast one."""
    return disturbance_comparison.resources(full, fast, share, apply_seconds)
