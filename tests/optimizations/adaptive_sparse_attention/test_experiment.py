"""What would refute the claim about mass, on rows of a survey; the lengths of a run; exactness on tiny models."""

from types import SimpleNamespace

import pytest

from lib.errors import UserError
from lib.measure.compare import saved
from lib.measure.metrics import measurement
from lib.measure.trackers import memory
from lib.optimizations.adaptive_sparse_attention import experiment

TRAINED = SimpleNamespace(random_weights=False)


def _survey(*leads, density=0.5):
    rows = [{"recall": 0.9, "window": 0.9 - lead, "random": 0.2, "density": density, "length": 256} for lead in leads]
    return [{"recall": 0.1, "window": 0.9, "random": 0.9, "density": 0.5, "length": 128}, *rows]


@pytest.mark.parametrize(
    "leads, refuted", [((0.1, 0.2, 0.1), False), ((-0.1, -0.2, -0.1), True), ((-0.1, 0.2, 0.1), None)]
)
def test_others_hold_as_much_is_told_by_the_interval_at_the_longest_prompt(leads, refuted):
    claim, answer, evidence = experiment.others_hold_as_much(TRAINED, _survey(*leads))
    assert (claim, answer) == (experiment.CLAIMS[0], refuted) and "256 tokens" in evidence


def test_nothing_is_told_of_random_weights_or_where_all_is_kept():
    assert experiment.others_hold_as_much(SimpleNamespace(random_weights=True), _survey(0.1, 0.1))[1] is None
    assert experiment.others_hold_as_much(TRAINED, _survey(0.0, 0.0, density=1.0))[1] is None


def test_lengths_follow_effort_and_scale():
    assert experiment.lengths_of("quick", "proxy") == experiment.PromptLengths([1024, 2048], 2048)
    assert experiment.lengths_of("standard", "slice") == experiment.PromptLengths([4096, 8192], 4096)
    assert experiment.lengths_of("quick", "proxy", 3000) == experiment.PromptLengths([1024, 2048, 3000], 3000)


def test_the_bounds_of_pages_are_read_as_well(tiny):
    """Chosen pages, and a minimum and a maximum of every page: half a token each where keys are half of the cache."""
    knobs = {"pages": 64, "page_size": 16, "dense_blocks": 0}
    model = tiny("qwen3-4b-instruct-2507")
    assert experiment.attended(model, knobs, 8192) == 1024 + 512
    assert experiment.attended(model, knobs | {"dense_blocks": 2}, 8192) == (2 * 8192 + 2 * 1536) / 4
    assert experiment.attended(tiny("glm-4.7-flash"), knobs, 8192) == 1024 + 2 * 512
    assert experiment.attended(model, knobs, 1000) == experiment.attended(model, knobs | {"pages": 0}, 1000) == 1000


def test_a_knob_out_of_range_is_named_before_anything_is_loaded():
    knobs = {"tau": 0.9, "block_size": 100, "stride": 16, "max_density": 1.0, "full_last": 1, "pages": 4}
    with pytest.raises(UserError, match="does not divide"):
        experiment.sizes("quick", "proxy", knobs | {"page_size": 16})


@pytest.mark.parametrize("name, transform", [("glm-4.7-flash", saved.ABSORBING), ("qwen3-4b-instruct-2507", None)])
def test_the_memory_child_of_full_attention_decodes_latents_absorbed(tiny, monkeypatch, name, transform):
    seen = []

    def peaks(*arms):
        seen.extend(arm.transform for arm in arms)
        return [memory.Peaks([memory.failed("planted")]) for _ in arms]

    monkeypatch.setattr(memory, "peaks", peaks)
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 1.0, 1.0, "planted")
    model, load = tiny(name), {"name": name, "device": "cpu"}
    experiment.costs(model, model, {}, 64, {}, load, [rate], 1.0)
    assert seen == [transform, "lib.optimizations.adaptive_sparse_attention.method:apply"]
