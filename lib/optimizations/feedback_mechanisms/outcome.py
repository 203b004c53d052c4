"""The outcome of the feedback mechanisms: targets, answers to the claims, and the record's details.

Everything is computed from the measurements of `experiment` and the other studies in this folder.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lib.measure.metrics import paired_stats
from lib.measure.metrics.digits import signed
from lib.optimizations.common.evidence.targets import is_reached
from lib.optimizations.feedback_mechanisms import candidates as profile_candidates
from lib.optimizations.feedback_mechanisms import experiment
from lib.optimizations.feedback_mechanisms.disturbance_comparison import Row
from lib.optimizations.feedback_mechanisms.experiment import DisturbanceStudy
from lib.optimizations.feedback_mechanisms.guard_study import BROKEN, SOUND, GuardStudy
from lib.optimizations.feedback_mechanisms.live_replay import LiveTrial
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST, Candidate
from lib.optimizations.feedback_mechanisms.scenario_table import LOOP, ROUTED, ScenarioTable
from lib.optimizations.feedback_mechanisms.speculation.drafting import DraftingStudy

CLAIMS = (
    "A static limit misses the objectives for no more seconds than the loop.",
    "Routing the loop's share of the requests to the fast profile, whatever happens, misses no more seconds than the "
    "loop.",
    "The loop swings: late in a disturbance its limit goes back and forth by a tenth of itself or more per decision.",
    "The guard takes back a sound profile in more than one of a hundred windows.",
    "The guard keeps a broken profile in more than one of a hundred windows.",
    "A drafted answer differs from the greedy one.",
)
NEEDED = "net saving of the fast candidate in the hardest script, guard charged, against what that requires"
SERVED = "broken profile taken back while it served a load step, share of the scripts, simulated"
MOST_MISSED, LEAST_CAUGHT, MOST_FALSE = 0.20, 0.99, 0.01
MOST_SWING = 0.1  # in ln(limit) per decision (`scenarios.swing`)
Answer = tuple[bool | None, str]  # whether refuted (None: undecided), and the evidence
CONFIDENCE = 0.90  # of a share's two-sided interval, so that each end alone holds at 95 %


def targets(compared: ScenarioTable, live: LiveTrial, guards: GuardStudy, laws: pd.DataFrame) -> list[Row]:
    """Return a row per target: the measured value, and whether the target was reached, or why that is undecided."""
    false_rollbacks = None if guards.alone else guards.taken_back(SOUND)
    goals: tuple[tuple[str, float | None, str, float], ...] = (
        ("seconds missed, loop ÷ static, guard charged, simulated", compared.ratio, "at most", MOST_MISSED),
        ("broken profile taken back, share of windows", guards.taken_back(BROKEN), "at least", LEAST_CAUGHT),
        ("false rollbacks, share of quiet windows", false_rollbacks, "at most", MOST_FALSE),
        ("least share of drafted tokens equal to greedy", float(laws["same tokens"].min()), "at least", 1.0),
    )
    reasons = (_not_judged(live), _uninformative(guards, BROKEN), _uninformative(guards, SOUND), None)
    rows: list[Row] = [
        {"figure": name, "measured": value, "to reach": f"{how} {goal}", "reached": why or is_reached(value, how, goal)}
        for (name, value, how, goal), why in zip(goals, reasons)
    ]
    served: Row = {"figure": SERVED, "measured": compared.caught, "to reach": f"at least {LEAST_CAUGHT}"}
    undecided = NO_FAST if compared.alone else _not_judged(live)
    served["reached"] = undecided or is_reached(compared.caught, "at least", LEAST_CAUGHT)
    return [rows[0], _needed(compared), rows[1], served, *rows[2:]]


def _needed(compared: ScenarioTable) -> Row:
    """Return the row on what limits the seconds missed: the net saving that a server needs to keep up in the hardest
    script, against the fast candidate's net saving at the lengths of that script.
    """
    net, needed = compared.hardest
    measured = None if net is None else net.middle
    goal = "more than any profile saves" if needed is None else f"at least {needed:.2f}"
    reached: bool | str = "no candidate was timed"
    if net is not None:
        reached = needed is not None and net.low >= needed
        reached = "cannot tell" if needed is not None and net.low < needed <= net.high else reached
    return {"figure": NEEDED, "measured": measured, "to reach": goal, "reached": reached}


def _not_judged(live: LiveTrial) -> str | None:
    """Return why simulated results are not judged; None if they are."""
    return f"not judged: {live.strays.forbids}" if live.strays.forbids else None


def refutations(
    disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial, guards: GuardStudy, laws: pd.DataFrame
) -> list[tuple[str, bool | None, str]]:
    """Return (claim, whether refuted or None if undecided, evidence) for each of `CLAIMS`.

    The first three rest on the simulation, so they are undecided if simulated results are not judged.
    """
    forbidden = _not_judged(live)

    def simulated(answer: Answer) -> Answer:
        return (None, f"{forbidden}; {answer[1]}") if forbidden else answer

    answers = [
        simulated(_missed(disturbances, compared, compared.static)),
        (None, NO_FAST) if compared.alone else simulated(_missed(disturbances, compared, ROUTED)),
        simulated(_swinging(disturbances, compared)),
        _share(guards, SOUND),
        _share(guards, BROKEN),
        _differing(laws),
    ]
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def _missed(disturbances: DisturbanceStudy, compared: ScenarioTable, rival: str) -> Answer:
    """Return the answer from the seconds that a rival misses more than the loop, per scenario without pooling."""
    setup, ends = disturbances.setup, []
    settings = disturbances.settings(compared.best) | {compared.static: experiment.static(compared.best)}
    names = _disturbed(disturbances)
    for name in names:
        arms = [
            [float(setup.ran(script, arm, settings[arm])["missed s"] or 0.0) for script in disturbances.named(name)]
            for arm in (rival, LOOP)
        ]
        ends.append(paired_stats.median_interval([other - loop for other, loop in zip(*arms)]))
    intervals = "; ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in zip(names, ends))
    refuted = True if all(high <= 0 for _, high in ends) else False if all(low > 0 for low, _ in ends) else None
    return refuted, f"seconds saved by the loop in a simulated script of each scenario: {intervals}"


def _swinging(disturbances: DisturbanceStudy, compared: ScenarioTable) -> Answer:
    """Return the answer from the swing of the limit late in a disturbance: it swings if any scenario shows it.

    The evidence also gives the share of reversing moves, which says little about a limit that seldom moves.
    """
    loop, ends, reversing = disturbances.settings(compared.best)[LOOP], [], []
    names = _disturbed(disturbances)
    for name in names:
        runs = [disturbances.setup.ran(script, LOOP, loop) for script in disturbances.named(name)]
        swings = [swing for run in runs if (swing := run["swing"]) is not None]
        ends.append(paired_stats.median_interval(swings) if swings else (-np.inf, np.inf))
        reversals, moves = (sum(run[key] or 0.0 for run in runs) for key in ("reversals", "moves"))
        reversing.append(f"{reversals:.0f} of {moves:.0f}")
    intervals = "; ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in zip(names, ends))
    evidence = f"swing of the limit per decision, late in a simulated script of each scenario: {intervals}; "
    evidence += f"moves that reverse the previous one: {', '.join(reversing)}"
    swings_somewhere = any(low >= MOST_SWING for low, _ in ends)
    return True if swings_somewhere else False if all(high < MOST_SWING for _, high in ends) else None, evidence


def _disturbed(disturbances: DisturbanceStudy) -> list[str]:
    return [name for name in disturbances.names if name != "quiet"]


def _share(guards: GuardStudy, profile: str) -> Answer:
    """Return the answer from the share of windows in which the guard is wrong about a profile, with its exact binomial
    interval. Undecided if the sound profile is the full one, which loses nothing and so proves nothing.
    """
    if guards.alone and profile == SOUND:
        return None, NO_FAST
    rolled_back = guards.alarms(profile)
    wrong = rolled_back if profile == SOUND else guards.windows - rolled_back
    low, high = stats.binomtest(wrong, guards.windows).proportion_ci(CONFIDENCE, "exact")
    evidence = f"{wrong} of {guards.windows} windows ({low:.4f} to {high:.4f})"
    if reason := _uninformative(guards, profile):
        return None, f"{evidence}, but {reason}"
    return True if low > MOST_FALSE else False if high <= MOST_FALSE else None, evidence


def _uninformative(guards: GuardStudy, profile: str) -> str | None:
    """Return why windows of a profile say nothing about the guard, or None if they do.

    They say nothing if there is no fast profile, the sound one loses more than the bound, or the broken one less.
    """
    if guards.alone and profile == SOUND:
        return NO_FAST
    excess, word = guards.excess(profile), "sound" if profile == SOUND else "broken"
    if (excess > 0) == (profile == SOUND):
        return f"this profile's loss lies {signed(excess, '.3f')} from the bound, so it is not {word}"
    return None


def _differing(laws: pd.DataFrame) -> Answer:
    """Return the answer from the drafted answers that differ from the greedy ones; answers without drafts are plain."""
    drafted, same = int(laws["drafted answers"].sum()), int(laws["same answers"].sum())
    if not drafted:
        return None, "nothing was drafted"
    evidence = f"{drafted - same} of {drafted} answers in which tokens were drafted differ, all laws together"
    return drafted > same, evidence


def details(
    disturbances: DisturbanceStudy, compared: ScenarioTable, live: LiveTrial, drafts: DraftingStudy, guards: GuardStudy,
    candidates: Sequence[Candidate], reached: Sequence[Row],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the record's details: name → value, provenance and source, plus axes for the impact curve."""
    by, in_turn = "simulated on this run's step times", "perf_counter, laws taking turns"
    axes = {"x": "tokens drafted at a time", "y": "speed against plain decoding, ×"}
    entries: dict[str, tuple[Any, str, str]] = {
        "impact": (drafts.curve(), "measured", in_turn),
        "fast_profiles": (
            profile_candidates.candidate_rows(candidates),
            "measured",
            "text and items of the split search",
        ),
        "scripts": ([script.trace.describe() for script in disturbances.scripts], "derived", "seeds and phases"),
        "settings": (compared.shown, "estimated", by),
        "static_limits": (compared.tried, "estimated", f"{by}, scripts of other seeds"),
        "simulation": (live.rows, "measured", "against the replays"),
        "slowness": ([list(pair) for pair in live.slowness], "measured", "first static replay, decode steps by table"),
        "live_missed_seconds": (list(live.missed), "measured", "static, loop; real model, means of the rounds"),
        "speculation": (drafts.laws.to_dict("records"), "measured", in_turn),
        "guard": (guards.rows, "estimated", guards.source),
        "figures": (list(reached), "estimated", by),
    }
    labels = ("value", "provenance", "source")
    return {name: dict(zip(labels, entry)) | (axes if name == "impact" else {}) for name, entry in entries.items()}
