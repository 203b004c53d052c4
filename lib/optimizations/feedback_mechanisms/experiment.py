"""The protocol of the feedback mechanisms: the loops against static settings on scripted disturbances, and the answers.

The functions return plain data (rows, measurements, frames); nothing is displayed and no loop is tuned here. The parts
that stand alone have modules of their own: `live_replay` (the real model, a core stolen), `drafting` (speculation),
`guard_study` (the guard on real losses).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from torch import nn

from lib.measure.metrics import paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.serving import replay
from lib.measure.trackers import energy
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.optimizations.feedback_mechanisms import disturbance_comparison, drafting, method, scenarios, shadow
from lib.optimizations.feedback_mechanisms.disturbance_comparison import LENGTHS, PolicyFactory, Static, TwoProfileSetup
from lib.optimizations.feedback_mechanisms.drafting import DraftingStudy
from lib.optimizations.feedback_mechanisms.guard_study import BROKEN, SOUND, GuardStudy
from lib.optimizations.feedback_mechanisms.live_replay import LiveTrial
from lib.optimizations.feedback_mechanisms.method import PI, Aimd, LatencyLoop, Switch
from lib.optimizations.feedback_mechanisms.scenarios import Played, Scenario

CLAIMS = (
    "A static limit in hindsight misses the objectives for no more seconds than the loop.",
    "The loop swings: half of the moves of its limit reverse the one before, or more.",
    "The guard takes back a sound profile in more than one of a hundred windows.",
    "The guard keeps a broken profile in more than one of a hundred windows.",
    "A drafted answer differs from the greedy one.",
)
# What carries the word of each dimension: one measurement, declared before any is taken.
PRIMARIES = {
    "performance": ("goodput_requests_per_second", "serve, disturbed"),
    "accuracy": ("retrieval_exact_match", "generate"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "generate"),
}
MOST_MISSED, LEAST_CAUGHT, MOST_FALSE = 0.20, 0.99, 0.01
MOST_REVERSALS = 0.5  # of the moves of a limit; a course without memory reverses that often
REQUESTS = {"quick": 400, "standard": 600, "thorough": 2000}  # in a third of a script, at capacity
SEEDS = {"quick": 2, "standard": 3, "thorough": 10}
SIZES = (4, 6, 8, 12, 16, 24, 32)  # static limits that are tried
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)
LOOP, FAST_ALONE = "AIMD and profile", "fast alone"
OTHERS = ("AIMD, limit alone", "PI and profile", FAST_ALONE)  # controls beside the loop
CONFIDENCE = 0.90  # of a share's interval, so that each end alone holds at 95 %

Row = dict[str, object]


def prepare(
    loaded: Loaded, fast: nn.Module, effort: str, *, first_token_factor: float, token_factor: float, seed: int
) -> TwoProfileSetup:
    """Time the steps of both profiles and return the setup that all settings share."""
    return disturbance_comparison.prepare(
        loaded,
        fast,
        first_token_factor=first_token_factor,
        token_factor=token_factor,
        requests=REQUESTS[effort],
        rounds=3 if effort == "quick" else 5,
        seed=seed,
    )


def step_curves(setup: TwoProfileSetup) -> pd.DataFrame:
    """Return ms per decode step over rows for both profiles, and the objective as a level."""
    context = LENGTHS.prompt_tokens + LENGTHS.new_tokens // 2
    points = [
        {"strength": rows, "value": 1000 * times.decode(rows, context), "arm": arm}
        for arm, times in zip(("full", "fast"), setup.times)
        for rows in ROWS_DRAWN
    ]
    level = 1000 * setup.objective.token_seconds
    return pd.DataFrame(points + [{"strength": rows, "value": level, "arm": "objective"} for rows in (1, 32)])


def describe_profile(fast: nn.Module, usual: float) -> str:
    """Return how many blocks the fast profile has, and its usual disagreement, as one sentence."""
    return f"The fast profile has {len(anatomy(fast).blocks)} blocks; its usual disagreement: {usual:.3f}."


@dataclass(frozen=True)
class DisturbanceStudy:
    """The setup, the loop's setpoint, and every scenario of every seed."""

    setup: TwoProfileSetup
    setpoint: float
    scripts: tuple[Scenario, ...]

    @property
    def troubled(self) -> list[Scenario]:
        """The scenarios in which something is disturbed."""
        return [scenario for scenario in self.scripts if scenario.name != "quiet"]

    @property
    def quiet(self) -> list[Scenario]:
        """The scenarios in which nothing is disturbed."""
        return [scenario for scenario in self.scripts if scenario.name == "quiet"]

    def loop(self, law: type[PI] | type[Aimd] = Aimd, profiles: bool = True) -> LatencyLoop:
        """Return a new loop, with a switch between the profiles or by the limit alone."""
        switch = Switch(self.setup.objective, self.setup.saving) if profiles else None
        return LatencyLoop(law(), self.setup.objective, setpoint=self.setpoint, switch=switch)

    def settings(self, size: int) -> dict[str, PolicyFactory]:
        """Return the settings beside the static limits: the oracle, the fast profile alone, the loops.

        The oracle knows the script: the fast profile in the disturbed third and a little beyond, `size` rows.
        """
        wait = 4 * self.setup.objective.first_token_seconds

        def oracle(scenario: Scenario) -> Static:
            third = scenario.trace.seconds / 3
            return Static(size, span=(third, 2 * third + wait))

        settings: dict[str, PolicyFactory] = {"oracle": oracle, FAST_ALONE: lambda _: Static(size, always=1)}
        laws: tuple[tuple[str, type[PI] | type[Aimd]], ...] = (("AIMD", Aimd), ("PI", PI))
        for name, law in laws:
            settings[f"{name}, limit alone"] = partial(self._loop, law, False)
            settings[f"{name} and profile"] = partial(self._loop, law, True)
        return settings

    def _loop(self, law: type[PI] | type[Aimd], profiles: bool, _: Scenario) -> LatencyLoop:
        return self.loop(law, profiles)


def study(setup: TwoProfileSetup, setpoint: float, effort: str, seed: int) -> DisturbanceStudy:
    """Return the study of all scripts; their seeds begin at `seed` + 100."""
    seeds = range(seed + 100, seed + 100 + SEEDS[effort])
    return DisturbanceStudy(setup, setpoint, tuple(disturbance_comparison.scripts(setup, seeds)))


def one_run(disturbances: DisturbanceStudy) -> tuple[LatencyLoop, Played, float]:
    """Return a loop after one simulated run while a core is stolen, the run, and the seconds missed.

    Raises AssertionError where requests were lost or the limit left its range.
    """
    stolen = next(scenario for scenario in disturbances.scripts if scenario.name == "stolen core")
    loop = disturbances.loop()
    run = disturbances.setup.play(stolen, loop)
    assert len(run.profile_of) + len(run.served.refused) <= len(stolen.trace.requests), "requests were lost"
    assert all(1 <= limit <= 32 for _, limit, _ in loop.course), "the limit left its range"
    return loop, run, scenarios.seconds_beyond(run.served, disturbances.setup.objective)


# --- the scripts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScenarioTable:
    """A row per scenario and setting, and the best static limits: by seconds missed, and by goodput."""

    rows: list[Row]
    best: int
    most: int

    @property
    def sums(self) -> dict[str, dict[str, float]]:
        """Means of each setting over all scenarios."""
        return disturbance_comparison.totals(self.rows)

    @property
    def caption(self) -> str:
        """The best static limits as one line."""
        return f"best static limit: {self.best} rows by seconds missed, {self.most} by goodput"

    @property
    def finding(self) -> str:
        """The seconds missed of the loop and of the fast profile alone against the static limit, as one line."""
        shares = [self.missed_ratio(name) for name in (LOOP, FAST_ALONE)]
        loop, fast = ("unknown" if share is None else f"{share:.2f}" for share in shares)
        return f"Seconds missed against the best static limit: {loop} by the loop, {fast} by the fast profile alone."

    @property
    def ratio(self) -> float | None:
        """Seconds missed, loop ÷ best static limit; None where the static limit misses none."""
        return self.missed_ratio(LOOP)

    def missed_ratio(self, setting: str) -> float | None:
        """Return the seconds missed of a setting ÷ those of the best static limit."""
        sums = self.sums
        static = sums[f"static {self.best}"]["missed s"]
        return sums[setting]["missed s"] / static if static else None


def compare(disturbances: DisturbanceStudy) -> ScenarioTable:
    """Return every static limit and every other setting on all scripts."""
    setup, scripts = disturbances.setup, disturbances.scripts
    rows = disturbance_comparison.compare(setup, scripts, {f"static {size}": _static(size) for size in SIZES})
    sums = disturbance_comparison.totals(rows)
    best = min(SIZES, key=lambda size: (sums[f"static {size}"]["missed s"], size))
    most = max(SIZES, key=lambda size: (sums[f"static {size}"]["goodput share"], -size))
    rows += disturbance_comparison.compare(setup, scripts, disturbances.settings(best))
    return ScenarioTable(rows, best, most)


def _static(size: int) -> PolicyFactory:
    return lambda _: Static(size)


def replayed_policies(disturbances: DisturbanceStudy, compared: ScenarioTable) -> tuple[PolicyFactory, PolicyFactory]:
    """Return the policies of the replays in real time: the static limit that misses least, and the loop."""
    return _static(compared.best), disturbances.settings(compared.best)[LOOP]


def trade_off(compared: ScenarioTable) -> pd.DataFrame:
    """Return a point per setting: `x` answers by the fast profile in percent, `y` seconds missed."""
    points = [
        {
            "x": 100 * means["fast share"],
            "y": means["missed s"],
            "arm": "every static limit" if name.startswith("static ") else name,
        }
        for name, means in compared.sums.items()
    ]
    return pd.DataFrame(points)


def read_trade_off(compared: ScenarioTable) -> tuple[str, str]:
    """Return two sentences on how to read `trade_off`."""
    sums = compared.sums
    loop, fast, static = sums[LOOP], sums[FAST_ALONE], sums[f"static {compared.best}"]
    first = (
        f"The loop misses {loop['missed s']:.2f} s of a script with {loop['fast share']:.0%} of the answers by the "
        f"fast profile, the best static limit {static['missed s']:.2f} s with none."
    )
    second = (
        f"The oracle, which knows the script, misses {sums['oracle']['missed s']:.2f} s for "
        f"{sums['oracle']['fast share']:.0%}, and the fast profile alone {fast['missed s']:.2f} s for all of them."
    )
    return first, second


def comparison(disturbances: DisturbanceStudy, compared: ScenarioTable) -> list[Measurement]:
    """Return the judged goodput where something was disturbed (first), where nothing was, and what is not judged.

    Goodput is held against the static limit with the most goodput, the rest against the one that misses least.
    """
    setup, arms = disturbances.setup, (_static(compared.most), disturbances.settings(compared.best)[LOOP])
    static = f"static {compared.best}"
    return [
        disturbance_comparison.goodput(setup, disturbances.troubled, *arms),
        disturbance_comparison.goodput(setup, disturbances.quiet, *arms, "serve, quiet"),
        *disturbance_comparison.measurements(setup, compared.rows, static, LOOP),
    ]


def controls(disturbances: DisturbanceStudy, compared: ScenarioTable) -> list[tuple[str, str, list[Measurement]]]:
    """Return (name, purpose, measurements): the static setting against itself, and the loops with one actuator less."""
    baseline, settings = _static(compared.most), disturbances.settings(compared.best)
    arms = {"A/A": ("the best static setting against itself", baseline)}
    arms |= {name: ("another setting on the same scripts", settings[name]) for name in OTHERS}
    return [
        (
            name,
            purpose,
            [disturbance_comparison.goodput(disturbances.setup, disturbances.troubled, baseline, make_policy)],
        )
        for name, (purpose, make_policy) in arms.items()
    ]


def quality(
    loaded: Loaded, fast: nn.Module, share: float, live: LiveTrial, effort: Effort, seed: int
) -> list[Measurement]:
    """Return the quality of a blend with `share` of fast answers, and how alike both replays answered."""
    return [*shadow.blended(loaded, fast, share, effort, seed), *replay.answers_alike(live.replays)]


def costs(
    loaded: Loaded, fast: nn.Module, share: float, apply_seconds: float, prompt: Any, effort: Effort, seed: int
) -> list[Measurement]:
    """Return bytes of both profiles, the seconds to make the fast one, and the energy of plain and drafted answers."""
    baseline, optimized = (
        drafting.Answer(loaded.model, fast, prompt, 16, law) for law in (method.fixed(0), method.DraftLength())
    )
    options: dict[str, Any] = {"blocks": effort.blocks, "device": loaded.device, "seed": seed}
    return [
        *disturbance_comparison.resources(loaded.model, fast, share, apply_seconds),
        *energy.per_token(baseline, optimized, workload="generate", **options),
    ]


# --- targets and answers ----------------------------------------------------------------------------------------------


def targets(compared: ScenarioTable, guards: GuardStudy, laws: pd.DataFrame) -> list[Row]:
    """Return a row per figure to reach: what was measured, and whether it was reached."""
    goals = (
        ("seconds missed, loop ÷ best static", compared.ratio, "at most", MOST_MISSED),
        ("broken profile taken back, share of windows", guards.taken_back(BROKEN), "at least", LEAST_CAUGHT),
        ("false rollbacks, share of quiet windows", guards.taken_back(SOUND), "at most", MOST_FALSE),
        ("least share of drafted tokens equal to greedy", float(laws["same tokens"].min()), "at least", 1.0),
    )
    return [
        {"figure": name, "measured": value, "to reach": f"{how} {goal}", "reached": _reached(value, how, goal)}
        for name, value, how, goal in goals
    ]


def _reached(value: float | None, how: str, goal: float) -> bool | str:
    if value is None:
        return "unknown"
    return bool(value >= goal if how == "at least" else value <= goal)


def refutations(
    disturbances: DisturbanceStudy, compared: ScenarioTable, guards: GuardStudy, laws: pd.DataFrame
) -> list[tuple[str, bool | None, str]]:
    """Return (claim, refuted or None where the run cannot tell, evidence) for each of `CLAIMS`."""
    differing = int((laws["answers"] - laws["same answers"]).sum())
    return [
        (CLAIMS[0], *_missed(disturbances, compared)),
        (CLAIMS[1], *_swinging(disturbances)),
        (CLAIMS[2], *_share(guards, SOUND)),
        (CLAIMS[3], *_share(guards, BROKEN)),
        (CLAIMS[4], differing > 0, f"{differing} of {int(laws['answers'].sum())} answers differ, all laws together"),
    ]


def _missed(disturbances: DisturbanceStudy, compared: ScenarioTable) -> tuple[bool | None, str]:
    """The seconds that the best static limit misses beyond the loop, script by script."""
    setup, scripts = disturbances.setup, disturbances.troubled
    arms = [
        [scenarios.seconds_beyond(setup.play(script, make(script)).served, setup.objective) for script in scripts]
        for make in (_static(compared.best), disturbances.settings(compared.best)[LOOP])
    ]
    low, high = paired_stats.median_interval([static - loop for static, loop in zip(*arms)])
    evidence = f"seconds saved by the loop in a disturbed script: {low:.2f} to {high:.2f} ({len(scripts)} scripts)"
    return True if high <= 0 else False if low > 0 else None, evidence


def _swinging(disturbances: DisturbanceStudy) -> tuple[bool | None, str]:
    """The share of the limit's moves that reverse the one before, script by script."""
    shares = []
    for script in disturbances.scripts:
        loop = disturbances.loop()
        disturbances.setup.play(script, loop)
        limits = [limit for _, limit, _ in loop.course]
        moves = int(np.count_nonzero(np.diff(limits)))
        shares.append(scenarios.reversals(limits) / (moves - 1) if moves > 1 else 0.0)
    low, high = paired_stats.median_interval(shares)
    evidence = f"share of moves that reverse the one before: {low:.3f} to {high:.3f} ({len(shares)} scripts)"
    return True if low >= MOST_REVERSALS else False if high < MOST_REVERSALS else None, evidence


def _share(guards: GuardStudy, profile: str) -> tuple[bool | None, str]:
    """The share of windows in which the guard is wrong about a profile, with its exact binomial interval."""
    rolled_back, excess = guards.alarms(profile), guards.excess(profile)
    wrong = rolled_back if profile == SOUND else guards.windows - rolled_back
    low, high = stats.binomtest(wrong, guards.windows).proportion_ci(CONFIDENCE, "exact")
    evidence = f"{wrong} of {guards.windows} windows ({low:.4f} to {high:.4f})"
    if (excess > 0) == (profile == SOUND):
        return None, f"{evidence}, but this profile's loss lies {excess:+.3f} from the margin, so it is not {profile}"
    return True if low > MOST_FALSE else False if high <= MOST_FALSE else None, evidence


def details(
    disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial, drafts: DraftingStudy, guards: GuardStudy,
    reached: Sequence[Row],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the record's details: name → value, provenance, source; the impact curve with its axes."""
    by, in_turn = "simulated on this run's step times", "perf_counter, laws taking turns"
    axes = {"x": "tokens drafted at a time", "y": "speed against plain decoding, ×"}
    entries: dict[str, tuple[Any, str, str]] = {
        "impact": (drafts.curve(), "measured", in_turn),
        "scripts": ([script.trace.describe() for script in disturbances.scripts], "derived", "seeds and phases"),
        "settings": (compared.rows, "estimated", by),
        "simulation": (live.rows, "measured", "against one replay in real time"),
        "slowness": ([list(pair) for pair in live.slowness], "measured", "static replay, decode steps by table"),
        "live_missed_seconds": (live.missed, "measured", "static, loop; real model, one run each"),
        "speculation": (drafts.laws.to_dict("records"), "measured", in_turn),
        "guard": (guards.rows, "estimated", guards.source),
        "figures": (list(reached), "estimated", by),
    }
    labels = ("value", "provenance", "source")
    return {name: dict(zip(labels, entry)) | (axes if name == "impact" else {}) for name, entry in entries.items()}
