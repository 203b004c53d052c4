"""Verdicts and their sentences: a gain never hides a loss, and nothing is claimed beyond the findings."""

import math
import re

import numpy as np
import pytest

from lib.measure.metrics import measurement
from lib.measure.quality import noninferiority
from lib.report.records import record
from lib.report.records.verdicts import in_words
from lib.report.records.verdicts.verdict import judge
from lib.report.text import brief, sentence
from tests.report import samples


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [("better", "better"), ("worse", "worse"), ("equivalent", "equivalent"), ("inconclusive", "inconclusive")],
)
def test_a_dimension_takes_the_verdict_of_its_primary(verdict, expected):
    members = [samples.timed("prefill_tokens_per_second", 1.2, verdict=verdict)]
    assert judge(members).performance == expected
    assert judge([samples.timed("decode_tokens_per_second", 1.2), *members]).performance == expected  # with a gain


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("maintained", "maintained"), ("better", "better"), ("not_maintained", "not_maintained"),
        ("inconclusive", "inconclusive"), ("not_exercised", "not_exercised"), ("informative", "inconclusive"),
    ],
)  # fmt: skip
def test_accuracy_takes_the_verdict_of_its_primary(verdict, expected):
    assert judge([samples.scored("f1_macro", 0.9, 0.9, verdict)]).accuracy == expected
    assert judge([]).accuracy == judge([]).performance == "unavailable"


def test_the_sentence_names_the_metrics_behind_each_dimension():
    verdict = samples.run(accuracy="not_maintained").verdict
    assert verdict.accuracy == "not_maintained"
    assert verdict.sentence == (
        "Prefill 31 % faster, decode undecided, F1 4.1 points lower, peak memory 7.0 % smaller, "
        "compute per prefill token 28 % lower."
    )  # the energy estimate does not count


def test_bound_and_margin_are_those_of_the_verdict():
    chance = np.random.default_rng(0)
    replicates = chance.normal(-0.041, 0.01, 2000)
    options = {"n": 400, "to_wrong": 24, "to_right": 8, "source": "400 items", "margin": 0.03}
    score = noninferiority.score("f1_macro", "classify", 0.91, 0.869, replicates, **options)
    low = math.floor(np.quantile(replicates, 0.05) * 1000) / 10
    assert sentence.score(score) == ("−4.1 points", [f"lower bound −{abs(low):.1f}", "margin 3"])
    losses = chance.normal(3.7, 0.2, 40)
    text = noninferiority.perplexity(losses, losses + chance.normal(0.05, 0.01, 40), source="40 windows", margin=0.04)
    assert re.fullmatch(r"upper bound \+5\.\d\d %, margin 4 %", ", ".join(sentence.score(text)[1]))


def test_slowdowns_are_stated_without_a_reciprocal():
    assert "Prefill 20 % slower" in samples.run(speed="worse", ratio=0.8).verdict.sentence


def test_losses_outside_the_headlines_are_stated():
    measurements = [*samples.measurements(), samples.timed("latency_p99_ms", 1.5, verdict="worse", workload="serve")]
    assert judge(measurements).sentence.endswith("But latency p99 50 % longer.")


def test_a_broken_model_shows_no_gain():
    broken = [m for m in samples.measurements() if m.metric != "f1_macro"]
    broken.append(measurement.invalid("f1_macro", "classify", "it answers every prompt with one repeated token (3)"))
    run = record.build("x", "m", "proxy", "quick", {}, broken)
    assert run.verdict.accuracy == run.verdict.performance == run.verdict.efficiency == "invalid"
    assert "faster" not in run.verdict.sentence
    assert "one repeated token" in run.verdict.sentence
    withheld = [m for m in run.measurements if m.dimension in ("performance", "efficiency")]
    assert withheld and all(m.optimized is None and m.ratio is None for m in withheld)


def test_failed_and_not_applicable_claim_nothing():
    assert judge([], "failed", "cell 4: MemoryError").sentence == "Failed, so nothing is claimed: cell 4: MemoryError."
    assert judge([], "not_applicable", "no experts").sentence == "Not applicable: no experts."
    assert judge([], "failed", "x\ny" * 400).sentence.count("\n") == 0


def test_missing_values_are_stated_with_their_reason():
    measurements = [measurement.unavailable("f1_macro", "classify", "random weights have no quality to lose")]
    assert "Accuracy unavailable: random weights have no quality to lose." in judge(measurements).sentence


@pytest.mark.parametrize("seed", range(60))
def test_any_record_gets_a_sentence(seed):
    run = samples.by_chance(seed)
    text = run.verdict.sentence
    assert text.endswith(".") and text[0] == text[0].upper()
    assert not re.search(r"\bnan\b|\binf\b|None|\(\)", text)
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(text))
    assert in_words.of_record(run) == text


def test_a_busy_machine_is_reported():
    floor = samples.timed("prefill_tokens_per_second", 1.2, verdict="better")
    busy = floor.model_copy(update={"noise_floor": 0.2, "reason": "the copies differ by 20 %"})
    run = record.build("x", "m", "proxy", "quick", {}, [busy])
    assert run.verdict.sentence.startswith("Prefill undecided.") and "The machine was busy" in run.verdict.sentence
    preview = record.build("x", "m", "proxy", "preview", {}, [busy])
    assert "The run was too short: nothing timed is judged." in preview.verdict.sentence
    assert in_words.of_record(preview) == preview.verdict.sentence


def test_unchanged_answers_do_not_hide_differing_ones():
    source = "same answers, 16 items; key-value retrieval"
    same = samples.scored("retrieval_exact_match", 0.75, 0.75, "inconclusive").model_copy(
        update={"source": source, "ci": None, "n": 16}
    )
    served = [
        measurement.informative("same_answers", workload, 1.0, share, "165 requests", n=165)
        for workload, share in (("serve, real model", 94 / 165), ("generate, n-gram", 1.0))
    ]
    assert judge([same]).sentence.startswith("16 answers unchanged.")
    text = "16 answers unchanged, 71 of 165 others differ (serve, real model)"
    assert judge([same, *served]).sentence.startswith(text)


def test_a_record_without_primaries_gets_a_sentence():
    run = samples.run()
    old = run.model_copy(update={"verdict": run.verdict.model_copy(update={"carried_by": {}, "losses": []})})
    assert in_words.of_record(old).startswith("Prefill 31 % faster, decode undecided, perplexity maintained")


def test_an_undecided_verdict_has_a_reason():
    wide = samples.timed("prefill_tokens_per_second", 1.05, 0.08, "inconclusive")
    verdict = judge([wide.model_copy(update={"margin": 0.02})])
    assert verdict.reasons["performance"].startswith("the interval includes zero difference")
    assert verdict.sentence.startswith("Prefill undecided.")


def test_gain_inverts_times_so_that_higher_is_better():
    low, middle, high = 0.73, 0.76, 0.79
    timed = samples.timed("time_to_first_token_ms", middle, 0.03)
    assert sentence.gain(timed) == pytest.approx((1 / middle, 1 / high, 1 / low))
