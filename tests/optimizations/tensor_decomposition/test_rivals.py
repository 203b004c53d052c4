"""What was published of factors is looked for where this run removes as much, and there alone."""

from lib.measure.metrics import measurement
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.tensor_decomposition import rivals


def _arm(name: str, ratio: float) -> ThirdArm:
    read = measurement.informative("perplexity", "prefill", 10.0, 10 * ratio, "by hand", ratio=ratio)
    read = read.model_copy(update={"ci": (0.95 * ratio, 1.05 * ratio)})
    return ThirdArm(name, "equal bytes by other means", [read])


def test_plain_factors_collapse_and_whitened_do_not():
    swept = rivals.Sweep(arms=[_arm("plain", 40.0), _arm("whitened", 1.4)])
    (judged,) = rivals.replications(swept, 0.2)
    assert judged.held and "dense 10" in judged.evidence and "plain 400 (380–420)" in judged.evidence
    (judged,) = rivals.replications(rivals.Sweep(arms=[_arm("plain", 1.5), _arm("whitened", 1.4)]), 0.2)
    assert judged.held is False
    (judged,) = rivals.replications(rivals.Sweep(), 0.2)
    assert judged.held is None


def test_another_share_is_another_question():
    assert rivals.replications(rivals.Sweep(arms=[_arm("plain", 40.0)]), 0.4) == []
