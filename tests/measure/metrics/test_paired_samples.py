"""Paired samples are judged in the right direction, by noise floor, margin and number of pairs."""

from dataclasses import replace

import pytest

from lib.measure.metrics import paired_samples
from lib.measure.metrics.pairs import Pairs, join

pytestmark = pytest.mark.usefixtures("one_process_is_like_another")


def pairs(ratio: float, blocks: int = 12) -> Pairs:
    """Blocks in which the optimized arm takes `ratio` times as long, with slight variation."""
    base = [0.1 * (1 + 0.001 * i) for i in range(blocks)]
    uneven = [ratio * (1 + 0.001 * (i % 3 - 1)) for i in range(blocks)]
    return Pairs(base, [t * u for t, u in zip(base, uneven)], ["AB", "BA"] * (blocks // 2), [None] * blocks, 1)


def test_rates_and_latencies_are_derived_from_the_same_times():
    rate = paired_samples.from_pairs("prefill_tokens_per_second", "prefill", pairs(0.8), 256, 0.01)
    time = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs(0.8), 1, 0.01)
    assert rate.verdict == time.verdict == "better"
    assert rate.ratio == pytest.approx(1.25, rel=1e-3) and time.ratio == pytest.approx(0.8, rel=1e-3)
    assert time.baseline == pytest.approx(100, rel=0.01) and rate.baseline == pytest.approx(2560, rel=0.01)
    assert rate.ci[0] < rate.ratio < rate.ci[1] and rate.n == 12 and rate.provenance == "measured"
    per_token = paired_samples.from_pairs("time_per_output_token_ms", "decode", pairs(1.5), 10, pairs(1.0))
    assert per_token.verdict == "worse" and per_token.baseline == pytest.approx(10, rel=0.01)


def test_the_source_states_the_range_of_calls_per_turn_over_processes():
    parts = [replace(pairs(0.8, 2), iterations=calls) for calls in (4, 3, 6)]
    assert join(parts).describe().startswith("6 balanced AB/BA blocks in 3 fresh processes, 3 to 6 calls each")
    assert ", 4 calls each" in join(parts[:1] * 3).describe()


def test_the_noise_floor_and_the_margin_both_withhold_a_verdict():
    assert paired_samples.from_pairs("load_seconds", "load", pairs(0.5), 1, 0.01).verdict == "informative"
    small = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs(0.99), 1, 0.001)
    assert small.verdict == "equivalent"
    noisy = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs(0.9), 1, 0.2)
    assert noisy.verdict == "inconclusive"
    uncontrolled = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs(0.9), 1, None)
    assert uncontrolled.verdict == "informative" and "A/A" in uncontrolled.reason


def test_a_floor_above_ten_percent_withholds_any_speed_claim():
    busy = paired_samples.from_pairs("decode_tokens_per_second", "decode", pairs(0.4), 1, 0.48)
    assert busy.verdict == "inconclusive" and busy.ratio == pytest.approx(2.5, rel=0.01)
    assert "48 %" in busy.reason and "above 10 %" in busy.reason and "load " in busy.reason
    quiet = paired_samples.from_pairs("decode_tokens_per_second", "decode", pairs(0.4), 1, 0.09)
    assert quiet.verdict == "better" and quiet.reason is None


def test_few_processes_that_disagree_give_no_verdict_however_many_blocks():
    process = [number // 12 for number in range(36)]
    seconds = [0.1] * 36
    wild = [0.1 / (2.0, 2.6, 1.7)[number] for number in process]
    copy = Pairs(seconds, [0.1 * (1 + 0.001 * (i % 3)) for i in range(36)], ["AB"] * 36, [None] * 36, 1,
                 process=process)  # fmt: skip
    timed = Pairs(seconds, wild, ["AB"] * 36, [None] * 36, 1, process=process)
    rate = paired_samples.from_pairs("decode_tokens_per_second", "decode", timed, 1, copy)
    assert rate.ci[0] > 1 and rate.ci[1] > 2 * rate.ci[0] and rate.processes == 3
    assert rate.verdict == "inconclusive" and "3 processes" in rate.reason
    assert paired_samples.judge_again(rate).verdict == "inconclusive"


def test_too_few_control_pairs_give_no_floor_and_no_verdict():
    few = pairs(1.0, 4)
    for floor in (few, few.floor(0.0)):
        rate = paired_samples.from_pairs("decode_tokens_per_second", "decode", pairs(0.5), 1, floor)
        assert rate.verdict == "informative" and rate.noise_floor is None
        assert "the control's pairs are too few" in rate.reason
    short = paired_samples.from_pairs("decode_tokens_per_second", "decode", few, 1, few)
    assert short.verdict == "informative" and short.ci is None and "4 pairs are too few" in short.reason


def test_many_samples_are_stored_as_group_means_equally_per_process():
    count = 3 * 40
    seconds = [1.0 + 0.001 * (i % 7) for i in range(count)]
    pairs = Pairs(
        seconds, seconds, ["AB", "BA"] * (count // 2), [None] * count, 1, process=[i // 40 for i in range(count)]
    )
    kept = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs, 1, pairs)
    assert kept.n == count and len(kept.samples["baseline"]) == 60
    assert kept.samples["baseline"][0] == pytest.approx(1000 * (seconds[0] + seconds[1]) / 2)
    few = paired_samples.from_pairs(
        "time_to_first_token_ms", "prefill", Pairs([1.0] * 6, [1.0] * 6, ["AB"] * 6, [None] * 6, 1), 1, 0.0
    )
    assert len(few.samples["baseline"]) == 6


@pytest.mark.parametrize("count", [71, 79, 121])
def test_sample_counts_without_a_divisor_are_grouped_too(count):
    base = [1.0 + 0.01 * (at % 7) for at in range(count)]
    rate = paired_samples.from_samples("prefill_tokens_per_second", "prefill", base, base, source="test", floor=0.01)
    kept = rate.samples["baseline"]
    assert paired_samples.MOST_SAMPLES // 2 < len(kept) <= paired_samples.MOST_SAMPLES
    assert sum(kept) / len(kept) == pytest.approx(sum(base) / count, rel=0.005)
