"""How to read a figure: exactly two sentences, whatever the numbers are."""

import pandas as pd
import pytest

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement
from lib.report import tables
from lib.report.text import brief, reading
from tests.report import samples


@pytest.mark.parametrize(
    "text",
    [
        "It is faster.", "The ratio is 1.31×.", "Prefill takes 1.31 s, e.g. with a cache.", "Is it faster?",
        "qwen3-4b-instruct-2507 stands at 0.5 (0.4–0.6).",
        "The best of them (i.e. the first) is at 2.",
        "It stands still!", "Faster than by chance (0.5 vs. 0.4).",
        "This is called “fast.”", "The curve of Fig. 2 falls.",
        "One half, ca. 0.5, is left.",
    ],
)  # fmt: skip
def test_a_single_sentence_is_accepted(text):
    assert reading.two(text, text) == f"{text} {text}"


@pytest.mark.parametrize(
    "text",
    ["", ".", "  .", "No full stop", "The ratio is 1.31", "One. Two.", "One? Two.", "One.  ", "It ends. (Or not)",
     "It is 1.31×. It is faster", "Two sentences, e.g. this. And that."],
)  # fmt: skip
def test_zero_or_several_sentences_are_refused(text):
    for pair in ((text, "It is faster."), ("It is faster.", text)):
        with pytest.raises(ValueError, match="not one sentence"):
            reading.two(*pair)


@pytest.mark.parametrize("seed", range(6))
def test_a_forest_of_any_record_gets_a_reading(seed):
    assert reading.forest(tables.tidy(samples.by_chance(seed))).endswith(".")


def test_a_forest_names_its_largest_change():
    whole = tables.tidy(samples.run())
    assert reading.forest(whole).endswith("The largest change is weights in memory at 1.39×; above 1 is better.")
    timed = whole[whole["metric"] == "prefill_tokens_per_second"]
    assert reading.forest(timed) == (
        "1 of 1 ratio differs from 1 by more than the noise and the margin. "
        "The largest change is prefill rate at 1.310× (1.280–1.340); above 1 is better."
    )
    assert "No ratio" in reading.forest(tables.tidy([]))
    slower = timed.assign(gain=[0.62], gain_low=[0.61], gain_high=[0.63], label=["decode rate"], verdict=["worse"])
    both = pd.concat([timed.assign(gain=[1.4]), slower])
    assert "largest change is decode rate at 0.620×" in reading.forest(both), "0.62 is a factor of 1.61"


def test_the_reading_includes_a_bound_if_there_is_one():
    rows = [("prefill", "baseline", 34.0, 12.0), ("decode", "optimized", 26.0, None), ("decode", "baseline", 9.0, 8.0)]
    frame = pd.DataFrame(rows, columns=["workload", "arm", "time", "bound"])
    text = reading.bound(frame)
    assert "baseline arm of decode takes 1.12× as long" in text and "baseline arm of prefill 2.83×" in text
    assert "prefill" not in reading.bound(frame[2:])
    assert "No bound" in reading.bound(frame[1:2]) == reading.bound(frame[:0])


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.1, 0.2, "the choice matters"), (0.45, 0.6, "overlap, so"), (0.8, 0.9, "the other arm does better"),
     (None, None, "Without both intervals")],
)  # fmt: skip
def test_controls_are_distinguished_only_by_intervals(low, high, says):
    rows = [("ours", 0.5, low, high), ("by chance", 0.55, 0.5, 0.6), ("uniform", 0.9, 0.8, 1.0)]
    assert says in reading.controls(pd.DataFrame(rows, columns=["arm", "value", "low", "high"]), "ours")


def test_controls_need_another_arm():
    frame = pd.DataFrame([("ours", 0.5, 0.4, 0.6)], columns=["arm", "value", "low", "high"])
    assert "nothing to compare" in reading.controls(frame, "ours") and "nothing" in reading.controls(frame, "theirs")


CURVES = pd.DataFrame(
    [
        (20.0, 0.01, 0.005, 0.02, "pruned"),
        (40.0, 0.268, 0.2, 0.3, "pruned"),  # cannot reach 60
        (20.0, 0.02, 0.01, 0.03, "whitened"),
        (40.0, 0.31, 0.25, 0.4, "whitened"),
        (60.0, 0.9, 0.8, 1.0, "whitened"),
        (20.0, 0.4, 0.3, 0.5, "plain"),
        (40.0, 1.5, 1.4, 1.6, "plain"),
        (60.0, 4.45, 4.0, 5.0, "plain"),
    ],
    columns=["strength", "value", "low", "high", "arm"],
)


def test_curves_are_compared_where_all_have_a_point():
    assert reading.curves(CURVES, "bytes removed, %") == (
        "At 40 (bytes removed, %), the largest shared by all, pruned is best with 0.268, whitened next with 0.310 and "
        "plain last with 1.50. "
        "The intervals of pruned and whitened overlap, so this run does not tell these two apart."
    )
    told = reading.curves(CURVES[CURVES.arm != "whitened"], "bytes removed, %")
    assert told.endswith(
        "pruned is best with 0.268 and plain next with 1.50. The intervals of pruned and plain do not overlap."
    )
    faster = reading.curves(CURVES, "bytes removed, %", lower_is_better=False)
    assert "plain is best with 1.50, whitened next with 0.310 and pruned last with 0.268." in faster
    bare = reading.curves(CURVES.drop(columns=["low", "high"]), "bytes removed, %")
    assert bare.endswith("Without intervals this run does not tell pruned and whitened apart.")


def test_a_shared_measurement_is_not_compared_with_itself():
    """Factors of equal ranks are timed once: the run was said not to distinguish them, and the next was not named."""
    twin = CURVES[CURVES.arm == "pruned"].assign(arm="refined")
    told = reading.curves(pd.concat([CURVES, twin]), "bytes removed, %")
    assert "pruned, the same as refined, is best with 0.268" in told and "whitened next with 0.310" in told
    assert told.endswith("The intervals of pruned and whitened overlap, so this run does not tell these two apart.")
    alone = reading.curves(pd.concat([CURVES[CURVES.arm == "pruned"], twin]), "bytes removed, %")
    assert "the same as" not in alone and "pruned is best with 0.268 and refined next with 0.268." in alone


@pytest.mark.parametrize("x", ["decoder bytes removed, %", "weights set to zero, %", "prompt, tokens"])
@pytest.mark.parametrize("more", ["", ", least squares", ", least squares, on text"])
def test_a_comparison_of_curves_is_shortened_to_fit_a_sentence(x, more):
    text = reading.curves(CURVES.assign(arm=CURVES.arm + more), x)
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(text)), text
    assert f"pruned{more} is best with 0.268" in text and f"whitened{more} next with 0.310" in text
    assert ("plain last with 1.50" in text) is (not more)


def test_the_strongest_end_of_the_axis_may_be_the_smallest():
    rows = [(0.3547, 0.04, "found"), (0.749, 0.01, "found"), (0.3553, 0.07, "window"), (0.7488, 0.02, "window")]
    frame = pd.DataFrame(rows, columns=["strength", "value", "arm"])
    text = reading.curves(frame, "density", strongest="smallest")
    assert "(density), the smallest shared by all, found is best with 0.0400 and window next" in text
    apart = frame.assign(strength=[0.2, 0.4, 0.5, 0.9])
    assert "no point in common" in reading.curves(apart, "density")


def test_a_single_curve_is_described_by_its_ends():
    frame = pd.DataFrame([(1024, 1.1, "prefill"), (128, 1.3, "prefill")], columns=["strength", "value", "arm"])
    assert reading.curves(frame, "prompt, tokens") == (
        "The curve of prefill goes from 1.30 at 128 to 1.10 at 1024 (prompt, tokens). "
        "It is the only curve, so there is nothing to compare it with."
    )
    assert "is one point, 1.10 at 1024 (" in reading.curves(frame[:1], "prompt, tokens")
    assert "no curve" in reading.curves(frame[:0], "share")


def test_controls_name_the_compared_group():
    frame = pd.DataFrame([("ours", 0.5, 0.4, 0.6), ("size", 0.9, 0.8, 1.0)], columns=["arm", "value", "low", "high"])
    text = reading.controls(frame, "ours", "the choices without the text")
    assert text.startswith("ours reaches 0.500, the best of the choices without the text (size) 0.900; lower")


def test_a_score_that_fell_to_zero_is_the_largest_change():
    """Previously it was neither drawn nor counted nor named."""
    lost = samples.scored("retrieval_exact_match", 0.95, 0.0, "not_maintained", workload="retrieval")
    text = reading.forest(tables.tidy([samples.timed("prefill_tokens_per_second", 1.3), lost]))
    assert text.startswith("2 of 2 ratios differ from 1")
    assert "largest change is key-value retrieval" in text and "it fell to 0" in text


def test_a_comparison_that_timed_nothing_has_a_reading():
    """Of a degenerate model, or with `--dimension accuracy`, the frame of no bounds has no columns: the run failed."""
    untimed = Compared([measurement.invalid("prefill_tokens_per_second", "prefill", "it repeats one token")])
    assert reading.bound(pd.DataFrame(untimed.bounds())).startswith("No bound could be computed.")
