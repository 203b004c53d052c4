"""The outcome of the feedback mechanisms: targets, the answer to each claim, and the record's details.

Everything is computed from what `experiment` and the studies beside it have measured.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from scipy import stats

from lib.measure.metrics import paired_stats
from lib.optimizations.feedback_mechanisms import experiment
from lib.optimizations.feedback_mechanisms.experiment import DisturbanceStudy, Row, ScenarioTable
from lib.optimizations.feedback_mechanisms.guard_study import BROKEN, SOUND, GuardStudy
from lib.optimizations.feedback_mechanisms.live_replay import LiveTrial
from lib.optimizations.feedback_mechanisms.profiles import Candidate
from lib.optimizations.feedback_mechanisms.speculation.drafting import DraftingStudy

CLAIMS = (
    "A static limit misses the objectives for no more seconds than the loop.",
    "Routing the loop's share of the requests to the fast profile, whatever happens, misses no more seconds than the "
    "loop.",
    "The loop swings: half of the moves of its limit reverse the one before, or more.",
    "The guard takes back a sound profile in more than one of a hundred windows.",
    "The guard keeps a broken profile in more than one of a hundred windows.",
    "A drafted answer differs from the greedy one.",
)
MOST_MISSED, LEAST_CAUGHT, MOST_FALSE = 0.20, 0.99, 0.01
MOST_REVERSALS = 0.5  # of the moves of a limit; a course without memory reverses that often
CONFIDENCE = 0.90  # of a share's interval, so that each end alone holds at 95 %


def targets(compared: ScenarioTable, guards: GuardStudy, laws: pd.DataFrame) -> list[Row]:
    """Return a row per target: what was measured, and whether it was reached."""
    goals = (
        ("seconds missed, loop ÷ static, guard charged", compared.ratio, "at most", MOST_MISSED),
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
        (CLAIMS[0], *_missed(disturbances, compared, compared.static)),
        (CLAIMS[1], *_missed(disturbances, compared, experiment.ROUTED)),
        (CLAIMS[2], *_swinging(disturbances, compared)),
        (CLAIMS[3], *_share(guards, SOUND)),
        (CLAIMS[4], *_share(guards, BROKEN)),
        (CLAIMS[5], differing > 0, f"{differing} of {int(laws['answers'].sum())} answers differ, all laws together"),
    ]


def _missed(disturbances: DisturbanceStudy, compared: ScenarioTable, rival: str) -> tuple[bool | None, str]:
    """The seconds that a rival misses beyond the loop, scenario by scenario: unlike ones are not pooled."""
    setup, ends = disturbances.setup, []
    settings = disturbances.settings(compared.best) | {compared.static: experiment.static(compared.best)}
    names = [name for name in disturbances.names if name != "quiet"]
    for name in names:
        arms = [
            [float(setup.ran(script, arm, settings[arm])["missed s"] or 0.0) for script in disturbances.named(name)]
            for arm in (rival, experiment.LOOP)
        ]
        ends.append(paired_stats.median_interval([other - loop for other, loop in zip(*arms)]))
    intervals = "; ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in zip(names, ends))
    refuted = True if all(high <= 0 for _, high in ends) else False if all(low > 0 for low, _ in ends) else None
    return refuted, f"seconds saved by the loop in a script of each scenario: {intervals}"


def _swinging(disturbances: DisturbanceStudy, compared: ScenarioTable) -> tuple[bool | None, str]:
    """The share of the limit's moves that reverse the one before, script by script."""
    loop = disturbances.settings(compared.best)[experiment.LOOP]
    runs = [disturbances.setup.ran(script, experiment.LOOP, loop) for script in disturbances.scripts]
    counts = [(run["reversals"] or 0.0, run["moves"] or 0.0) for run in runs]
    shares = [reversals / (moves - 1) if moves > 1 else 0.0 for reversals, moves in counts]
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
        return None, f"{evidence}, but this profile's loss lies {excess:+.3f} from the bound, so it is not {profile}"
    return True if low > MOST_FALSE else False if high <= MOST_FALSE else None, evidence


def details(
    disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial, drafts: DraftingStudy, guards: GuardStudy,
    candidates: Sequence[Candidate], reached: Sequence[Row],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the record's details: name → value, provenance, source; the impact curve with its axes."""
    by, in_turn = "simulated on this run's step times", "perf_counter, laws taking turns"
    axes = {"x": "tokens drafted at a time", "y": "speed against plain decoding, ×"}
    entries: dict[str, tuple[Any, str, str]] = {
        "impact": (drafts.curve(), "measured", in_turn),
        "fast_profiles": (experiment.candidate_rows(candidates), "measured", "text and items of the split search"),
        "scripts": ([script.trace.describe() for script in disturbances.scripts], "derived", "seeds and phases"),
        "settings": (compared.rows, "estimated", by),
        "simulation": (live.rows, "measured", "against the replays in real time"),
        "slowness": ([list(pair) for pair in live.slowness], "measured", "first static replay, decode steps by table"),
        "live_missed_seconds": (list(live.missed), "measured", "static, loop; real model, means of the rounds"),
        "speculation": (drafts.laws.to_dict("records"), "measured", in_turn),
        "guard": (guards.rows, "estimated", guards.source),
        "figures": (list(reached), "estimated", by),
    }
    labels = ("value", "provenance", "source")
    return {name: dict(zip(labels, entry)) | (axes if name == "impact" else {}) for name, entry in entries.items()}
