"""Variance between processes is pooled from other runs: the pool recovers a planted spread, and its intervals hold."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom

from lib.measure.metrics import paired_samples, paired_stats, process_variance
from lib.measure.metrics.process_variance import Draw

TRIALS = 400
ALLOWED = int(binom.ppf(0.99, TRIALS, 0.05))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Use no pool of a surrounding build."""
    monkeypatch.delenv(process_variance.VARIABLE, raising=False)
    process_variance._read.cache_clear()


def draws(tau: float, count: int, error: float = 0.004, seed: int = 0) -> list[Draw]:
    """Controls of `count` processes whose true spread between processes is `tau`."""
    random = np.random.default_rng(seed)
    return [Draw("cpu", "decode", tau * random.normal() + error * random.normal(), error) for _ in range(count)]


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.02])
def test_the_pool_recovers_the_planted_spread(tau):
    assert process_variance.pool(draws(tau, 300)).sigma == pytest.approx(tau, rel=0.15)


def test_few_draws_stay_near_the_prior_and_none_gives_the_prior():
    assert process_variance.pool([]).sigma == pytest.approx(process_variance.PRIOR_SIGMA)
    assert "prior" in process_variance.pool([]).source
    few = process_variance.pool(draws(0.0, 3, error=0.001))
    assert process_variance.LEAST_SIGMA < few.sigma < process_variance.PRIOR_SIGMA
    assert "3 controls of one process each" in few.source
    assert process_variance.pool(draws(0.0, 500)).sigma == process_variance.LEAST_SIGMA


def test_one_disturbed_run_does_not_widen_later_intervals():
    mixed = [*draws(0.005, 40), Draw("cpu", "decode", 0.8, 0.01)]
    assert process_variance.pool(mixed).sigma < 3 * process_variance.pool(draws(0.005, 40)).sigma


def test_a_noisy_run_does_not_narrow_later_intervals():
    """Controls with an error of 10 to 50 % say nothing about a spread of 2 %, whatever effect they happen to show."""
    quiet = draws(0.02, 60)
    noisy = [Draw("cpu", "decode", effect, error) for effect in (0.0, 0.03) for error in (0.1, 0.2, 0.5)]
    alone = process_variance.pool(quiet).sigma
    assert process_variance.pool([*quiet, *noisy]).sigma == pytest.approx(alone, rel=0.02)
    assert process_variance.pool(noisy).sigma == pytest.approx(process_variance.PRIOR_SIGMA, rel=0.05)


def test_the_pool_recovers_a_spread_behind_errors_of_any_size():
    random = np.random.default_rng(5)
    errors = random.choice([0.002, 0.01, 0.03], 600)
    mixed = [Draw("cpu", "decode", 0.015 * random.normal() + error * random.normal(), error) for error in errors]
    assert process_variance.pool(mixed).sigma == pytest.approx(0.015, rel=0.15)


def test_the_pool_is_looked_up_by_device_and_workload(tmp_path, monkeypatch):
    many = [*draws(0.003, 60), *(Draw("cpu", "prefill", *pair) for pair in [(0.03, 0.001), (-0.03, 0.001)] * 20)]
    path = process_variance.write(tmp_path / process_variance.NAME, process_variance.table(many))
    monkeypatch.setenv(process_variance.VARIABLE, str(path))
    decode, prefill = (process_variance.between_processes(name) for name in ("decode", "prefill"))
    other = process_variance.between_processes("a new workload")
    assert decode.sigma < other.sigma < prefill.sigma and other.draws == 100
    path.write_text("damaged")
    process_variance._read.cache_clear()
    assert process_variance.between_processes("decode").draws == 0
    assert (
        json.loads(process_variance.write(path, process_variance.table(many)).read_text())["cpu"]["*"]["draws"] == 100
    )


def test_a_single_process_creates_effects_unless_the_pool_is_included():
    """A standard deviation of 2 % between processes is invisible inside them: a third of equal arms would get a
    verdict.
    """
    random, tau = np.random.default_rng(0), 0.02

    def verdicts(process_sigma: float) -> list[str]:
        words = []
        for _ in range(TRIALS):
            shift = tau * random.normal()
            other = np.exp(shift + 0.02 * random.normal(size=12))
            words.append(
                paired_samples.from_samples(
                    "prefill_tokens_per_second", "prefill", [1.0] * 12, other, source="test", floor=0.01,
                    process_sigma=process_sigma,
                ).verdict
            )  # fmt: skip
        return words

    def called(words: list[str]) -> int:
        return sum(word in ("better", "worse") for word in words)

    assert called(verdicts(0.0)) > 4 * ALLOWED
    assert called(verdicts(tau)) <= ALLOWED


@pytest.mark.parametrize(("used", "sigma"), [(False, 0.03), (True, 0.004)])
def test_a_cpu_run_beside_a_gpu_uses_the_cpu_pool(tmp_path, monkeypatch, used, sigma):
    pooled = {"cpu": {"*": process_variance.Pooled(0.03, 9)}, "cuda": {"*": process_variance.Pooled(0.004, 9)}}
    path = process_variance.write(tmp_path / "pool.json", pooled)
    monkeypatch.setenv(process_variance.VARIABLE, str(path))
    cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: used)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert process_variance.between_processes("prefill").sigma == sigma


def test_the_process_is_the_unit_of_replication():
    random, tau, processes, rounds = np.random.default_rng(1), 0.02, 6, 2
    called = 0
    for _ in range(TRIALS):
        shift_P = tau * random.normal(size=processes)
        d_N = np.repeat(shift_P, rounds) + 0.01 * random.normal(size=processes * rounds)
        effect = paired_stats.effect(d_N, [number for number in range(processes) for _ in range(rounds)])
        called += effect.low > 0 or effect.high < 0
    assert called <= ALLOWED and effect.processes == processes
    means = paired_stats.process_means([1.0, 3.0, 5.0, 7.0], [1, 1, 0, 0])
    assert means.tolist() == [6.0, 2.0]
    low, high = paired_stats.student_interval([0.0, 2.0])
    assert low == pytest.approx(1 - 12.706, abs=0.01) and high == pytest.approx(1 + 12.706, abs=0.01)
    assert paired_stats.student_interval([1.0]) == (-math.inf, math.inf)


def test_the_level_of_an_arm_includes_the_variance_between_processes():
    """Within each process all blocks agree: thirty-six blocks are three samples."""
    seconds, process = [1.0] * 12 + [1.1] * 12 + [1.21] * 12, [number // 12 for number in range(36)]
    middle, low, high = paired_stats.level(seconds, process)
    half = 4.303 * math.log(1.1) / math.sqrt(3)
    assert (middle, low, high) == pytest.approx([1.1, 1.1 / math.exp(half), 1.1 * math.exp(half)], rel=1e-3)
    assert paired_stats.level(seconds) == (1.1, *paired_stats.median_interval(seconds))


def test_a_stored_measurement_is_judged_again_from_its_fields():
    for ratio, disturbed in ((1.2, ()), (1.001, ()), (0.8, ()), (1.2, ("other processes took 40% of our cores",))):
        values = [ratio * (1 + 0.002 * (number % 3 - 1)) for number in range(12)]
        judged = paired_samples.from_samples(
            "prefill_tokens_per_second", "prefill", [1.0] * 12, values, source="test", floor=0.004,
            process_sigma=0.002, disturbed=disturbed,
        )  # fmt: skip
        assert paired_samples.judge_again(judged).verdict == judged.verdict
        turned = judged.model_copy(update={"verdict": "better" if judged.verdict != "better" else "worse"})
        assert paired_samples.judge_again(turned).verdict != turned.verdict
    assert judged.verdict == "inconclusive" and judged.disturbed == 1
