"""On a busy machine no timed measurement of a record is judged; counted ones keep their verdicts."""

import pytest

from lib.measure.metrics import busy, measurement, paired_samples
from lib.measure.roofline import ceilings, cost_model

LOADED = ("other processes took 50% of our cores",)


def timed(metric: str = "prefill_tokens_per_second", floor: float = 0.01, disturbed=(), workload: str = "prefill"):
    """A measurement whose optimized arm is a fifth faster."""
    values = [1.2 * (1 + 0.001 * (number % 3)) for number in range(12)]
    return paired_samples.from_samples(
        metric, workload, [1.0] * 12, values, source="test", floor=floor, process_sigma=0.0, disturbed=disturbed
    )


@pytest.mark.parametrize("unsettling", [{"disturbed": LOADED}, {"floor": 0.48}])
def test_one_workload_on_a_busy_machine_withholds_all_timed_verdicts(unsettling):
    counted = measurement.counted("weights_bytes", "load", 100, 70, "count")
    quiet, loaded = timed(workload="decode"), timed(**unsettling)
    assert quiet.verdict == "better"
    judged = busy.withhold_if_busy([quiet, loaded, counted])
    assert [m.verdict for m in judged] == ["inconclusive", "inconclusive", "better"]
    assert judged[1].reason == loaded.reason == busy.why_busy(judged)
    # Decoding has a floor of 1 %, but was reported with one of 48 %.
    assert judged[0].reason == (loaded.reason if "disturbed" in unsettling else f"prefill: {loaded.reason}")
    assert busy.says_busy(judged[0].reason) and busy.withhold_if_busy(judged) == judged


def test_a_noisy_short_kernel_on_a_quiet_machine_withholds_nothing():
    kernel = timed("attention_ms", floor=0.3)
    judged = busy.withhold_if_busy([timed(), kernel])
    assert judged[0].verdict == "better" and kernel.verdict == "inconclusive" and busy.why_busy(judged) is None


def test_a_disk_with_a_varying_rate_withholds_only_its_own_verdict():
    """Two processes that read the same mapping under a limit differed by half on an otherwise idle machine."""
    disk = timed("decode_tokens_per_second", floor=0.6, workload="decode within the allowance, page cache included")
    judged = busy.withhold_if_busy([disk, timed()])
    assert [m.verdict for m in judged] == ["inconclusive", "better"] and busy.why_busy(judged) is None
    loaded = timed("decode_tokens_per_second", workload="decode, against accelerate, disk", disturbed=LOADED)
    assert busy.withhold_if_busy([loaded, timed()])[1].verdict == "inconclusive", "foreign load is seen there too"


@pytest.mark.parametrize("missing", [{"count": 3}, {"floor": None}])
def test_disturbed_rounds_without_a_verdict_are_the_reason_for_the_others(missing):
    """Previously the others were withheld because "3 pairs are too few for an interval", which does not tell a reader
    to rerun on a quiet machine.
    """
    count, floor = missing.get("count", 12), missing.get("floor", 0.01)
    rounds = [1.0] * count, [1.2] * count
    few = paired_samples.from_samples(
        "goodput_requests_per_second", "serve", *rounds, source="test", floor=floor, disturbed=LOADED
    )
    assert few.verdict == "informative" and few.disturbed == 1
    quiet = busy.withhold_if_busy([few, timed()])[1]
    assert quiet.verdict == "inconclusive" and quiet.reason == few.reason
    assert busy.says_busy(quiet.reason) and LOADED[0] in quiet.reason


def test_other_workloads_get_the_reason_of_the_machine_alone():
    """Previously decoding was called "dispatch bound" because prefill was."""
    peaks = ceilings.Ceilings(700e12, 4e12, "cuda", "bfloat16", 8, "2026-01-31", None)
    costs = cost_model.Cost(7e12, 1e10), cost_model.Cost(3.5e12, 1e10)  # predicts a factor of two
    loaded, quiet = (ceilings.explain(timed(disturbed=why), costs, (1.0, 0.8), peaks) for why in (LOADED, ()))
    decode = busy.withhold_if_busy([loaded, timed("decode_tokens_per_second", workload="decode")])[1]
    assert decode.reason == loaded.reason and decode.reason.endswith("measure again on a quiet machine")
    assert loaded.predicted and loaded.realised and ceilings.DISPATCH in quiet.reason
