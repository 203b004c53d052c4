"""What was published of factors is looked for where this run removes as much, and there alone."""

import pytest

from lib.measure.metrics import measurement
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.tensor_decomposition import rivals


def _arm(name: str, ratio: float) -> ThirdArm:
    read = measurement.informative("perplexity", "prefill", 10.0, 10 * ratio, "by hand", ratio=ratio)
    read = read.model_copy(update={"ci": (0.95 * ratio, 1.05 * ratio)})
    return ThirdArm(name, "equal bytes by other means", [read])


def _harm(name: str, nats: float) -> ThirdArm:
    read = measurement.informative("kl_divergence_nats", "prefill", 0.0, nats, "by hand")
    return ThirdArm(name, "equal bytes by other means", [read.model_copy(update={"ci": (0.9 * nats, 1.1 * nats)})])


def test_plain_factors_collapse_and_whitened_do_not():
    """Published are factors that take the same share of every matrix; those of one budget do not answer for them."""
    others = [_arm("plain", 1.5), _arm("whitened", 40.0)]
    swept = rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 40.0), _arm(rivals.EVEN, 1.4), *others])
    (judged,) = rivals.replications(swept, 0.2)
    assert judged.held and "dense 10" in judged.evidence and "plain 400 (380–420)" in judged.evidence
    swept = rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 1.5), _arm(rivals.EVEN, 1.4)])
    (judged,) = rivals.replications(swept, 0.2)
    assert judged.held is False
    (judged,) = rivals.replications(rivals.Sweep(), 0.2)
    assert judged.held is None


def test_another_share_is_another_question():
    assert rivals.replications(rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 40.0)]), 0.4) == []


@pytest.mark.parametrize(("even", "refuted"), [(0.2, True), (0.5, None), (0.9, False)])
def test_fitted_factors_are_compared_with_the_better_bare_ones(even, refuted):
    arms = [_harm("whitened", 0.5), _harm("plain", 4.0), _harm(rivals.BARE_EVEN, even)]
    (_, answer, evidence), _ = rivals.refutations(arms)
    assert answer is refuted and rivals.BARE_EVEN in evidence
    (_, answer, evidence), _ = rivals.refutations([arms[0], _harm("plain", 0.1), arms[2]])
    assert answer and "plain 0.1" in evidence
