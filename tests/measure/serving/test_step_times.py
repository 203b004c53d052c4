"""Step times are means, even of skewed calls, in tables, fits and draws; resampled calls give other times."""

from dataclasses import replace

import numpy as np
import pytest

from lib.measure.serving.step_times import Calls, assembled
from lib.measure.serving.traffic import Lengths


def calls(decode=lambda b, c: 0.01 + 1e-3 * b, ratios=(1.0,), read=lambda n, t: 1e-4 * n * t):
    points = [(count, context) for count in (1, 4, 8) for context in (32, 128, 512)]
    return Calls(
        {point: [decode(*point) * ratio for ratio in ratios] for point in points},
        {(n, t): [read(n, t) * ratio for ratio in ratios] for n in (1, 4) for t in (32, 128, 512)},
        {1e5: [1e-4 * ratio for ratio in ratios], 1e6: [1e-3 * ratio for ratio in ratios]},
        10.0,
    )


def test_tables_and_draws_keep_the_mean_of_skewed_calls():
    # Nine of ten calls take 1, one stalls: the mean is 1.36 times the median.
    skewed = assembled(calls(ratios=(1.0,) * 9 + (4.6,)))
    plain = assembled(calls())
    assert skewed.decode(4, 128) == pytest.approx(1.36 * plain.decode(4, 128))
    assert skewed.prefill(1, 128) == pytest.approx(1.36 * plain.prefill(1, 128), rel=0.01)
    assert np.mean(skewed.decode_ratios) == pytest.approx(1) and np.mean(skewed.prefill_ratios) == pytest.approx(1)
    lengths = Lengths(64, 32)
    assert skewed.capacity(lengths, 1.0, 8)[0] == pytest.approx(plain.capacity(lengths, 1.0, 8)[0] / 1.36, rel=0.02)


def test_a_slow_spell_at_one_point_does_not_distort_the_table():
    spell = calls(ratios=(1.0, 1.0, 1.0))
    spell.decoded[4, 128][0] *= 30
    times, plain = assembled(spell), assembled(calls())
    bent = times.decode(4, 128) / plain.decode(4, 128)
    assert bent == pytest.approx(times.decode(8, 512) / plain.decode(8, 512)) and bent == pytest.approx(2.07, rel=0.01)


def test_resampled_calls_give_other_times_with_the_same_mean():
    times = assembled(calls(ratios=(0.7, 0.9, 1.0, 1.1, 1.3)))
    drawn = [times.resampled(seed).decode(4, 128) for seed in range(40)]
    assert times.resampled(3) == times.resampled(3) != times.resampled(4)
    assert 0.02 < np.std(drawn) / np.mean(drawn) < 0.3
    assert np.mean(drawn) == pytest.approx(times.decode(4, 128), rel=0.08)


def test_times_without_calls_are_returned_unchanged():
    times = replace(assembled(calls()), calls=None)
    assert times.resampled(1) is times and times.of_rounds([0]) is times and times.rounds == 1


def test_a_slow_round_is_in_every_point_or_in_none():
    slow = assembled(calls(ratios=(2.0, 1.0, 1.0)))
    plain = assembled(calls())
    assert slow.rounds == 3
    for chosen, factor in (([0, 0, 0], 2.0), ([1, 2, 1], 1.0)):
        drawn = slow.of_rounds(chosen)
        assert drawn.decode(4, 128) == pytest.approx(factor * plain.decode(4, 128))
        assert drawn.prefill(1, 128) == pytest.approx(factor * plain.prefill(1, 128))
        assert drawn.move(1e6) == pytest.approx(factor * plain.move(1e6))


def test_chunks_of_a_prompt_cost_a_call_each_and_attend_to_earlier_tokens():
    times = assembled(calls(read=lambda n, t: 2e-3 + 1e-4 * n * t + 1e-7 * n * t**2))
    whole = times.prefill(1, 512)
    parts = sum(times.part(done, 128) for done in range(0, 512, 128))
    assert times.part(0, 128) == pytest.approx(times.prefill(1, 128), rel=0.02)
    assert parts == pytest.approx(whole + 3 * 2e-3, rel=0.05)
    assert times.part(384, 128) > times.part(0, 128)


def test_prefill_times_equal_the_measured_ones_and_use_the_edges_beyond():
    # A core whose caches hold short prompts: tokens beyond 300 take 1.5 times as long.
    read = {(n, t): [n * t * (1.5e-4 if t > 300 else 1e-4)] * 2 for n in (1, 4) for t in (32, 128, 320, 600)}
    del read[4, 600]
    decoded = {(count, context): [0.01] for count in (1, 4) for context in (32, 600)}
    times = assembled(Calls(decoded, read, {1.0: [1e-4]}, 1.0))
    for (n, t), seconds in read.items():
        assert times.prefill(n, t) == pytest.approx(seconds[0], rel=0.01)
    for n, t in ((4, 600), (8, 600), (2, 32), (3, 600)):
        assert times.prefill(n, t) == pytest.approx(n * t * (1.5e-4 if t > 300 else 1e-4), rel=0.15)
