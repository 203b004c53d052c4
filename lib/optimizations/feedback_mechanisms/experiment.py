"""The protocol of the feedback mechanisms: the loops against static settings on scripted disturbances, and the answers.

The functions return plain data (rows, measurements, frames); nothing is displayed and no loop is tuned here. The parts
that stand alone have modules of their own: `live_replay` (the real model, a core stolen), `speculation`, `guard_study`
(the guard on real losses); `outcome` has the targets and the answers. There is one baseline, the static limit that is
chosen on scripts of other seeds, and every scenario is a separate measurement: different scenarios are not samples of
one quantity.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from torch import nn

from lib.measure.metrics import catalogue
from lib.measure.metrics import settings as efforts
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import BRIEF, Effort
from lib.measure.serving import replay
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks
from lib.optimizations.common import finetuning
from lib.optimizations.common.compression import weight_only
from lib.optimizations.feedback_mechanisms import disturbance_comparison, live_replay, profiles, scenarios, shadow
from lib.optimizations.feedback_mechanisms.disturbance_comparison import (
    LENGTHS,
    PolicyFactory,
    Routed,
    Static,
    TwoProfileSetup,
)
from lib.optimizations.feedback_mechanisms.live_replay import LiveTrial
from lib.optimizations.feedback_mechanisms.method import PI, Aimd, LatencyLoop, Switch
from lib.optimizations.feedback_mechanisms.profiles import Candidate
from lib.optimizations.feedback_mechanisms.scenarios import Played, Scenario

REQUESTS = {"preview": 50, "quick": 150, "standard": 300, "thorough": 1000}  # in a third of a script, at capacity
SEEDS = {"preview": 6, "quick": 6, "standard": 6, "thorough": 12}  # of each scenario: the fewest that give an interval
PROXY_STEPS = 20  # of distillation by default
CHOOSING = 2  # seeds of the scripts on which the static limit is chosen
TEXTS = {"preview": (4, 8, 256)}  # by which blocks are chosen, on which is distilled, and tokens of those at once
MORE_TEXTS = (16, 64, 512)  # at every other effort
SIZES = (4, 8, 12, 16, 24, 32)  # static limits that are tried
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)
PROMPTS = {"preview": 4, "quick": 16, "standard": 64, "thorough": 128}  # on which a candidate's disagreement is read
READ = {"preview": {"windows": 4, "items": 8}}  # by a candidate, where that is less than elsewhere
WIDE = 1024  # hidden size from which on reading fewer bytes shows
LOOP, FAST_ALONE, ROUTED = "AIMD and profile", "fast alone", "routed, the loop's share"
OTHERS = ("AIMD, limit alone", "PI and profile", ROUTED, FAST_ALONE)  # controls beside the loop

Row = dict[str, object]


# --- the profiles -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Makers:
    """What makes a smaller model: `apply` and `recover`, as `structured_pruning` has them. They come from the caller:
    an optimization knows no other.
    """

    apply: Callable[..., nn.Module]
    recover: Callable[..., tuple[nn.Module, Any]]

    def pruned(self, loaded: Loaded, ratio: float, steps: int, effort: str, seed: int) -> nn.Module:
        """Return a copy that lacks `ratio` of the decoder's parameters, whole blocks of it, distilled for some steps;
        the effort says on how many texts (`TEXTS`).
        """
        chosen_on, distilled_on, at_once = TEXTS.get(effort, MORE_TEXTS)
        text = tasks.calibration(loaded, chosen_on, 256, seed)
        fast = self.apply(loaded.model, text, ratio=ratio, granularity="depth", seed=seed)
        if not steps:
            return fast
        batches = tasks.calibration(loaded, distilled_on, 256, seed, tokens_at_once=at_once)
        return self.recover(fast, loaded.model, batches, steps=steps, learning_rate=1e-3, seed=seed)[0]


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return the steps of distillation of each profile; by default (-1) PROXY_STEPS on a proxy model, none at real
    size.
    """
    return finetuning.steps_of(loaded, finetune_steps, PROXY_STEPS, effort)


def fast_profiles(
    loaded: Loaded, makers: Makers, ratio: float, steps: int, bound: float, effort: str, seed: int
) -> tuple[nn.Module, list[Candidate]]:
    """Return the draft, whose answers need no quality, and the fast profiles that were considered, the admitted one
    last.

    Candidates from the fastest on: without `ratio` of the decoder's parameters (the draft), without half as many, and,
    where matrices are wide enough for that to pay, with int8 weights.
    """
    draft = makers.pruned(loaded, ratio, steps, effort, seed)

    def candidates() -> Iterator[tuple[str, nn.Module]]:
        yield f"{ratio:.0%} fewer parameters", draft
        yield f"{ratio / 2:.0%} fewer parameters", makers.pruned(loaded, ratio / 2, steps, effort, seed)
        if anatomy(loaded.model).config.hidden_size >= WIDE:
            yield "int8 weights", weight_only.weight_only(loaded.model, 8)

    return draft, profiles.first_admitted(loaded, candidates(), bound, PROMPTS[effort], seed, **READ.get(effort, {}))


def candidate_rows(candidates: Sequence[Candidate]) -> list[Row]:
    """Return a row per candidate: blocks, disagreement, perplexity, flips, and why it is not admitted."""
    return [
        {
            "fast profile": candidate.name,
            "blocks": len(anatomy(candidate.model).blocks),
            "disagreement": candidate.disagreement,
            "perplexity ÷ full": candidate.perplexity,
            "items that flip": candidate.flips,
            "admitted": "yes" if candidate.refused is None else f"no: {candidate.refused}",
        }
        for candidate in candidates
    ]


# --- the scripts ------------------------------------------------------------------------------------------------------


def prepare(
    loaded: Loaded, fast: nn.Module, effort: str, *, first_token_factor: float, token_factor: float,
    shadow_share: float, seed: int,
) -> TwoProfileSetup:  # fmt: skip
    """Time the steps of both profiles and return the setup that all settings share."""
    preview = efforts.read(effort).preview
    return disturbance_comparison.prepare(
        loaded,
        fast,
        first_token_factor=first_token_factor,
        token_factor=token_factor,
        requests=REQUESTS[effort],
        rounds=2 if preview else 3 if effort in BRIEF else 4,
        preview=preview,
        shadow_share=shadow_share,
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


@dataclass(frozen=True)
class DisturbanceStudy:
    """The setup, the loop's setpoint, every scenario of every seed, and those on which the static limit is chosen."""

    setup: TwoProfileSetup
    setpoint: float
    scripts: tuple[Scenario, ...]
    choosing: tuple[Scenario, ...]

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
        switch = Switch(self.setup.objective, self.setup.saving) if two else None
        return LatencyLoop(law(), self.setup.objective, setpoint=self.setpoint, switch=switch)

    def settings(self, size: int) -> dict[str, PolicyFactory]:
        """Return the settings beside the static limit: the oracle, routing, the fast profile alone, the loops.

        The oracle knows the script: the fast profile in the disturbed third and a little beyond, `size` rows. Routing
        gives the fast profile the share that the loop gave it on the same scenario and seed.
        """
        wait = 4 * self.setup.objective.first_token_seconds

        def oracle(scenario: Scenario) -> Static:
            return Static(size, span=(scenario.thirds[1], scenario.thirds[2] + wait))

        def routed(scenario: Scenario) -> Routed:
            return Routed(size, float(self.setup.ran(scenario, LOOP, settings[LOOP])["fast share"] or 0.0))

        settings: dict[str, PolicyFactory] = {"oracle": oracle, FAST_ALONE: lambda _: Static(size, always=1)}
        laws: tuple[tuple[str, type[PI] | type[Aimd]], ...] = (("AIMD", Aimd), ("PI", PI))
        for name, law in laws:
            settings[f"{name} and profile"] = partial(self._loop, law, True)
        settings["AIMD, limit alone"] = partial(self._loop, Aimd, False)
        return settings | {ROUTED: routed}

    def _loop(self, law: type[PI] | type[Aimd], profiles: bool, _: Scenario) -> LatencyLoop:
        return self.loop(law, profiles)


def study(setup: TwoProfileSetup, setpoint: float, effort: str, seed: int) -> DisturbanceStudy:
    """Return the study of all scripts; their seeds begin at `seed` + 100, those for choosing at `seed` + 5000."""
    seeds = range(seed + 100, seed + 100 + SEEDS[effort])
    others = range(seed + 5000, seed + 5000 + CHOOSING)
    scripts, choosing = (tuple(disturbance_comparison.scripts(setup, each)) for each in (seeds, others))
    return DisturbanceStudy(setup, setpoint, scripts, choosing)


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


@dataclass(frozen=True)
class ScenarioTable:
    """A row per scenario and setting, and the static limit that is the baseline of all of them."""

    rows: list[Row]
    best: int

    @property
    def static(self) -> str:
        """The baseline's name."""
        return f"static {self.best}"

    @property
    def sums(self) -> dict[str, dict[str, float]]:
        """Means of each setting over all scenarios."""
        return disturbance_comparison.totals(self.rows)

    @property
    def caption(self) -> str:
        """The static limit as one line."""
        return f"baseline: static limit of {self.best} rows, chosen on scripts of other seeds"

    def share(self, scenario: str) -> float:
        """Return the share of the answers that the loop gave with the fast profile in one scenario."""
        row = next(row for row in self.rows if row["setting"] == LOOP and row["scenario"] == scenario)
        return float(str(row["fast share"]))

    @property
    def finding(self) -> str:
        """The seconds missed of the loop, of routing and of the fast profile alone against the static limit."""
        shares = [self.missed_ratio(name) for name in (LOOP, ROUTED, FAST_ALONE)]
        loop, routed, fast = ("unknown" if share is None else f"{share:.2f}" for share in shares)
        return (
            f"Seconds missed against the static limit: {loop} by the loop, {routed} by routing the same share, "
            f"{fast} by the fast profile alone."
        )

    @property
    def ratio(self) -> float | None:
        """Seconds missed, loop ÷ static limit; None where the static limit misses none."""
        return self.missed_ratio(LOOP)

    def missed_ratio(self, setting: str) -> float | None:
        """Return the seconds missed of a setting ÷ those of the static limit."""
        sums = self.sums
        static = sums[self.static]["missed s"]
        return sums[setting]["missed s"] / static if static else None


def compare(disturbances: DisturbanceStudy) -> ScenarioTable:
    """Return the static limit and every other setting on all scripts.

    The limit is chosen on scripts of other seeds: of those whose goodput lies within the practical margin of the
    highest, the smallest.
    """
    setup = disturbances.setup
    tried = disturbance_comparison.compare(setup, disturbances.choosing, {_name(size): static(size) for size in SIZES})
    shares = {size: disturbance_comparison.totals(tried)[_name(size)]["goodput share"] for size in SIZES}
    margin = catalogue.metric("goodput_requests_per_second").margin or 0.0
    best = min(size for size, share in shares.items() if share >= (1 - margin) * max(shares.values()))
    settings = {_name(best): static(best)} | disturbances.settings(best)
    return ScenarioTable(disturbance_comparison.compare(setup, disturbances.scripts, settings), best)


def _name(size: int) -> str:
    return f"static {size}"


def static(size: int) -> PolicyFactory:
    return lambda _: Static(size)


def replayed_policies(disturbances: DisturbanceStudy, compared: ScenarioTable) -> dict[str, Any]:
    """Return the policies of the replays in real time, and the size of the static one."""
    loop = disturbances.settings(compared.best)[LOOP]
    return {"static": static(compared.best), "loop": loop, "size": compared.best}


def trade_off(compared: ScenarioTable) -> pd.DataFrame:
    """Return a point per setting: `x` answers by the fast profile in percent, `y` seconds missed."""
    points = [
        {"x": 100 * means["fast share"], "y": means["missed s"], "arm": name} for name, means in compared.sums.items()
    ]
    return pd.DataFrame(points)


def read_trade_off(compared: ScenarioTable) -> tuple[str, str]:
    """Return two sentences on how to read `trade_off`."""
    sums = compared.sums
    loop, routed, static = sums[LOOP], sums[ROUTED], sums[compared.static]
    first = (
        f"The loop misses {loop['missed s']:.2f} s of a script with {loop['fast share']:.0%} of the answers by the "
        f"fast profile, the static limit {static['missed s']:.2f} s with none, and routing the same share whatever "
        f"happens {routed['missed s']:.2f} s."
    )
    second = (
        f"The oracle, which knows the script, misses {sums['oracle']['missed s']:.2f} s for "
        f"{sums['oracle']['fast share']:.0%}, and the fast profile alone {sums[FAST_ALONE]['missed s']:.2f} s for all "
        f"of them."
    )
    return first, second


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
    ]
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


def points_lost(alone: Sequence[Measurement]) -> str:
    """Return how many points each score loses per tenth of the answers that the fast profile gives, as one line."""
    lost = [
        f"{item.metric} {100 * (item.optimized - item.baseline) / 10:+.2f} points"
        for item in alone
        if item.baseline is not None and item.optimized is not None and item.unit == "share"
    ]
    return f"For each tenth of the answers by the fast profile: {'; '.join(lost) or 'unknown'}"


def costs(full: nn.Module, fast: nn.Module, share: float, apply_seconds: float) -> list[Measurement]:
    """Return bytes of both profiles and the seconds to make the fast one."""
    return disturbance_comparison.resources(full, fast, share, apply_seconds)
