"""Published results on factors are compared only where this run removes the same share."""

import numpy as np
import pytest
from torch import nn

from lib.measure.metrics import measurement
from lib.models.structure.replacements.factored import FactoredLinear
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.tensor_decomposition import outcome, rivals


def _arm(name: str, ratio: float) -> ThirdArm:
    read = measurement.informative("perplexity", "prefill", 10.0, 10 * ratio, "by hand", ratio=ratio)
    read = read.model_copy(update={"ci": (0.95 * ratio, 1.05 * ratio)})
    return ThirdArm(name, "equal bytes by other means", [read])


def _harm(name: str, nats: float) -> ThirdArm:
    read = measurement.informative("kl_divergence_nats", "prefill", 0.0, nats, "by hand")
    return ThirdArm(name, "equal bytes by other means", [read.model_copy(update={"ci": (0.9 * nats, 1.1 * nats)})])


def test_plain_factors_collapse_and_whitened_do_not():
    """The published factors take the same share of every matrix; factors from one budget do not represent them."""
    others = [_arm("plain", 1.5), _arm("whitened", 40.0)]
    swept = rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 40.0), _arm(rivals.EVEN, 1.4), *others])
    (judged,) = outcome.replications(swept, 0.2)
    assert judged.held and "dense 10" in judged.evidence and "plain 400 (380–420)" in judged.evidence
    swept = rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 1.5), _arm(rivals.EVEN, 1.4)])
    (judged,) = outcome.replications(swept, 0.2)
    assert judged.held is False
    (judged,) = outcome.replications(rivals.Sweep(), 0.2)
    assert judged.held is None


def test_another_share_is_not_compared():
    assert outcome.replications(rivals.Sweep(arms=[_arm(rivals.BARE_EVEN, 40.0)]), 0.4) == []


@pytest.mark.parametrize(("even", "refuted"), [(0.2, True), (0.5, None), (0.9, False)])
def test_fitted_factors_are_compared_with_the_better_bare_ones(even, refuted):
    arms = [_harm("whitened", 0.5), _harm("plain", 4.0), _harm(rivals.BARE_EVEN, even)]
    (_, answer, evidence), *_ = outcome.refutations(arms, nn.Linear(2, 2), [])
    assert answer is refuted and rivals.BARE_EVEN in evidence
    (_, answer, evidence), *_ = outcome.refutations([arms[0], _harm("plain", 0.1), arms[2]], nn.Linear(2, 2), [])
    assert answer and "plain 0.1" in evidence


@pytest.mark.parametrize(
    ("nats", "bytes_", "refuted"),
    [(0.2, 80, True), (0.2, 85, None), (0.9, 80, False), (0.9, 70, None), (0.9, 85, False)],
)
def test_pruned_arms_of_other_sizes_decide_only_beyond_the_size_difference(nats, bytes_, refuted):
    arms = [_harm("whitened", 0.5), _harm(rivals.PRUNED, nats)]
    for arm, left in zip(arms, (80, bytes_)):
        arm.measurements.append(measurement.counted("weights_bytes", "load", 100, left, "by hand"))
    _, (_, answer, evidence), *_ = outcome.refutations(arms, nn.Linear(2, 2), [])
    assert answer is refuted
    assert evidence.endswith(f"structured pruning removes {(100 - bytes_) / 20:.2f} times as many bytes as whitened")


def _rate(workload: str, ratio: float, verdict: str):
    rate = measurement.informative(
        f"{workload}_tokens_per_second", workload, 100.0, 100 * ratio, "by hand", ratio=ratio
    )
    return rate.model_copy(update={"ci": (0.99 * ratio, 1.01 * ratio), "verdict": verdict})


@pytest.mark.parametrize(
    ("prefill", "decode", "refuted"),
    [
        ("better", "better", False),
        ("better", "worse", True),
        ("better", "equivalent", True),
        ("better", "inconclusive", None),
    ],
)
def test_two_thin_products_are_judged_in_prefill_and_in_decoding(prefill, decode, refuted):
    rates = [_rate("prefill", 1.05, prefill), _rate("decode", 0.98, decode)]
    thin = FactoredLinear(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    *_, (_, answer, evidence) = outcome.refutations([], thin, rates)
    assert answer is refuted
    assert evidence == f"prefill 1.050× (1.039–1.061), {prefill}; decode 0.9800× (0.9702–0.9898), {decode}"
    wide = rates[1].model_copy(update={"ratio": 2.5, "ci": (1.9, 3.1)})
    *_, (_, _, evidence) = outcome.refutations([], thin, [rates[0], wide])
    assert "decode 2.50× (1.90–3.10)" in evidence, "no more digits than the interval deserves"
    barely = rates[1].model_copy(update={"ci": (0.979, 1.0038)})
    *_, (_, _, evidence) = outcome.refutations([], thin, [rates[0], barely])
    assert "(0.979–1.004)" in evidence, "an end that lies above 1 is not shown as 1"
    *_, (_, answer, evidence) = outcome.refutations([], nn.Linear(8, 8), rates)
    assert answer is None and "only stacks of experts" in evidence


def test_the_calibration_text_matters_only_where_windows_show_it():
    scatter = 0.001 * np.arange(8)
    lost = {("docs", "docs"): 0.01 + scatter, ("docs", "code"): 0.03 + 1.1 * scatter}
    lost |= {("code", "docs"): 0.0377 + scatter[::-1], ("code", "code"): 0.0381 + scatter}
    assert rivals.read_domains(lost) == (
        "Judged on docs, factors calibrated on such text are nearer than those calibrated on the other "
        "(0.0135, 0.0338). Judged on code, factors calibrated on such text are not told apart "
        "from those calibrated on the other (0.0416, 0.0412)."
    )
    table = rivals.domain_table(lost, 0, {"docs": np.arange(8)})
    assert len(table) == 4 and (table["low"] < table["KL, nats/token"]).all() and (table["high"] > table["low"]).all()
    swapped = {("docs", "docs"): lost["docs", "code"], ("docs", "code"): lost["docs", "docs"]}
    assert "further off than" in rivals.read_domains(swapped)
    assert "further off than" in rivals.read_domains(swapped, documents={"docs": np.arange(8)})
    assert "not told apart" in rivals.read_domains(swapped, documents={"docs": np.zeros(8)}), "one document, one draw"
