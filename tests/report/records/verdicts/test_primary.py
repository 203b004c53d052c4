"""A dimension's verdict is its primary's; guards lose only what is significant, and never raise a verdict."""

import pytest

from lib.measure.metrics import measurement
from lib.report.records import record
from lib.report.records.verdicts import primary
from lib.report.records.verdicts.verdict import judge
from tests.report import samples

ENERGY, SECONDS, BYTES = "energy_joules_per_token", "prefill_tokens_per_second", "weights_bytes"
PREFILL, DECODE = (SECONDS, "prefill"), ("decode_tokens_per_second", "decode")


def speed(metric: str, ratio: float, verdict: str, workload: str, half: float = 0.03):
    return samples.timed(metric, ratio, half, verdict, workload)


@pytest.mark.parametrize("verdict", ["better", "worse", "equivalent", "inconclusive"])
@pytest.mark.parametrize("guard", ["better", "equivalent", "inconclusive"])
def test_the_verdict_is_the_primarys_and_gains_of_guards_do_not_raise_it(verdict, guard):
    members = [speed(*DECODE[:1], 1.4, guard, "decode"), speed(SECONDS, 1.2, verdict, "prefill")]
    judged = judge(members, primaries={"performance": PREFILL})
    assert judged.performance == verdict and judged.losses == []
    assert judged.carried_by["performance"].metric == SECONDS and judged.carried_by["performance"].reason is None


def test_a_guards_loss_is_shown_with_the_verdict():
    members = [speed(SECONDS, 1.2, "better", "prefill"), speed(DECODE[0], 0.8, "worse", "decode")]
    judged = judge(members, primaries={"performance": PREFILL})
    assert judged.performance == "better"
    [loss] = judged.losses_of("performance")
    assert (loss.metric, loss.verdict) == (DECODE[0], "worse") and loss.p < 0.05
    assert judged.sentence.startswith("Prefill 20 % faster. But decode 20 % slower.")


def test_a_loss_must_survive_holms_correction():
    """Alone the guard's p is 0.03; among three guards it is no longer below 0.05."""
    weak = speed(DECODE[0], 0.9, "worse", "decode", half=0.09)
    others = [speed("attention_ms", 1.0, "inconclusive", f"{n}") for n in range(2)]
    carrier = speed(SECONDS, 1.2, "better", "prefill")
    alone = judge([carrier, weak], primaries={"performance": PREFILL})
    assert alone.losses and 0.01 < alone.losses[0].p < 0.05
    assert judge([carrier, weak, *others], primaries={"performance": PREFILL}).losses == []


def test_counts_need_no_correction_and_a_single_reading_is_not_a_loss():
    counted = measurement.counted(BYTES, "load", 100.0, 150.0, "counted")
    once = measurement.counted("peak_memory_bytes", "load", 100.0, 150.0, "read once", "measured")
    peak = samples.timed("peak_memory_bytes", 0.8, 0.01, "better", "generate")
    judged = judge([peak, counted, once], primaries={"resources": ("peak_memory_bytes", "generate")})
    assert judged.resources == "better"
    assert [(loss.metric, loss.workload, loss.p) for loss in judged.losses] == [(BYTES, "load", None)]


def test_derived_carries_only_without_measured_and_estimated_never():
    bytes_ = measurement.counted("decode_bytes_per_token", "decode", 10.0, 5.0, "formula")
    estimated = measurement.judged(
        ENERGY, "decode", baseline=1.0, optimized=0.5, ratio=0.5, ci=(0.4, 0.6), n=12, noise_floor=0.01, margin=0.03,
        verdict="better", provenance="estimated", source="a table",
    )  # fmt: skip
    declared = {"efficiency": (ENERGY, "decode")}
    carrier, reason = primary.carrier([bytes_, estimated], "efficiency", declared["efficiency"])
    assert carrier is bytes_ and reason == "it is only estimated"
    read = estimated.model_copy(update={"provenance": "measured", "verdict": "equivalent"})
    assert judge([bytes_, read], primaries=declared).efficiency == "equivalent"
    assert judge([bytes_, read]).carried_by["efficiency"].metric == ENERGY
    only = judge([estimated], primaries=declared)
    assert (
        only.efficiency == "inconclusive"
        and "no estimate is judged" in only.reasons["efficiency"]
        and not only.carried_by
    )
    size = measurement.counted(BYTES, "load", 100.0, 50.0, "counted")
    peak = samples.timed("peak_memory_bytes", 1.0, 0.01, "equivalent", "generate")
    judged = judge([size, peak], primaries={"resources": (BYTES, "load")})
    assert judged.resources == "equivalent" and "derived" in judged.carried_by["resources"].reason


def test_a_missing_primary_is_replaced_and_the_reason_kept():
    missing = measurement.unavailable(SECONDS, "prefill", "no clock")
    other = speed(SECONDS, 1.3, "better", "prefill, 64 tokens")
    judged = judge([missing, speed(DECODE[0], 0.7, "worse", "decode"), other], primaries={"performance": PREFILL})
    assert judged.performance == "better" and judged.carried_by["performance"].workload == "prefill, 64 tokens"
    assert judged.carried_by["performance"].reason == "no clock"


def test_an_unjudged_primary_gives_its_own_reason():
    """An estimate of the same metric is also present: that is not the reason."""
    declared = ("goodput_requests_per_second", "serve, real model")
    few = measurement.informative(*declared, 0.3, 0.3, "two requests", reason="2.0 requests counted, fewer than 15")
    simulated = few.model_copy(update={"workload": "serve, simulated", "provenance": "estimated"})
    judged = judge([simulated, few], primaries={"performance": declared})
    assert judged.performance == "inconclusive" and judged.reasons["performance"] == few.reason
    assert "2.0 requests counted" in judged.sentence and "estimate" not in judged.sentence


def test_an_unexercised_metric_carries_no_verdict():
    idle = samples.scored("f1_macro", 0.9, 0.9, "maintained").model_copy(
        update={"verdict": "not_exercised", "reason": "never acted on these prompts", "ci": None, "bound": None}
    )
    only = judge([idle])
    assert only.accuracy == "not_exercised" and "never acted" in only.reasons["accuracy"]
    assert "Accuracy not exercised: never acted on these prompts." in only.sentence
    both = judge([idle, samples.scored("perplexity", 41.0, 47.0, "not_maintained", 0.01, "text")])
    assert both.accuracy == "not_maintained"


def test_a_larger_checkpoint_is_a_loss_but_a_larger_single_reading_is_not():
    smaller = measurement.counted("peak_tensor_bytes", "generate", 100.0, 60.0, "live tensors", "measured")
    larger = measurement.counted("checkpoint_bytes", "load", 100.0, 150.0, "sizes of the saved files", "measured")
    read = measurement.counted("peak_memory_bytes", "load", 100.0, 150.0, "read once", "measured")
    judged = judge([smaller, larger, read], primaries={"resources": ("peak_tensor_bytes", "generate")})
    assert judged.resources == "better" and [loss.metric for loss in judged.losses] == ["checkpoint_bytes"]


def test_one_quantity_is_judged_once():
    members = [speed(SECONDS, 0.8, "worse", "prefill"), speed("time_to_first_token_ms", 1.25, "worse", "prefill")]
    members.append(speed(DECODE[0], 1.2, "better", "decode"))
    judged = judge(members, primaries={"performance": DECODE})
    assert [loss.metric for loss in judged.losses] == [SECONDS]


def test_a_primary_of_another_dimension_is_refused():
    with pytest.raises(ValueError, match="f1_macro is not a metric of performance"):
        record.build("x", "m", "proxy", "quick", {}, primaries={"performance": ("f1_macro", "classify")})
    run = record.build("x", "m", "proxy", "quick", {}, samples.measurements(), primaries=samples.PRIMARIES)
    assert run.primaries == samples.PRIMARIES
    assert record.from_json(record.to_json(run), "x").primaries == samples.PRIMARIES


def test_numbers_withheld_by_a_busy_machine_lend_no_significance_to_a_loss():
    """Alone the loss has a p of 0.04; two tests beside it count as two more, however extreme a busy machine made
    them.
    """
    kept = samples.scored("f1_macro", 0.9, 0.9, "maintained")
    weak = samples.scored("accuracy", 0.9, 0.8, "not_maintained", 0.085)
    drawn = [speed("attention_ms", 1.5, "inconclusive", f"{n}") for n in range(2)]
    busy = [m.model_copy(update={"reason": "the machine was busy: load"}) for m in drawn]
    declared = {"accuracy": ("f1_macro", "classify")}
    alone = judge([kept, weak], primaries=declared)
    assert [loss.metric for loss in alone.losses] == ["accuracy"] and 0.03 < alone.losses[0].p < 0.05
    assert judge([kept, weak, *busy], primaries=declared).losses == []
