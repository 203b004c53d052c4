"""A feed-forward part by itself: what is counted, and where the crossover is."""

import copy

import pytest
import torch

from lib.measure.metrics.process_variance import PART_SIGMA
from lib.measure.roofline import cost_model
from lib.models.structure.anatomy import anatomy
from lib.optimizations.sparse_neural_networks import part_speed


def test_a_pass_counts_its_tokens_and_has_the_parts_shape(tiny, name):
    module = anatomy(tiny(name)).blocks[1].feed_forward.module
    for tokens in (1, 16):
        work = part_speed.run(module, tokens, 32, torch.float32)
        assert work.tokens == tokens and work().shape == (1, tokens, 32)


def test_the_cost_of_a_part_is_that_of_its_matrices(tiny, name):
    part = anatomy(tiny(name)).blocks[1].feed_forward
    cost = cost_model.of_feed_forward(part.module, 1)
    elements = 0 if part.dense is None else 3 * part.down.weight.numel()
    if part.experts is not None:
        experts = part.experts
        elements += experts.router.weight.numel()
        elements += experts.top_k * (experts.gate_up[0].numel() + experts.down[0].numel())
    assert cost.flops == 2 * elements
    assert cost.bytes == pytest.approx(4 * elements), "one token reads what it multiplies"
    assert cost_model.of_feed_forward(part.module, 16).flops == 16 * cost.flops


def test_the_fastest_form_is_found_and_compared_with_an_arm(tiny):
    module = anatomy(tiny("qwen3-4b-instruct-2507")).blocks[0].feed_forward.module
    forms = {torch.float64: copy.deepcopy(module).double(), torch.float32: module}
    dense = part_speed.fastest(forms, 16, 32, 6)
    assert dense.dtype in forms and dense.work.module is forms[dense.dtype]
    timed, size = part_speed.compare(dense, module, torch.float32, 6)
    assert timed.process_sigma == PART_SIGMA, "the spread between processes counts"
    assert timed.metric == "feed_forward_ms" and timed.n == 6 and timed.predicted is not None
    assert size.optimized == cost_model.weights_bytes(module)
    energy, cpu = part_speed.joules(dense, module, torch.float32)
    assert (energy.metric, cpu.metric) == ("energy_joules_per_token", "cpu_seconds_per_token")
    assert energy.workload == cpu.workload == "feed-forward part, 16 tokens"


@pytest.mark.parametrize(
    "gains, expected",
    [([2, 3, 4], 50), ([0.5, 2, 4], 60), ([0.5, 0.6, 0.7], None), ([2, 0.5, 2], 80), ([0.5, 1, 2], 70)],
)
def test_the_crossover(gains, expected):
    crossing = part_speed.crossover([50, 70, 90], gains)
    assert crossing == expected or crossing == pytest.approx(expected)
