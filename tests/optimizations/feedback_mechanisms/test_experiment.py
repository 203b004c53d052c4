"""The protocol on a planted machine: what would refute it is decided by the numbers, and figures are read in two
sentences.
"""

from types import SimpleNamespace

import pandas as pd
import pytest

from lib.measure.serving.protocol import Limits
from lib.measure.serving.slo import Objectives
from lib.measure.serving.step_times import COLUMN_STEP, StepTimes
from lib.optimizations.feedback_mechanisms import experiment, guard_study, live_replay, outcome
from lib.optimizations.feedback_mechanisms.disturbance_comparison import TwoProfileSetup
from lib.optimizations.feedback_mechanisms.guard_study import ANOTHER_DOMAIN, BROKEN, SOUND, GuardStudy
from lib.report.text import reading

OBJECTIVES = Objectives(0.4, 0.012)


def times(factor=1.0):
    table = tuple(((0.004 + 0.0005 * rows) / factor,) * (4096 // COLUMN_STEP) for rows in range(1, 33))
    return StepTimes(table, (0.0005 / factor, 5e-5 / factor, 0.0), (0.0, 0.0), (0.97, 1.0, 1.03), (1.0,), 1.0, 1)


@pytest.fixture(scope="module")
def disturbances():
    setup = TwoProfileSetup((times(), times(1.8)), OBJECTIVES, Limits(32, patience_seconds=0.3), 12.0, None, 0.25)
    return experiment.study(setup, 0.8, "quick", 0)


@pytest.fixture(scope="module")
def live():
    headline = SimpleNamespace(workload="serve, real time, static 8")
    return SimpleNamespace(carried=lambda measurement: measurement, headline=headline)


def test_neither_setting_is_replayed_before_the_other_more_often(monkeypatch):
    """In real time what ran before matters: by turns alone the static setting came first in two rounds of six."""
    served, static = [], []

    class Done(Exception):
        pass

    def slowness(run, times):
        static.append(run)
        if len(static) == live_replay.ROUNDS["quick"]:
            raise Done

    def serve(models, trace, policy, *rest):
        served.append((trace.seed, policy))
        return len(served) - 1

    monkeypatch.setattr(live_replay, "serve_stolen", serve)
    monkeypatch.setattr(live_replay, "slowness", slowness)
    monkeypatch.setattr(live_replay.engine, "prompts", lambda *arguments: None)
    monkeypatch.setattr(live_replay.energy_source, "counter", lambda device: None)
    setup, loaded = SimpleNamespace(alone=True, rate=1.0, times=(None,)), SimpleNamespace(model=None, device="cpu")
    policies = (lambda scenario: "static"), (lambda scenario: "loop")
    with pytest.raises(Done):
        live_replay.compare(loaded, None, setup, *policies, size=8, effort="quick", seconds=9.0, seed=0)
    loop = {seed: at for at, (seed, policy) in enumerate(served) if policy == "loop"}
    assert len(served) == 18 and len(loop) == 6
    assert sum(at < loop[served[at][0]] for at in static) == 3


def test_the_loop_against_one_static_limit(disturbances, live, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", (8, 32))
    compared = experiment.compare(disturbances)
    assert compared.best in (8, 32)
    assert set(compared.sums) >= {compared.static, "oracle", experiment.LOOP, experiment.ROUTED, experiment.FAST_ALONE}
    reading.two(*experiment.read_trade_off(compared))
    refuted, evidence = outcome._missed(disturbances, compared, compared.static)
    assert refuted is not True and "stolen core" in evidence
    assert outcome._swinging(disturbances, compared)[0] is False
    results = [
        item
        for item in experiment.comparison(disturbances, compared, live)
        if item.metric == "goodput_requests_per_second"
    ]
    # A measurement per scenario, six seeds each, the same baseline in all of them.
    assert [item.workload for item in results] == [
        f"serve, simulated, {name}, {compared.static}" for name in disturbances.names
    ]
    assert disturbances.names[0] == "quiet" and {item.n for item in results} == {6}
    shares = {row["setting"]: row["fast share"] for row in compared.rows if row["scenario"] == "load step"}
    assert shares[experiment.ROUTED] == pytest.approx(shares[experiment.LOOP], abs=0.05)
    assert any(float(str(row["shadow s"])) > 0 for row in compared.rows if row["setting"] == experiment.LOOP)


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


def test_a_stream_is_read_in_two_sentences_and_drawn_in_two_panels():
    study = GuardStudy(0.15, 0.5, 20.0, {SOUND: [0.0, 0.1], BROKEN: [0.9, 1.0]}, 0.001, 2, 10, 0)
    watched = guard_study.scripted_stream(study)
    assert watched.first("rolled back", study.seconds / 3) is not None
    reading.two(*guard_study.read_stream(study, watched))
    assert [label for _, label, *_ in guard_study.stream_panels(study, watched)] == ["disagreement", "fast in use"]


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
