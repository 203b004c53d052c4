"""An answer says refuted only if the run shows it, and always with the number."""

import pytest

from lib.measure.metrics import measurement
from lib.report import tables
from lib.report.records import record, refutation, rows
from lib.report.text import sentence
from tests.report import samples

CLAIM = "Prefill is not faster than the baseline."


@pytest.mark.parametrize(("refuted", "outcome"), [(True, "refuted"), (False, "not refuted"), (None, "cannot tell")])
def test_three_outcomes(refuted, outcome):
    assert refutation.decide(CLAIM, refuted, "1.31×").outcome == outcome


def test_an_answer_needs_its_number():
    with pytest.raises(ValueError, match="evidence"):
        refutation.decide(CLAIM, True, "")


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [("better", "not refuted"), ("worse", "refuted"), ("equivalent", "refuted"), ("inconclusive", "cannot tell")],
)
def test_a_verdict_is_an_answer(verdict, outcome):
    answer = refutation.by_verdict(CLAIM, samples.timed("prefill_tokens_per_second", 1.31, verdict=verdict))
    assert answer.outcome == outcome
    assert answer.evidence == f"prefill rate [prefill] 1.310× (1.280–1.340), {verdict}"


def test_an_open_answer_names_the_gate_that_held():
    unsure = samples.timed("prefill_tokens_per_second", 1.31, verdict="inconclusive")
    busy = unsure.model_copy(update={"reason": "a noise floor of 12 % is above 10 %", "noise_floor": 0.12})
    assert refutation.by_verdict(CLAIM, busy).evidence.endswith("inconclusive: a noise floor of 12 % is above 10 %")


def test_a_score_interval_is_clipped_to_possible_scores():
    few = measurement.informative("accuracy", "retrieval", 0.05, 0.0, "planted", ratio=0.0)
    few = few.model_copy(update={"ci": (-0.56, 2.5), "verdict": "inconclusive"})
    assert sentence.ends(few) == (0.0, 2.5) and sentence.change(few)[1] == pytest.approx(-5.0)
    assert sentence.ends(few.model_copy(update={"baseline": 0.8})) == (0.0, 1.25)
    assert rows.row(few)["95 % interval"].startswith("0.0")


def test_an_unmeasured_claim_cannot_tell_and_says_why():
    missing = measurement.unavailable("prefill_tokens_per_second", "prefill", "the clock stood still")
    assert refutation.by_verdict(CLAIM, missing) == refutation.decide(CLAIM, None, "the clock stood still")
    assert refutation.by_verdict(CLAIM, None).evidence == "not measured"


def test_a_gain_over_a_baseline_of_zero_counts_as_measured():
    score = measurement.judged(
        "retrieval_exact_match", "generate", baseline=0.0, optimized=0.5, ratio=None, ci=(0.4, 0.6), n=160,
        verdict="better", provenance="measured", source="160 values", margin=0.02, bound=0.42,
    )  # fmt: skip
    answer = refutation.by_verdict(CLAIM, score)
    assert answer.outcome == "not refuted" and answer.evidence.endswith("[generate] 0 → 0.500, better")
    open_one = score.model_copy(update={"verdict": "inconclusive", "reason": "160 values are too few"})
    assert refutation.by_verdict(CLAIM, open_one) == refutation.decide(CLAIM, None, "160 values are too few")


def test_every_claim_needs_its_answer_in_order():
    answers = [refutation.decide(claim, None, "not measured") for claim in ("a", "b")]
    frame = tables.refutations(answers, ("a", "b"))
    assert list(frame.columns) == list(refutation.COLUMNS) and list(frame["answer"]) == ["? cannot tell"] * 2
    for claims in (("b", "a"), ("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match="answer"):
            tables.refutations(answers, claims)


def test_answers_survive_their_file(tmp_path):
    answers = [refutation.decide(CLAIM, False, "1.31×")]
    run = record.build("x", "m", "proxy", "quick", {}, refutations=answers)
    assert record.read(record.write(run, tmp_path / "x--m.json")).refutations == answers


def test_the_answers_of_all_records_list_refuted_ones_first():
    run = samples.run()
    run.refutations.append(refutation.decide("It breaks.", True, "broken 3×"))
    frame = tables.answers([run, samples.without_result("failed", "cell 3")])
    assert [answer.partition(" ")[2] for answer in frame.answer] == ["refuted", "cannot tell", "not refuted"]
    assert list(frame.columns[:3]) == ["optimization", "model", "what would refute it"]
    assert tables.answers([]).empty
