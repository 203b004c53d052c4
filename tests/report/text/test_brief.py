"""Short notation of a change: the metric's own change, no reciprocal, no direction without a verdict."""

import pytest

from lib.measure.metrics import measurement
from lib.report.records.verdicts import in_words
from lib.report.text import brief
from tests.report import samples


@pytest.mark.parametrize(
    ("ratio", "verdict", "metric", "phrase"),
    [
        (1.19, "better", "prefill_tokens_per_second", "prefill 19 % faster"),
        (0.8, "worse", "prefill_tokens_per_second", "prefill 20 % slower"),
        (0.8, "better", "time_to_first_token_ms", "time to first token 20 % shorter"),
        (1.5, "worse", "latency_p99_ms", "latency p99 50 % longer"),
        (1.3, "better", "goodput_requests_per_second", "goodput 30 % higher"),
        (1.02, "inconclusive", "decode_tokens_per_second", "decode undecided"),
        (1.0, "equivalent", "decode_tokens_per_second", "decode unchanged"),
    ],
)
def test_a_speed_is_shown_as_its_own_change(ratio, verdict, metric, phrase):
    assert brief.phrase(samples.timed(metric, ratio, verdict=verdict)) == phrase


def test_amounts_and_scores():
    weights = measurement.counted("weights_bytes", "load", 100.0, 74.0, "bytes")
    assert brief.phrase(weights) == "weights 26 % smaller" and brief.number(weights) == "−26 %"
    assert brief.phrase(samples.scored("f1_macro", 0.91, 0.869, "not_maintained")) == "F1 4.1 points lower"
    assert brief.phrase(samples.scored("f1_macro", 0.91, 0.905, "maintained")) == "F1 maintained"
    assert brief.phrase(samples.scored("perplexity", 41.0, 55.0, "not_maintained")) == "perplexity 34 % higher"
    same = samples.scored("f1_macro", 0.9, 0.9, "maintained").model_copy(
        update={"source": "same answers, 400 items; topic", "ci": None}
    )
    assert brief.phrase(same) == brief.value(same) == "answers unchanged"
    few = same.model_copy(update={"verdict": "inconclusive", "n": 16})
    assert brief.phrase(few) == brief.value(few) == "16 answers unchanged" and brief.outcome(few) == "unchanged"
    assert brief.phrase(measurement.unavailable("f1_macro", "classify", "random weights")) == "F1 not measured"


def test_prompts_the_optimization_never_touched_are_not_called_unchanged():
    same = measurement.judged(
        "f1_macro", "classify", baseline=0.9, optimized=0.9, ratio=1.0, n=48, verdict="not_exercised",
        provenance="measured", source="same answers, 48 items", reason="the optimization never acted on these prompts",
    )  # fmt: skip
    assert brief.value(same) == "not exercised" and brief.phrase(same) == "F1 not exercised"


def test_changes_show_their_interval_and_scores_their_bound():
    assert brief.spread(samples.energy(0.8, 0.77, 0.82, "better")) == "−23.0 to −18.0 %"
    assert brief.spread(samples.timed("prefill_tokens_per_second", 1.31)) == "+28.0 to +34.0 %"
    assert brief.spread(samples.scored("f1_macro", 0.91, 0.869, "not_maintained")) == "lower bound −5.8 points"
    assert brief.spread(samples.scored("perplexity", 41.0, 41.2, "maintained")).endswith(" %")


def test_zero_change_is_called_unchanged_only_if_judged():
    none = samples.timed("decode_tokens_per_second", 1.0)
    assert brief.number(none.model_copy(update={"verdict": "equivalent"})) == "unchanged"
    for verdict in ("inconclusive", "informative"):
        open_one = none.model_copy(update={"verdict": verdict})
        assert brief.number(open_one) == "0 %" and "unchanged" not in brief.value(open_one)
        assert brief.number(samples.timed("decode_tokens_per_second", 0.99998, verdict=verdict)) == "0 %"
    score = samples.scored("f1_macro", 0.9, 0.9, "inconclusive")
    assert brief.number(score) == "0.0 points" and brief.phrase(score) == "F1 undecided"


def test_cut_text_ends_at_a_nearby_clause_with_one_ellipsis():
    reason = "the noise floor of 13.3 % is above 10 %; more rounds or a quieter machine would tell; load 2.2 on 2 cores"
    text = in_words.without_result("Too short, nothing timed is judged", reason)
    assert text.endswith("a quieter machine would tell …") and brief.count(text) <= brief.MOST_WORDS
    assert in_words.without_result("Failed", "it broke") == "Failed: it broke."


def test_no_sentence_exceeds_its_word_limit():
    phrases = [f"metric number {number} is 12 % larger" for number in range(12)]
    text = brief.joined(phrases, "But")
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(text)) and len(brief.split(text)) > 1
    assert all(phrase in text for phrase in phrases) and text.startswith("But metric")
    assert text.count("But ") == 1 and all(part.startswith("And metric") for part in brief.split(text)[1:])
    assert brief.count("prefill 19 % faster, answers unchanged") == 5
    assert brief.clipped("a " * 40, 3) == "a a a …" and brief.clipped("a b") == "a b"
