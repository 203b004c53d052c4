"""The protocol on a planted machine: the numbers decide what is refuted, and figures are described in two sentences."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lib.measure.metrics.digits import signed
from lib.measure.serving import replay, slo, validation
from lib.measure.serving.protocol import Limits
from lib.measure.serving.replaying.rounds import Replayed
from lib.measure.serving.simulator import SimulatedEngine
from lib.measure.serving.slo import Objectives
from lib.measure.serving.step_times import COLUMN_STEP, Calls, StepTimes, assembled
from lib.measure.serving.validation import SimulationError
from lib.models.structure.anatomy import anatomy
from lib.models.structure.sharing import sharing
from lib.optimizations.feedback_mechanisms import candidates as profile_candidates
from lib.optimizations.feedback_mechanisms import (
    disturbance_comparison,
    experiment,
    guard_study,
    live_replay,
    outcome,
    profiles,
    scenarios,
)
from lib.optimizations.feedback_mechanisms.disturbance_comparison import TwoProfileSetup
from lib.optimizations.feedback_mechanisms.guard_study import ANOTHER_DOMAIN, BROKEN, SOUND, GuardStudy
from lib.optimizations.feedback_mechanisms.guarding import net_saving
from lib.optimizations.feedback_mechanisms.guarding.net_saving import NetSaving
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST, Candidate
from lib.optimizations.feedback_mechanisms.scenario_table import (
    BANDIT_LOOP,
    FAST_ALONE,
    LOOP,
    PI_LOOP,
    ROUTED,
    ScenarioTable,
)
from lib.report.text import brief, reading

OBJECTIVES = Objectives(0.4, 0.012)


def times(factor=1.0):
    table = tuple(((0.004 + 0.0005 * rows) / factor,) * (4096 // COLUMN_STEP) for rows in range(1, 33))
    return StepTimes(table, (0.0005 / factor, 5e-5 / factor, 0.0), (0.0, 0.0), (0.97, 1.0, 1.03), (1.0,), 1.0, 1)


@pytest.fixture(scope="module")
def disturbances():
    setup = TwoProfileSetup((times(), times(1.8)), OBJECTIVES, Limits(32, patience_seconds=0.3), 12.0, 0.25)
    return experiment.study(setup, 0.8, "quick", 0)


@pytest.fixture(scope="module")
def live():
    headline = SimpleNamespace(workload="serve, real time, static 8")
    return SimpleNamespace(carried=lambda measurement: measurement, headline=headline)


class Wandering(SimulatedEngine):
    """Serves on a drifting machine: its speed depends on how much work was done before, by any server."""

    work = 0

    def __init__(self, *_):
        super().__init__(times(), jitter=False)
        self.output = {}

    def _wandered(self, seconds):
        Wandering.work += 1
        return seconds * (1.8 if Wandering.work // 400 % 2 else 1.0)

    def prefill(self, requests):
        self.output |= {request.id: [0] for request in requests}
        return self._wandered(super().prefill(requests))

    def decode(self):
        return self._wandered(super().decode())


def test_a_slow_spell_affects_all_settings_of_a_round(monkeypatch):
    """Replayed one after the other, two runs of one setting differed by a fifth or more, and no verdict was left."""
    monkeypatch.setattr(live_replay, "ModelEngine", Wandering)
    monkeypatch.setattr(live_replay.replay, "warm_up", lambda *_: None)
    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(live_replay, "Spinner", lambda: contextlib.nullcontext(idle))
    # Thinking takes no time: on a busy machine, one policy's would be charged to its server.
    still = SimpleNamespace(perf_counter=lambda: 0.0, thread_time=lambda: 0.0, process_time=lambda: 0.0)
    monkeypatch.setattr(live_replay.turns, "time", still)
    same = times()
    setup = TwoProfileSetup((same, same), OBJECTIVES, Limits(32, patience_seconds=0.3), 12.0)
    for trace in live_replay.traces(setup.rate, 4.0, "quick", 0)[:3]:
        policies = {name: experiment.static(16)(None) for name in (live_replay.STATIC, live_replay.AGAIN)}
        runs = live_replay.serve_stolen((None,), trace, policies, setup, None)
        shares = [slo.goodput_share(run.served, OBJECTIVES) for run in runs.values()]
        steps = [sum(step.seconds for step in run.served.steps) for run in runs.values()]
        assert abs(shares[0] - shares[1]) < 0.05 and steps[0] == pytest.approx(steps[1], rel=0.05)


def test_a_loop_that_never_moved_is_distinguished_from_one_that_did():
    """In short replays the limit often never moves: the arms then differ by chance."""
    second = [(float(at), 16.0, 0.01) for at in range(4)]
    still = SimpleNamespace(course=second, changes=[])
    assert not live_replay.moved(still) and not live_replay.moved(SimpleNamespace())
    assert live_replay.moved(SimpleNamespace(course=[*second, (4.0, 12.0, 0.02)], changes=[]))
    assert live_replay.moved(SimpleNamespace(course=second, changes=[(1.0, 1)]))


def test_each_replay_is_simulated_with_its_own_slowness():
    """Replays in real time meet the machine one after the other. With the static replay's slowness, a loop that did
    nothing deviated by a fifth from a machine that was slower in its turn, and no simulated claim was judged.
    """
    same = times()
    setup = TwoProfileSetup((same, same), OBJECTIVES, Limits(32, patience_seconds=0.3), 12.0)
    live = live_replay.traces(setup.rate, 2.0, "quick", 0)
    makers = {name: experiment.static(16) for name in (live_replay.STATIC, live_replay.LOOP)}
    runs = {}
    for name, slow in ((live_replay.STATIC, 1.0), (live_replay.LOOP, 1.6)):
        played = [setup.play(scenarios.Scenario(each, ((0.0, slow),)), makers[name](None)).served for each in live]
        runs[name] = [live_replay.Stolen(Replayed(served, {}, 1.0, None), {}) for served in played]
    factors, simulated = live_replay.simulations(setup, live, runs, makers)
    assert all(factor == pytest.approx(1.0, abs=0.05) for each in factors for _, factor in each)
    real = {name: [run.served for run in each] for name, each in runs.items()}
    rows = {(row["policy"], row["quantity"]): row for row in validation.compare(simulated, real, OBJECTIVES)}
    for name in real:
        assert rows[name, "time per output token"]["error"] < 0.05, name
        assert rows[name, "latency p50"]["error"] < 0.05, name


def test_stretched_replays_are_judged_for_every_draw_of_arrivals():
    """With only as many requests as needed on average, one build in two had too few."""
    for rate in (20.0, 30.0, 46.0):
        for seed in range(40):
            live = live_replay.traces(rate, 1.0, "quick", 17 * seed)
            counted = [sum(request.arrival >= trace.warm_up for request in trace.requests) for trace in live]
            assert sum(counted) / len(counted) >= replay.LEAST_COUNTED, (rate, seed)
    assert max(trace.seconds for trace in live) < 1.5, "no longer than is needed"


def test_the_loop_against_one_static_limit(disturbances, live, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    compared = experiment.compare(disturbances)
    assert compared.best in (8, 32)
    assert set(compared.sums) >= {compared.static, "oracle", LOOP, ROUTED, FAST_ALONE, BANDIT_LOOP}
    assert 0 < compared.sums[BANDIT_LOOP]["fast share"] < 1, "it tries both profiles"
    reading.two(*compared.reading())
    assert all(brief.count(text) <= brief.MOST_WORDS for text in compared.reading())
    refuted, evidence = outcome._missed(disturbances, compared, compared.static)
    assert refuted is not True and "stolen core" in evidence
    assert outcome._swinging(disturbances, compared)[0] is False
    # The chosen limit is one of those tried, with both figures of each.
    assert [row["taken"] for row in compared.tried if row["static limit"] == compared.best] == ["yes"]
    assert {"seconds missed", "goodput share"} < set(compared.tried[0]) and len(compared.tried) == 2
    assert "limit alone" in compared.finding and not compared.alone
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(compared.finding)), compared.finding
    results = [
        item
        for item in experiment.comparison(disturbances, compared, live)
        if item.metric == "goodput_requests_per_second"
    ]
    # One measurement per scenario, six seeds each, the same baseline in all of them.
    assert [item.workload for item in results] == [
        f"serve, simulated, {name}, {compared.static}" for name in disturbances.names
    ]
    assert disturbances.names[0] == "quiet" and {item.n for item in results} == {6}
    shares = {row["setting"]: row["fast share"] for row in compared.rows if row["scenario"] == "load step"}
    assert shares[ROUTED] == pytest.approx(shares[LOOP], abs=0.05)
    assert any(float(str(row["shadow s"])) > 0 for row in compared.rows if row["setting"] == LOOP)


@pytest.mark.parametrize("saving", [1.8, 0.9])
def test_the_oracle_misses_no_more_than_either_profile_alone(saving):
    """An oracle would not choose a fast profile that is slower, nor choose one for a calm third."""
    setup = TwoProfileSetup((times(), times(saving)), OBJECTIVES, Limits(32, patience_seconds=0.3), 6.0, 0.25)
    study = experiment.study(setup, 0.8, "preview", 0)
    settings = study.settings(16) | {"static 16": experiment.static(16)}
    for script in study.scripts[:8]:
        oracle, fast, static = (
            setup.ran(script, name, settings[name])["missed s"] for name in ("oracle", FAST_ALONE, "static 16")
        )
        assert oracle <= min(fast, static)


def test_the_table_shows_a_broken_profile_being_rolled_back(disturbances, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    compared = experiment.compare(disturbances)
    rows = {row["setting"]: row for row in compared.broken}
    assert set(rows) == {compared.static, LOOP, PI_LOOP, FAST_ALONE}
    assert compared.shown[-len(rows) :] == compared.broken
    assert compared.sums == replace(compared, broken=[]).sums  # they count only for the guard
    assert rows[LOOP]["taken back"] == compared.caught == 1.0 and rows[LOOP]["rolled back after s"] > 0
    unwatched = next(
        row["fast share"] for row in compared.rows if (row["scenario"], row["setting"]) == ("load step", LOOP)
    )
    assert 0 < rows[LOOP]["broken answers"] < 0.5 * unwatched and rows[compared.static]["broken answers"] == 0
    assert all(row["rollbacks"] == 0 for row in compared.rows)
    [target] = [
        row for row in outcome.targets(compared, trial(), guards(1.0, 0.5), LAWS) if row["figure"] == outcome.SERVED
    ]
    assert target["reached"] is True
    [untold] = [
        row for row in outcome.targets(compared, trial(0.13), guards(1.0, 0.5), LAWS) if row["figure"] == outcome.SERVED
    ]
    assert str(untold["reached"]).startswith("not judged: ")


def test_a_broken_profile_without_answers_is_neither_rolled_back_nor_kept(disturbances):
    """A script that the full profile survives alone used to count as a failure of the guard."""
    setup = replace(disturbances.setup, kept={})
    never = {name: experiment.static(32) for name in (LOOP, FAST_ALONE)}
    rows = disturbance_comparison.compare(setup, disturbances.broken, never)
    assert all(row["broken answers"] == 0 and row["taken back"] is None for row in rows)
    compared = ScenarioTable([], 32, broken=rows)
    assert compared.caught is None


def test_settings_are_compared_where_both_have_a_value(disturbances):
    """The loop also settled in the hard scenario, so its mean over two scenarios was compared with the static limit's
    easy one: it looked slower for having settled.
    """
    static, loop = "static 8", "loop"
    rows = [
        {"scenario": scenario, "setting": setting, "settled s": value}
        for scenario, values in (("easy", (2.0, 1.0)), ("hard", (None, 5.0)))
        for setting, value in zip((static, loop), values)
    ]
    keys = ("missed s", "goodput share", "overshoot", "reversals")
    rows = [dict.fromkeys(keys, 1.0) | row for row in rows]
    found = disturbance_comparison.measurements(disturbances.setup, rows, static, loop, "serve")
    [settling] = [item for item in found if item.metric == "settling_seconds"]
    assert (settling.baseline, settling.optimized, settling.ratio) == (2.0, 1.0, 0.5)
    assert "mean of 1 scenario, " in settling.source and "in 1 of 2 scenarios a setting has no such" in settling.source


def test_a_seed_that_never_settles_is_counted(disturbances, monkeypatch):
    seconds = iter([0.1, 0.1, None, None, None, None])
    keys = dict.fromkeys(disturbance_comparison.KEYS, 1.0)
    monkeypatch.setattr(disturbance_comparison, "_ran", lambda *_: keys | {"settled s": next(seconds)})
    scripts = disturbances.named("load step")
    [row] = disturbance_comparison.compare(disturbances.setup, scripts, {"planted": lambda _: None})
    assert row["settled s"] is None and (row["never settled"], row["seeds"]) == (4, 6)


def test_choosing_and_judging_use_different_seeds(disturbances):
    seeds = [{script.trace.seed for script in part} for part in (disturbances.scripts, disturbances.choosing)]
    assert len(seeds[0]) == 6 and not seeds[0] & seeds[1]


def guards(caught, loss, windows=300):
    rows = [{"profile": name, "taken back": caught} for name in (SOUND, BROKEN)]
    pools = {SOUND: [loss], BROKEN: [loss], ANOTHER_DOMAIN: [loss]}
    return GuardStudy(0.2, 0.25, 10.0, pools, 0.001, 24, windows, 0, rows)


@pytest.mark.parametrize(
    "profile, caught, loss, refuted",
    [
        (SOUND, 0.0, 0.1, False),
        (SOUND, 0.1, 0.1, True),
        (SOUND, 0.01, 0.1, None),
        (SOUND, 0.0, 0.5, None),  # not sound at all
        (BROKEN, 1.0, 0.5, False),
        (BROKEN, 0.5, 0.5, True),
        (BROKEN, 0.5, 0.1, None),  # not broken at all
    ],
)
def test_the_guard_is_refuted_by_the_interval_of_its_windows(profile, caught, loss, refuted):
    decided, evidence = outcome._share(guards(caught, loss), profile)
    assert decided is refuted and "of 300 windows" in evidence


def test_a_stream_is_described_in_two_sentences_and_drawn_in_two_panels():
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0)
    watched = guard_study.scripted_stream(study)
    assert watched.first("rolled back", study.seconds / 3) is not None
    reading.two(*guard_study.read_stream(study, watched))
    assert [label for _, label, *_ in guard_study.stream_panels(study, watched)] == ["disagreement", "fast in use"]
    # The dashed line is what the guard allows, not a latency objective.
    assert guard_study.stream_panels(study, watched)[0][3:] == (study.bound, "bound of the guard")


def test_windows_become_measurements():
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0)
    study.rows.extend(guard_study._watch_windows(study))
    frame = pd.DataFrame(study.rows).set_index("profile")
    assert frame["taken back"][SOUND] == 0 and frame["taken back"][BROKEN] == 1
    names = [item.metric for item in guard_study.measurements(study)]
    assert names == [
        "profile_disagreement",
        "false_rollback_share",
        "quality_estimate_error",
        "fault_detection_seconds",
    ]


def test_a_fault_shows_later_where_the_fast_profile_answers_less():
    """Only its own answers are read again: at half the share a fault takes twice as long to show."""
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0, fast_share=1.0)
    study.rows.extend(guard_study._watch_windows(study))
    found = [guard_study.measurements(replace(study, fast_share=share))[-1] for share in (1.0, 0.5, 0.0)]
    assert {item.metric for item in found} == {"fault_detection_seconds"}
    assert found[1].optimized == pytest.approx(2 * found[0].optimized) and "50 % of them" in found[1].source
    assert found[2].verdict == "unavailable" and "answers nothing" in found[2].reason


def test_the_stated_delay_is_that_of_a_fault_after_a_clean_start():
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0)
    study.rows.extend(guard_study._watch_windows(study))
    row = study._row(BROKEN)
    assert row[guard_study.AFTERWARDS] > row[guard_study.FROM_START]  # the test has to unlearn that it is sound
    delay = guard_study.measurements(study)[-1]
    in_groups = net_saving.AT_ONCE * math.ceil(row[guard_study.AFTERWARDS] / net_saving.AT_ONCE)
    assert delay.optimized == pytest.approx(in_groups / (0.1 * 20.0))
    early = row[guard_study.FROM_START] / (0.5 * 20.0)
    assert f"{early:.3g} s if it is broken from the start" in delay.source and "0.1 of those reread" in delay.source
    assert "8 at a time" in delay.source
    assert study.guard().later == pytest.approx(0.1) and study._row(SOUND)[guard_study.AFTERWARDS] is None


# --- without a fast profile -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    same = times()
    setup = TwoProfileSetup((same, same), OBJECTIVES, Limits(32, patience_seconds=0.3), 12.0, 0.25)
    return experiment.study(setup, 0.8, "quick", 0)


def trial(error=0.05):
    strays = SimulationError(error, "goodput share, loop")
    headline = SimpleNamespace(workload="serve, real time, static 8")
    return SimpleNamespace(carried=lambda measurement: measurement, headline=headline, strays=strays)


LAWS = pd.DataFrame({"law": ["plain", "n-gram"], "drafted answers": [0, 12], "same answers": [0, 12]}).assign(
    **{"same tokens": 1.0}
)


def test_nothing_is_claimed_about_a_missing_fast_profile(alone, monkeypatch):
    """Routing, oracle and fast profile would equal the static limit: a claim about them would pass by definition."""
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    compared = experiment.compare(alone)
    assert compared.alone and set(compared.sums) == {compared.static, LOOP, PI_LOOP}
    empty = replace(guards(0.0, 0.0), alone=True)
    told = {claim: (refuted, why) for claim, refuted, why in outcome.refutations(alone, compared, trial(), empty, LAWS)}
    assert told[outcome.CLAIMS[1]] == told[outcome.CLAIMS[3]] == (None, NO_FAST)
    assert told[outcome.CLAIMS[5]][0] is False
    assert outcome.refutations(alone, compared, trial(0.13), empty, LAWS)[1][2] == NO_FAST
    rows = {row["figure"]: (row["measured"], row["reached"]) for row in outcome.targets(compared, trial(), empty, LAWS)}
    assert rows["false rollbacks, share of quiet windows"] == (None, NO_FAST)
    texts = [*compared.reading(), compared.finding, experiment.points_lost(compared, [])]
    reading.two(*texts[:2])
    assert all(brief.count(text) <= brief.MOST_WORDS for text in texts[:2])
    assert "from its limit" in texts[1] and not any("routing" in text or "oracle" in text.lower() for text in texts)
    assert all("by the fast profile" not in text for text in texts)
    # State what no row limit can keep in time, or the missed target would look like the loop's failure.
    assert set(compared.beyond) == {"load step", "longer prompts", "stolen core"}
    assert compared.beyond["load step"] == pytest.approx(1 / scenarios.BUSY)
    assert "comes from its limit; no limit keeps 90 % in time at the peak of: load step (87 %)" in texts[1]
    assert "Requests in time against it: " in compared.finding
    assert NO_FAST in compared.caption and profile_candidates.read_curves(alone.setup) == f"One curve: {NO_FAST}."
    assert set(profile_candidates.step_curves(alone.setup).arm) == {"full", "objective"}


@pytest.mark.parametrize(("caught", "loss", "broken", "sound"), [(0.0, 0.1, None, True), (1.0, 0.5, True, None)])
def test_a_guard_target_needs_a_profile_that_deserves_its_label(caught, loss, broken, sound):
    """If the bound is above the broken profile's loss, keeping it is right: the target counted as missed all the same,
    and the claim beside it could not be decided.
    """
    compared = SimpleNamespace(ratio=0.1, hardest=(None, None), caught=None, alone=True)
    rows = {row["figure"]: row["reached"] for row in outcome.targets(compared, trial(), guards(caught, loss), LAWS)}
    reached = rows["broken profile taken back, share of windows"], rows["false rollbacks, share of quiet windows"]
    for told, expected, word in zip(reached, (broken, sound), ("broken", "sound")):
        if expected is None:
            assert told == f"this profile's loss lies {signed(loss - 0.2, '.3f')} from the bound, so it is not {word}"
        else:
            assert told is expected


def test_a_guard_without_a_fast_profile_measures_no_sound_profile():
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.0], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0, alone=True)
    study.rows.extend(guard_study._watch_windows(study))
    verdicts = {item.metric: (item.verdict, item.reason) for item in guard_study.measurements(study)}
    for metric in ("profile_disagreement", "false_rollback_share", "quality_estimate_error"):
        assert verdicts[metric] == ("unavailable", NO_FAST)
    assert verdicts["fault_detection_seconds"][0] == "informative"
    assert NO_FAST in study.caption and NO_FAST in study.shadow_cost and "charged" not in study.shadow_cost


def test_a_simulation_that_deviates_too_far_answers_no_claim(disturbances, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    compared = experiment.compare(disturbances)
    arguments = disturbances, compared, trial(0.13), guards(1.0, 0.5), LAWS
    for claim, refuted, evidence in outcome.refutations(*arguments)[:3]:
        assert refuted is None and "13.0 % (goodput share, loop)" in evidence and "limit 10 %" in evidence, claim
    [missed] = [
        row for row in outcome.targets(compared, trial(0.13), guards(1.0, 0.5), LAWS) if "missed" in row["figure"]
    ]
    assert str(missed["reached"]).startswith("not judged: ")
    assert outcome.refutations(disturbances, compared, trial(0.05), guards(1.0, 0.5), LAWS)[0][1] is not None


def test_the_loop_swings_if_one_scenario_shows_it(disturbances, monkeypatch):
    """A quiet script has hardly a move: with it included, the share of the others could not be determined."""
    compared = SimpleNamespace(best=8)
    swings = {"quiet": 0.0, "load step": 0.6, "longer prompts": 0.09, "stolen core": 0.0}

    def ran(self, script, setting, make_policy, jitter=0):
        return {"swing": swings[script.name], "reversals": 3.0, "moves": 5.0}

    monkeypatch.setattr(TwoProfileSetup, "ran", ran)
    refuted, evidence = outcome._swinging(disturbances, compared)
    assert refuted is True and "load step 0.600 to 0.600" in evidence and "quiet" not in evidence
    assert "18 of 30" in evidence
    swings["load step"] = 0.09  # most of its few moves reverse, and they are small
    assert outcome._swinging(disturbances, compared)[0] is False
    swings["load step"] = None  # nothing was decided
    assert outcome._swinging(disturbances, compared)[0] is None


def chosen_limit(monkeypatch, missed, shares):
    """The limit chosen if each limit misses the given seconds, seed by seed, and meets the given requests in time."""
    monkeypatch.setattr(experiment, "SIZES", tuple(missed))
    scripts = [SimpleNamespace(trace=SimpleNamespace(seed=seed)) for seed in range(4)]

    def ran(script, setting, make_policy):
        size = int(setting.split()[1])
        return {"missed s": missed[size][script.trace.seed], "goodput share": shares[size]}

    return experiment.choose(SimpleNamespace(setup=SimpleNamespace(ran=ran), choosing=scripts))


def test_the_static_limit_is_chosen_by_the_missed_seconds_that_judge_it(monkeypatch):
    """When chosen by requests in time, it missed more seconds than another limit that was tried."""
    seconds = {4: [20.0, 21.0, 19.0, 20.0], 8: [10.0, 11.0, 9.0, 10.0]}
    best, rows = chosen_limit(monkeypatch, seconds, {4: 0.9, 8: 0.8})
    assert best == 8 and [row["taken"] for row in rows] == ["no", "yes"]
    assert [(row["seconds missed"], row["goodput share"]) for row in rows] == [(20.0, 0.9), (10.0, 0.8)]


@pytest.mark.parametrize("shares, best", [({4: 0.7, 8: 0.8, 16: 0.8}, 8), ({4: 0.795, 8: 0.8, 16: 0.8}, 4)])
def test_requests_in_time_decide_between_limits_that_the_seeds_cannot_separate(monkeypatch, shares, best):
    seconds = {4: [10.5, 9.5, 10.4, 9.7], 8: [10.0, 10.2, 9.9, 10.0], 16: [9.9, 10.1, 10.2, 9.8]}
    chosen, rows = chosen_limit(monkeypatch, seconds, shares)
    assert chosen == best and "no" not in [row["taken"] for row in rows]


def test_a_machine_that_serves_at_most_two_rows_has_a_static_limit_of_two():
    """The grid ended at four: where fewer rows are best, the baseline was not the best static setting."""
    table = tuple((0.004 * (1 if rows <= 2 else rows),) * (4096 // COLUMN_STEP) for rows in range(1, 33))
    steps = StepTimes(table, (0.0005, 5e-5, 0.0), (0.0, 0.0), (0.97, 1.0, 1.03), (1.0,), 1.0, 1)
    setup = TwoProfileSetup((steps, steps), Objectives(0.4, 0.0075), Limits(32, patience_seconds=0.3), 6.0)
    assert experiment.choose(experiment.study(setup, 0.8, "quick", 0))[0] == 2


@pytest.mark.parametrize("saving, share, admitted", [(1 / 1.1, 0.25, False), (1.0, 0.0, False), (1.8, 0.25, True)])
def test_a_profile_that_is_not_faster_after_guard_costs_is_rejected(monkeypatch, saving, share, admitted):
    """A profile that took a tenth longer kept the margins, was admitted and gave most of a load step's answers."""
    both = times(), times(saving)
    timing = disturbance_comparison.step_timing
    monkeypatch.setattr(timing, "measure_together", lambda models, *_, **__: both[: len(models)])
    monkeypatch.setattr(disturbance_comparison.tasks, "text_windows", lambda *_: torch.zeros(4, 8))
    full, fast = object(), object()
    known = [Candidate(name, fast, 0.0, 1.0, 0.0, None) for name in ("whole blocks", "channels")]
    options = {"first_token_factor": 8.0, "token_factor": 3.0, "shadow_share": share, "quality_bound": 0.1, "seed": 0}
    monkeypatch.setattr(profiles, "losses_of", lambda *_: [1.0])
    monkeypatch.setattr(experiment.shadow, "broken", lambda *_: None)
    loaded = SimpleNamespace(model=full)
    measure = profile_candidates.timer(loaded, "preview", **options)
    setup, candidates = profile_candidates.prepare(loaded, known, "preview", measure)
    assert setup.alone is not admitted and (candidates[-1].model is fast) is admitted
    if admitted:
        assert 1.02 < setup.net.low < 1.8 and len(candidates) == 2  # the guard's reading is charged
        return
    assert candidates[-1].model is full and candidates[-1].refused is None
    assert "not shown to be faster, guard charged: " in candidates[1].refused
    assert "Net saving, guard charged: " in profile_candidates.read_curves(setup)
    assert setup.samples == both[0].samples


def test_without_a_faster_candidate_the_one_that_saves_most_is_reported():
    full, slow, slower = object(), object(), object()
    nets = {slow: NetSaving(0.9, 1.0, 1.1), slower: NetSaving(0.7, 0.8, 0.9)}
    known = [Candidate("a", each, 0.0, 1.0, 0.0, nets[each].refused, net=nets[each]) for each in (slow, slower)]
    known.append(profiles.itself(SimpleNamespace(model=full)))
    of_slow = SimpleNamespace(alone=True)
    setup, candidates = profile_candidates.prepare(SimpleNamespace(model=full), known, "preview", {slow: of_slow}.get)
    assert setup is of_slow and candidates == known


@pytest.mark.parametrize("saving, worth", [(1.8, True), (1.2, False)])
def test_a_faster_profile_that_saves_the_loop_no_time_is_rejected(saving, worth, monkeypatch):
    """It was shown to be faster, but in charge it cost more than it saved: a step of both profiles while rows of both
    were running, and answers read again while requests waited.
    """
    net = NetSaving(1.1, 1.15, 1.2)
    objectives, limits = Objectives(0.0232, 0.0135), Limits(32, patience_seconds=0.0203)
    setup = TwoProfileSetup((times(), times(saving)), objectives, limits, 2.25, 0.25, net)
    reason = experiment.not_worth_it(setup, "preview", 0)
    assert (reason is None) is worth
    full, fast = object(), object()
    monkeypatch.setattr(profiles, "losses_of", lambda *_: [1.0])
    monkeypatch.setattr(experiment.shadow, "broken", lambda *_: None)
    loaded, known = SimpleNamespace(model=full), [Candidate("channels", fast, 0.0, 1.0, 0.0, None, net=net)]
    told, candidates = profile_candidates.prepare(loaded, known, "preview", lambda _: setup)
    assert told.alone is not worth and (candidates[-1].model is fast) is worth
    if not worth:
        assert candidates[0].refused == reason and "scripts of other seeds: -" in reason
        assert profile_candidates.read_curves(told) == f"Net saving, guard charged: {net}. One curve: {NO_FAST}."
        again, _ = profile_candidates.prepare(loaded, candidates, "preview", lambda _: setup)
        assert again.alone, "one that was timed before gives no fast profile either"


def test_every_profile_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(disturbance_comparison, "prepare", lambda _, model, **options: timed.append(model) or options)
    measure = profile_candidates.timer(None, "preview", seed=3)
    assert measure("a") is measure("a") and measure("b")["seed"] == 3 and timed == ["a", "b"]


def test_longer_prompts_have_their_own_net_saving():
    """A profile that decodes faster but does not read faster saves less where more is read. Its saving at the usual
    lengths was compared with what the hardest script requires.
    """
    full = times()
    fast = replace(full, decode_BL=times(2.0).decode_BL)
    nets = disturbance_comparison._nets(full, fast, OBJECTIVES, 0.1)
    assert nets["quiet"] == nets["load step"] == nets["stolen core"]
    assert 1 < nets["longer prompts"].middle < nets["quiet"].middle - 0.05
    row = dict.fromkeys(("missed s", "goodput share", "fast share", "overshoot"), 0.0)
    row |= {"setting": LOOP, "required net saving": nets["quiet"].middle - 0.01}
    rows = [row | {"scenario": name} for name in ("load step", "longer prompts")]
    compared = ScenarioTable(rows, 8, net=nets["quiet"], nets=nets)
    assert compared.hardest == (nets["longer prompts"], nets["quiet"].middle - 0.01)
    assert outcome._needed(compared)["reached"] is False and str(nets["longer prompts"]) in compared.caption
    assert outcome._needed(replace(compared, nets={}))["reached"] is True
    rows[0]["required net saving"] = None
    assert compared.hardest == (nets["load step"], None) and outcome._needed(compared)["reached"] is False


def test_a_slow_spell_on_one_of_two_equal_profiles_shows_no_saving():
    """With points resampled one by one, the interval of a spell that lasted a round was a few percent wide."""
    points = [(count, context) for count in (1, 4, 8) for context in (32, 128, 512)]

    def timed(ratios):
        each = [[0.01 * ratio * (1 + 0.001 * at) for at, ratio in enumerate(ratios)]]
        decoded = {point: [value * (1 + 0.1 * point[0]) for value in each[0]] for point in points}
        read = {(n, t): [value * n * t / 100 for value in each[0]] for n in (1, 8) for t in (32, 128, 512)}
        return assembled(Calls(decoded, read, {1e5: each[0], 1e6: each[0]}, 10.0))

    lengths = disturbance_comparison.LENGTHS
    assert net_saving.measured(timed((2.0, 1.0, 1.0)), timed((1.0, 1.0, 1.0)), lengths, 0.1, 8).refused
    assert net_saving.measured(timed((1.5, 1.5, 1.5)), timed((1.0, 1.0, 1.0)), lengths, 0.1, 8).refused is None
    # Resampling three rounds understates their spread by over half: low must be below their least.
    few = net_saving.measured(timed((1.02, 1.11, 1.2)), timed((1.0, 1.0, 1.0)), lengths, 0.0, 8)
    assert few.low < 1.02 < few.middle == pytest.approx(1.11, abs=0.02) and few.refused


def test_a_delay_missing_in_half_of_the_windows_is_not_stated():
    assert guard_study._median([3, 4, 5], 6) is None and guard_study._median([3, 4, 5, 6], 6) == 5.5
    assert guard_study._median([], 4) is None
    study = GuardStudy(0.5, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.5, 0.6]}, 0.001, 2, 10, 0)
    study.rows.extend(guard_study._watch_windows(study))
    delay = guard_study.measurements(study)[-1]
    assert delay.verdict == "unavailable" and "less than half of the windows" in delay.reason


def test_a_missed_target_states_what_would_have_been_needed(disturbances, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    setup = disturbances.setup
    needed = {name: setup.savings(name)["required net saving"] for name in disturbances.names}
    assert needed["quiet"] < 1 < needed["load step"] <= 1.15  # faster steps allow a larger batch too
    assert needed["stolen core"] > 1
    full = times()
    for name in ("load step", "stolen core"):  # a profile that fast keeps up, one a little slower does not
        lengths, rate, slowness = scenarios.demands(full, OBJECTIVES, disturbance_comparison.LENGTHS)[name]
        for factor, enough in ((1.001 * needed[name], True), (0.97 * needed[name], False)):
            capacity = times(factor / slowness).capacity(lengths, OBJECTIVES.token_seconds)[0]
            assert (capacity >= rate) is enough
    net = net_saving.measured(*setup.times, disturbance_comparison.LENGTHS, 0.25, 16)
    compared = replace(experiment.compare(disturbances), net=net)
    [row] = [
        row for row in outcome.targets(compared, trial(), guards(1.0, 0.5), LAWS) if row["figure"] == outcome.NEEDED
    ]
    assert row["measured"] == net.middle < 1.8 and row["to reach"] == f"at least {max(needed.values()):.2f}"
    assert row["reached"] is (net.low >= max(needed.values())) and str(net) in compared.caption
    for low, high, reached in ((0.9, 1.1, True), (-0.1, 0.1, "cannot tell"), (-0.2, -0.1, False)):
        worst = max(needed.values())
        wide = replace(compared, net=net_saving.NetSaving(worst + low, worst + low, worst + high))
        assert outcome._needed(wide)["reached"] == reached


def test_weights_shared_by_two_profiles_are_counted_once(tiny):
    full = tiny("qwen3-4b-instruct-2507")
    fast = sharing(full)
    head = anatomy(fast).blocks[0].feed_forward.module
    name, old = next(iter(head.named_parameters()))
    owner = head.get_submodule(name.rsplit(".", 1)[0])
    owner.weight = torch.nn.Parameter(old[:1].clone())
    weights = {m.metric: m for m in experiment.costs(full, fast, 0.5, 1.0)}["weights_bytes"]
    assert weights.optimized - weights.baseline == old[:1].nbytes > 0
    same = {m.metric: m for m in experiment.costs(full, full, 0.0, 1.0)}["weights_bytes"]
    assert same.optimized == same.baseline == weights.baseline


def test_a_fast_profile_is_judged_with_the_loop_that_runs(monkeypatch):
    """Previously its benefit was simulated with the default setpoint, whatever the run used."""
    asked, net = [], NetSaving(1.1, 1.15, 1.2)
    setup = TwoProfileSetup((times(), times(1.8)), OBJECTIVES, Limits(32, patience_seconds=0.3), 2.0, 0.25, net)
    monkeypatch.setattr(experiment, "not_worth_it", lambda *given: asked.append(given[-1]) or "planted")
    known = [Candidate("channels", object(), 0.0, 1.0, 0.0, None, net=net)]
    profile_candidates.prepare(SimpleNamespace(model=object()), known, "preview", lambda _: setup, 0, 0.5)
    assert asked == [0.5]
