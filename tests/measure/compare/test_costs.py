"""Resources are counted by formula; break-even follows from the judged ratio, and only for a gain."""

import pytest

from lib.measure.compare import costs
from lib.measure.metrics import measurement
from lib.measure.roofline import cost_model
from lib.measure.timing import workloads


def test_resources_are_counted_and_derived(tiny, name):
    base, other = tiny(name), tiny(name)
    other.lm_head.weight.data[:48] = 0
    counted = {m.metric: m for m in costs.resources(base, other, tokens=16)}
    assert {m.provenance for m in counted.values()} == {"derived"} and measurement.lint(counted.values()) == []
    assert {m.verdict for m in counted.values()} == {"equivalent"}
    skipped = {m.metric: m for m in costs.resources(base, other, tokens=16, costs={"skip_zeros": True})}
    assert skipped["decode_flops_per_token"].verdict == "better"
    assert counted["prefill_flops_per_token"].verdict == skipped["prefill_flops_per_token"].verdict == "equivalent"
    timed = cost_model.of(base, workloads.prefill(base, workloads.random_prompt(base, 1, 16)))
    assert counted["prefill_flops_per_token"].baseline == timed.flops / 16  # one position of the head, as is timed
    assert counted["parameters"].baseline == cost_model.parameters(base)
    if name == "glm-4.7-flash":
        options = {"tokens": 16, "costs": {"absorbed": True}}
        alone = {m.metric: m.ratio for m in costs.resources(base, other, **options)}
        both = {m.metric: m.ratio for m in costs.resources(base, other, **options, baseline_costs={"absorbed": True})}
        assert alone["decode_flops_per_token"] < 1 == both["decode_flops_per_token"]


def test_break_even_needs_a_gain():
    better = measurement.informative("prefill_tokens_per_second", "prefill", 100, 200, "blocks")
    better = better.model_copy(update={"verdict": "better"})
    applied, tokens = costs.break_even(2.0, better)
    assert applied.optimized == 2.0 and tokens.optimized == pytest.approx(400) and tokens.baseline is None
    # The pairs show 10 % faster, the two medians (of different pairs) slower: the judged ratio counts.
    crossed = better.model_copy(update={"ratio": 1.1, "optimized": 99.0})
    assert costs.break_even(2.0, crossed)[1].optimized == pytest.approx(2.0 * 100 / (1 - 1 / 1.1))
    none = costs.break_even(2.0, better.model_copy(update={"verdict": "inconclusive"}))[1]
    assert none.verdict == "unavailable" and "no gain" in none.reason
