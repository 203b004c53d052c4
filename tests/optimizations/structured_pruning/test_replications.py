"""Published claims about pruning, judged by a run's measurements."""

from types import SimpleNamespace

from lib.measure.metrics import measurement
from lib.optimizations.structured_pruning import outcome


def _measured(metric: str, workload: str, ratio: float, width: float, margin: float | None = 0.02):
    informative = measurement.informative(metric, workload, 0.5, 0.5 * ratio, "by hand", ratio=ratio)
    return informative.model_copy(update={"ci": (ratio - width, ratio + width), "margin": margin})


def test_relations_of_pruning():
    setup = SimpleNamespace(influence=[0.9, 0.1, 0.1, 0.1, 0.8], loaded=SimpleNamespace(random_weights=False))
    perplexity, chosen = _measured("perplexity", "prefill", 1.5, 0.05), _measured("accuracy", "arc_easy", 0.99, 0.02)
    generated = _measured("retrieval_exact_match", "generate", 0.2, 0.05)
    ends, accuracy = outcome.replications(setup, [perplexity, chosen, generated], "channels")
    assert ends.held and accuracy.held
    *_, generation = outcome.replications(setup, [perplexity, chosen, generated], "depth")
    assert generation.held and "generated 0.8" in generation.evidence
    setup.influence = [0.1, 0.9, 0.1, 0.1, 0.8]
    assert [judgement.held for judgement in outcome.replications(setup, [], "depth")] == [False, None]


def test_a_score_without_changed_answers_counts_as_measured():
    setup = SimpleNamespace(influence=[0.9, 0.1, 0.1, 0.8], loaded=SimpleNamespace(random_weights=False))
    same = _measured("accuracy", "classify", 1.0, 0.0).model_copy(update={"ci": None, "bound": -0.0075})
    _, accuracy = outcome.replications(setup, [_measured("perplexity", "prefill", 1.002, 0.001), same], "channels")
    assert accuracy.held is None and "perplexity did not worsen strongly" in accuracy.evidence
    assert "0.0000 (−0.0075 to +0.0075)" in accuracy.evidence
    _, accuracy = outcome.replications(setup, [_measured("perplexity", "prefill", 1.5, 0.01), same], "channels")
    assert accuracy.held, "no answer changed"


def test_the_influence_of_random_blocks_replicates_nothing():
    setup = SimpleNamespace(influence=[0.9, 0.1, 0.1, 0.8], loaded=SimpleNamespace(random_weights=True))
    ends, _ = outcome.replications(setup, [], "channels")
    assert ends.held is None and ends.evidence.startswith("random weights; highest: block 0")
