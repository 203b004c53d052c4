"""The statistics detect planted effects, and none if there is none, on a clock that the test drives."""

import math

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from lib.measure.metrics import paired_samples, paired_stats, settings
from lib.measure.timing import interleaved

pytestmark = pytest.mark.usefixtures("one_process_is_like_another")

TRIALS = 400
# The most hits among 400 that a true 5 % level gives in 99 of 100 cases.
ALLOWED = int(binom.ppf(0.99, TRIALS, 0.05))
STANDARD = settings.read("standard").blocks


class Machine:
    """A clock that the arms advance; its calls get slower by `drift` per block (two calls)."""

    def __init__(self, seed: int, drift: float = 0.0, noise=None, spread: float = 0.03):
        self.now, self.calls, self.drift = 0.0, 0, drift
        # d is the difference of two logarithms: each arm carries its share of the paired spread.
        self.spread = spread / math.sqrt(2)
        self.random = np.random.default_rng(seed)
        self.noise = noise or (lambda random: random.normal())

    def clock(self) -> float:
        return self.now

    def arm(self, seconds: float):
        def call():
            self.now += seconds * math.exp(self.spread * self.noise(self.random)) * (1 + self.drift) ** (self.calls / 2)
            self.calls += 1

        return call

    def compare(self, slower: float, blocks: int = STANDARD, seed: int = 0) -> tuple[str, paired_stats.Effect]:
        base, other = self.arm(1.0), self.arm(1.0 + slower)
        pairs = interleaved.paired(base, other, blocks=blocks, clock=self.clock, seed=seed)
        control = interleaved.paired(base, self.arm(1.0), blocks=blocks, clock=self.clock, seed=seed + 1)
        latency = paired_samples.from_pairs("time_to_first_token_ms", "prefill", pairs, 1, control)
        return latency.verdict, paired_stats.effect(pairs.differences)


def outlying(random) -> float:
    """Times of which one in ten is ten spreads too slow."""
    return 10 if random.random() < 0.1 else random.normal()


def heavy(random) -> float:
    return random.standard_t(3) / math.sqrt(3)


@pytest.mark.parametrize("blocks", [6, 12, 30])
@pytest.mark.parametrize("noise", [None, heavy, outlying])
def test_equal_arms_are_rarely_told_apart(blocks, noise):
    verdicts, excluded = [], 0
    for trial in range(TRIALS):
        verdict, effect = Machine(trial, noise=noise).compare(0.0, blocks, trial)
        verdicts.append(verdict)
        excluded += effect.low > 0 or effect.high < 0
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= ALLOWED
    assert excluded <= ALLOWED


def test_a_drifting_machine_creates_no_effect():
    verdicts = [Machine(trial, drift=0.01).compare(0.0, seed=trial)[0] for trial in range(TRIALS)]
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= ALLOWED


def test_a_resolution_widens_an_interval_and_none_leaves_it_unchanged():
    skewed = paired_stats.Effect(median=0.0, low=0.01, high=0.5, sigma=0.1, scatter=0.1, n=6, outliers=0)
    assert skewed.at_resolution(0.0) is skewed
    wider = skewed.at_resolution(0.2)
    assert (wider.low, wider.high) == (-0.2, 0.5)


def test_a_fixed_order_would_create_an_effect_on_a_drifting_machine():
    machine = Machine(0, drift=0.01, spread=0.001)
    arm, times = machine.arm(1.0), []
    for _ in range(2 * STANDARD):
        start = machine.now
        arm()
        times.append(machine.now - start)
    first, second = times[:STANDARD], times[STANDARD:]
    assert paired_stats.effect(paired_stats.differences(first, second)).low > 0.05


@pytest.mark.parametrize("n", [6, 8, 32])
def test_the_bootstrap_of_a_mean_keeps_its_level_with_few_values(n):
    random, missed = np.random.default_rng(n), 0
    for _ in range(400):
        low, high = paired_stats.bootstrap_interval(random.normal(size=n), resamples=400)
        missed += not low <= 0 <= high
    assert missed <= binom.ppf(0.99, 400, 0.05)
    assert paired_stats.bootstrap_interval([0.25] * n) == (0.25, 0.25)
    assert paired_stats.bootstrap_interval([0.25]) == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_samples_that_are_not_times_are_refused(bad):
    for arms in (([1.0, bad], [1.0, 1.0]), ([1.0, 1.0], [bad, 1.0])):
        with pytest.raises(ValueError, match="positive and finite"):
            paired_stats.differences(*arms)


def test_five_percent_is_detected_at_standard_effort():
    verdicts = [Machine(trial).compare(0.05, seed=trial)[0] for trial in range(TRIALS)]
    assert verdicts.count("worse") >= 0.95 * TRIALS


@pytest.mark.parametrize("planted", [0.01, 0.03, 0.10])
@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_planted_effects_are_estimated_without_bias_and_never_reversed(planted, drift):
    results = [Machine(trial, drift).compare(planted, seed=trial) for trial in range(100)]
    assert np.mean([effect.median for _, effect in results]) == pytest.approx(math.log1p(planted), abs=0.004)
    assert [verdict for verdict, _ in results].count("better") <= 1
    if planted == 0.10:
        assert [verdict for verdict, _ in results].count("worse") >= 99


def test_ten_percent_is_detected_among_outliers_which_are_counted_and_kept():
    results = [Machine(trial, noise=outlying, spread=0.02).compare(0.10, seed=trial) for trial in range(100)]
    assert [verdict for verdict, _ in results].count("worse") >= 85
    assert all(effect.n == STANDARD for _, effect in results)
    assert np.mean([effect.outliers for _, effect in results]) > 1


def test_equivalence_needs_the_whole_interval_inside_the_margin():
    quiet = [Machine(trial, spread=0.01).compare(0.0, seed=trial)[0] for trial in range(100)]
    assert quiet.count("equivalent") >= 95
    loud = [Machine(trial, spread=0.10).compare(0.0, blocks=6, seed=trial)[0] for trial in range(100)]
    assert loud.count("equivalent") == 0 and loud.count("inconclusive") >= 95
    different = [Machine(trial).compare(0.05, seed=trial)[0] for trial in range(100)]
    assert different.count("equivalent") == 0


def test_the_interval_keeps_its_level_where_bootstraps_of_a_median_do_not():
    random, outside = np.random.default_rng(0), {"ours": 0, "percentile": 0, "basic": 0}
    for _ in range(TRIALS):
        d = random.normal(size=12)
        low, high = paired_stats.median_interval(d)
        outside["ours"] += low > 0 or high < 0
        for method in ("percentile", "basic"):
            interval = bootstrap((d,), np.median, n_resamples=499, method=method, rng=random).confidence_interval
            outside[method] += interval.low > 0 or interval.high < 0
    assert outside["ours"] <= ALLOWED < outside["basic"]
    assert outside["ours"] <= outside["percentile"]


def test_median_interval_is_interpolated_and_infinite_for_few_values():
    ordered = np.arange(12.0)
    low, high = paired_stats.median_interval(ordered[::-1])
    assert 2 <= low <= 3 and 8 <= high <= 9 and low + high == pytest.approx(11)
    assert paired_stats.median_interval([1, 2, 3, 4, 5]) == (-math.inf, math.inf)


def test_sample_sizes_and_percentiles():
    # One point at 5 % discordance, three points at 10 %.
    assert paired_stats.items_needed(math.sqrt(0.05), 0.01) == pytest.approx(3100, rel=0.01)
    assert paired_stats.items_needed(math.sqrt(0.10), 0.03) == pytest.approx(690, rel=0.01)
    assert paired_stats.percentiles(range(30)) == {"p50": 14.5, "p95": pytest.approx(27.55), "p99": None}


def test_one_interruption_does_not_shift_the_process_mean():
    d = [0.01] * 9 + [5.0] + [0.02] * 10
    assert paired_stats.process_means(d, [0] * 10 + [1] * 10) == pytest.approx([0.01, 0.02])
    assert paired_stats.process_means([0.0, 1.0], [0, 0]) == pytest.approx([0.5])
