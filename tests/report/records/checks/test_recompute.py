"""Every stored verdict follows from its stored fields; one that does not is found."""

import numpy as np
import pytest

from lib.measure.metrics import busy, measurement
from lib.measure.quality import answer_comparison, noninferiority
from lib.report.records import record
from lib.report.records.checks import lint, recompute
from tests.measure.quality.test_evaluate import classified
from tests.report import samples


def _scores():
    chance, measurements = np.random.default_rng(3), []
    for n, lost in ((48, 0), (48, 3), (400, 0), (400, 5), (400, 40), (800, 4)):
        base = classified(n, 0.9)
        other = classified(n, 0.9, wrong=lost) if lost else base
        measurements += answer_comparison.compare_classified(base, other)
        measurements += answer_comparison.compare_classified(other, base)
    for loss in (0.0, 0.01, 0.03, 0.2, -0.2):
        losses = chance.normal(4, 0.3, 32)
        changed = losses + loss + chance.normal(0, 0.02, 32)
        measurements.append(noninferiority.perplexity(losses, changed, source="32 windows"))
        measurements.append(noninferiority.perplexity(losses[:4], changed[:4], source="4 windows"))
    return measurements


def _speeds():
    gains = (0.7, 0.95, 0.98, 1.0, 1.005, 1.03, 1.2)
    metrics = ("prefill_tokens_per_second", "time_per_output_token_ms", "energy_joules_per_token")
    return [
        samples.paired(metric, gain, spread) for metric in metrics for gain in gains for spread in (0.001, 0.02, 0.1)
    ]


def _counts():
    pairs = ((100.0, 100.5), (100.0, 90.0), (100.0, 120.0), (0.0, 3.0))
    return [measurement.counted("weights_bytes", "load", *pair, "counted") for pair in pairs]


@pytest.mark.parametrize("make", [_scores, _speeds, _counts])
def test_built_verdicts_follow_from_their_fields(make):
    members = make()
    assert recompute.differences(members) == []
    again = [recompute.verdict(m) for m in members]
    assert len({word for word in again if word}) >= 2  # and they are not all alike


@pytest.mark.parametrize("make", [_scores, _speeds, _counts])
def test_a_changed_verdict_is_found(make):
    scores = ("better", "inconclusive", "maintained", "not_maintained")
    others = ("better", "worse", "equivalent", "inconclusive")
    for m in make():
        right = recompute.verdict(m)
        if right is None:
            continue
        for word in (word for word in (scores if m.dimension == "accuracy" else others) if word != right):
            wrong = m.model_copy(update={"verdict": word})
            [line] = recompute.differences([wrong])
            assert line.endswith(f"its fields give {right.replace('_', ' ')}"), (m, word)


def test_timed_numbers_are_not_judged_by_a_margin_alone():
    lost_its_interval = samples.paired("prefill_tokens_per_second", 1.3).model_copy(update={"ci": None})
    [line] = recompute.differences([lost_its_interval])
    assert line.endswith("stored as better, but its fields give informative")


def test_the_lint_of_a_record_names_the_verdict():
    run = samples.run()
    assert lint.verdicts(run) == []
    [f1] = [m for m in run.measurements if m.metric == "f1_macro"]
    f1.bound = -0.05
    [line] = [line for line in lint.lint(run) if "f1_macro" in line]
    assert "stored as maintained, but its fields give inconclusive" in line


def test_timed_numbers_are_inconclusive_on_a_busy_machine():
    """One measurement was irreparably disturbed: the others of the run are withheld, and the lint expects that."""
    clear = samples.paired("prefill_tokens_per_second", 1.3)
    disturbed = samples.paired("decode_tokens_per_second", 1.3, workload="decode").model_copy(
        update={"disturbed": 4, "reason": "the machine was busy", "verdict": "inconclusive"}
    )
    assert [line.split(":")[0] for line in recompute.differences([clear, disturbed])] == [
        "prefill_tokens_per_second [prefill]"
    ]
    assert recompute.differences(busy.withhold_if_busy([clear, disturbed])) == []


def test_a_control_on_a_busy_machine_judges_nothing():
    """A disturbance in a control withholds that control's times and no others."""
    clear = samples.paired("prefill_tokens_per_second", 1.3)
    disturbed = samples.paired("decode_tokens_per_second", 1.3, workload="decode").model_copy(
        update={"disturbed": 4, "reason": "the machine was busy", "verdict": "inconclusive"}
    )
    third_arms = [record.Control(name="loaded", measurements=[clear, disturbed])]
    third_arms += [record.Control(name="quiet", measurements=[clear])]
    built = record.build("x", "y", "proxy", "quick", {}, [clear], third_arms, {}, {})
    loaded, quiet = built.controls
    assert [m.verdict for m in loaded.measurements] == ["inconclusive"] * 2
    assert quiet.measurements[0].verdict == built.measurements[0].verdict == "better"
    assert lint.verdicts(built) == []


@pytest.mark.parametrize("reason", ["the machine was busy: load", "the noise floor of 12 % is above 10 %; load 3.0"])
def test_a_run_of_one_dimension_keeps_what_a_busy_machine_withheld(monkeypatch, reason):
    """The evidence for the busy machine is in a dimension that was not requested, so it is not in the record."""
    spent = samples.paired("cpu_seconds_per_token", 1.3, workload="decode")
    rate = samples.paired("decode_tokens_per_second", 1.3, workload="decode").model_copy(
        update={"disturbed": 4, "reason": reason, "verdict": "inconclusive"}
    )
    monkeypatch.setenv("WORKBENCH_DIMENSIONS", "efficiency")
    built = record.build("x", "y", "proxy", "quick", {}, [rate, spent])
    assert [(m.metric, m.verdict) for m in built.measurements] == [("cpu_seconds_per_token", "inconclusive")]
    assert lint.verdicts(built) == []
    built.measurements[0].reason = None
    assert len(lint.verdicts(built)) == 1
    built.measurements[0].verdict = "worse"
    assert len(lint.verdicts(built)) == 1
