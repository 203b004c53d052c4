"""The loops on planted plants: a clock of their own, steps whose times are known, answers whose faults are known."""

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.measure import scenarios, shadow
from lib.measure.latency import Objectives
from lib.measure.serving import Limits
from lib.measure.steptimes import COLUMN_STEP, StepTimes
from lib.measure.traffic import Lengths
from lib.models.speculation import Round
from lib.optimizations import feedback_mechanisms as feedback
from lib.optimizations.adaptive_batch_sizes import Fixed

LENGTHS = Lengths(32, 16)
LIMITS = Limits(rows=32)


def times() -> StepTimes:
    """A machine whose decode step takes 4 ms and 0.5 ms per row, and whose prompts take 0.05 ms per token."""
    table = tuple((0.004 + 0.0005 * rows,) * (4096 // COLUMN_STEP) for rows in range(1, 33))
    return StepTimes(table, (0.0005, 5e-5, 0.0), (0.0, 0.0), (0.97, 1.0, 1.03), (0.97, 1.0, 1.03), 1.0, 1)


OBJECTIVES = Objectives(0.4, 0.012)


def script(seconds=60.0, seed=0):
    return {one.name: one for one in scenarios.script(times(), OBJECTIVES, LENGTHS, seconds, seed)}


def test_seconds_beyond_counts_the_disturbed_seconds_alone():
    stolen = script()["stolen core"]
    _, batch = times().capacity(LENGTHS, OBJECTIVES.token_seconds)
    played = scenarios.play(stolen, Fixed(batch), times(), LIMITS).served
    bad = [start for start, _, good in scenarios.windows(played, OBJECTIVES) if good is not None and good < 0.9]
    assert scenarios.seconds_beyond(played, OBJECTIVES) == pytest.approx(len(bad) * 1.0)
    quiet = scenarios.play(script()["quiet"], Fixed(batch), times(), LIMITS).served
    assert scenarios.seconds_beyond(quiet, OBJECTIVES) <= 1.0


@pytest.mark.parametrize("law", [feedback.PI, feedback.Aimd])
@pytest.mark.parametrize("name", ["quiet", "load step", "longer prompts", "stolen core"])
def test_the_loop_stays_within_the_objective_once_settled(law, name):
    loop = feedback.LatencyLoop(law(), OBJECTIVES)
    played = scenarios.play(script()[name], loop, times(), LIMITS).served
    assert not played.saturated
    signals = np.array([signal for _, _, signal in loop.course])
    assert np.mean(signals > OBJECTIVES.token_seconds) < 0.25
    assert loop.course and 1 <= loop.limit <= 32


def test_the_limit_does_not_wind_up_in_calm_hours():
    calm = scenarios.Scenario(scenarios.make("calm", [scenarios.Phase(30.0, 2.0, LENGTHS)], 0))
    loop = feedback.LatencyLoop(feedback.PI(), OBJECTIVES)
    scenarios.play(calm, loop, times(), LIMITS)
    assert loop.limit <= feedback.START_ROWS  # two requests a second leave plenty of room under it


def test_pi_in_velocity_form_removes_a_constant_error():
    law, level = feedback.PI(), 0.0
    for _ in range(300):
        level += law.move(1.5 - level)
    assert level == pytest.approx(1.5, abs=0.01)


def play_rounds(law, acceptance, rounds, draft=0.2, check=1.0, seed=0):
    """Rounds of one long answer in which every drafted token is accepted with a probability of its own."""
    random, done = np.random.default_rng(seed), []
    for _ in range(rounds):
        count = law(done)
        accepted = int(np.cumprod(random.random(count) < acceptance).sum())
        done.append(Round(count, accepted, draft * count, check + 0.02 * count))
    return done


def tokens_per_second(rounds):
    return sum(one.accepted + 1 for one in rounds) / sum(one.seconds for one in rounds)


@pytest.mark.parametrize("acceptance", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("make", [feedback.DraftLength, feedback.Bandit])
def test_draft_lengths_come_near_the_best_static_one(make, acceptance):
    found = tokens_per_second(play_rounds(make(), acceptance, 600)[100:])
    static = [tokens_per_second(play_rounds(feedback.fixed(count), acceptance, 600)) for count in range(9)]
    assert found > 0.9 * max(static)


def test_the_draft_length_follows_a_change_of_text():
    law, done = feedback.DraftLength(), []
    random = np.random.default_rng(1)
    for at in range(800):
        acceptance = 0.95 if at < 400 else 0.1
        count = law(done)
        accepted = int(np.cumprod(random.random(count) < acceptance).sum())
        done.append(Round(count, accepted, 0.2 * count, 1.0))
    assert np.mean([count for count, _ in law.course[300:400]]) > 4
    assert np.mean([count for count, _ in law.course[700:]]) < 1


def guard(**options):
    return feedback.Guard(**({"usual": 0.05, "margin": 0.1, "share": 0.5, "cool_down": 10.0} | options))


def test_a_broken_profile_is_taken_back_and_tried_again_ever_later():
    watch, random, second = guard(), np.random.default_rng(2), 0.0
    while watch.breaches < 3 and second < 1000:
        second += 1.0
        watch.ready(second)
        if watch.wants():
            watch.add(second, float(random.random() < 0.9))
    back = [when for when, what in watch.events if what == "rolled back"]
    again = [when for when, what in watch.events if what == "tried again"]
    assert len(back) == 3 and len(again) == 2
    assert again[0] - back[0] >= 10 and again[1] - back[1] >= 20


def test_a_quiet_profile_is_left_alone():
    random, false = np.random.default_rng(3), 0
    for seed in range(300):
        watch = guard(seed=seed, share=1.0)
        for second in range(100):
            watch.add(second, float(random.beta(0.5, 9.5)))
        false += watch.breaches
    assert false <= 300 * feedback.FALSE_ALARM + 3


def test_the_shadowed_share_is_kept():
    watch = guard(share=0.25)
    assert 0.2 < np.mean([watch.wants() for _ in range(2000)]) < 0.3


def test_disagreement_is_zero_for_the_baselines_own_answer_and_large_for_another(tiny, name):
    from lib.models import speculation

    model = tiny(name)
    prompt_T = torch.randint(8, 96, (12,), generator=torch.Generator().manual_seed(1))
    own, _ = speculation.generate(model, model, prompt_T, 12, feedback.fixed(0))
    assert shadow.disagreement(model, prompt_T, own) == 0
    assert shadow.disagreement(model, prompt_T, (own + 1) % 96) > 0.5


@pytest.mark.parametrize("knob", [{"setpoint": 0.0}, {"setpoint": 1.2}, {"shadow_share": 0.0}, {"quality_margin": 0.9}])
def test_knobs_out_of_range_are_refused(knob):
    with pytest.raises(UserError, match=rf"feedback_mechanisms: {next(iter(knob))} .*; expected a value in"):
        feedback.check(**knob)
