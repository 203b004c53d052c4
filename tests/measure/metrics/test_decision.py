"""The decision rule: three conditions, two reasons for no decision, and the effect detected with 80 % power."""

import math

import numpy as np
import pytest

from lib.measure.metrics import paired_stats
from lib.measure.metrics.decision import decide, detectable

OPTIONS = {"n": 12, "floor": 0.01, "margin": 0.02, "higher_is_better": True}


@pytest.mark.parametrize(
    ("effect", "low", "high", "word", "gate"),
    [
        (0.05, 0.03, 0.07, "better", None),
        (-0.05, -0.07, -0.03, "worse", None),
        (0.05, -0.01, 0.11, "inconclusive", "zero difference"),
        (0.001, -0.005, 0.007, "equivalent", None),
        (0.018, 0.01, 0.026, "inconclusive", "practical margin of 2 %, but its interval"),
        (0.015, 0.012, 0.0195, "inconclusive", "practical margin of 2 %, but with the noise floor of 1 % a larger"),
    ],
)
def test_each_gate_withholds_a_verdict_and_is_named(effect, low, high, word, gate):
    decision = decide(effect, low, high, **OPTIONS)
    assert decision.verdict == word
    assert decision.reason is None if gate is None else gate in decision.reason
    mirrored = decide(-effect, -high, -low, **OPTIONS | {"higher_is_better": False})
    assert mirrored.verdict == word


def test_the_floor_withholds_a_verdict_and_an_equivalence():
    assert "noise floor" in decide(0.05, 0.03, 0.07, **OPTIONS | {"floor": 0.06}).reason
    assert decide(0.001, -0.005, 0.007, **OPTIONS | {"floor": 0.0195}).verdict == "inconclusive"


def test_a_busy_machine_gives_no_verdict_for_any_effect_size():
    """Observed: the baseline itself, 2.17 times faster with a noise floor of 48 %."""
    seen = decide(math.log(2.17), math.log(1.16), math.log(8.13), **OPTIONS | {"n": 6, "floor": 0.48})
    assert seen.verdict == "inconclusive" and "48 %" in seen.reason and "10 %" in seen.reason
    loaded = decide(0.5, 0.4, 0.6, **OPTIONS, busy="other processes took 50% of our cores")
    assert loaded.verdict == "inconclusive" and "50%" in loaded.reason


def test_six_pairs_give_no_verdict_if_the_interval_spans_a_factor():
    wide = {"effect": 1.0, "low": 0.2, "high": 1.8}
    assert "factor of 5.0" in decide(*wide.values(), **OPTIONS | {"n": 6, "floor": 0.05}).reason
    assert decide(*wide.values(), **OPTIONS | {"n": 12, "floor": 0.05}).verdict == "better"


def test_few_processes_give_no_verdict_if_the_interval_spans_a_factor():
    """Three processes of twelve blocks are three samples: the baseline itself appeared faster by 1.16 to 8.13."""
    wide = {"effect": 1.0, "low": math.log(1.16), "high": math.log(8.13)}
    few = decide(*wide.values(), **OPTIONS | {"n": 36, "floor": 0.05}, processes=3)
    assert few.verdict == "inconclusive" and few.reason.startswith("3 processes") and "factor of 7.0" in few.reason
    assert decide(*wide.values(), **OPTIONS | {"n": 144, "floor": 0.05}, processes=12).verdict == "better"


@pytest.mark.parametrize(("sigma", "tau"), [(0.03, 0.0), (0.01, 0.01), (0.06, 0.005)])
def test_the_detectable_effect_is_found_four_times_out_of_five(sigma, tau):
    random, margin, n = np.random.default_rng(0), 0.02, 12
    called, trials = 0, 1500
    typical = [_effect(random, 0.0, sigma, tau, n) for _ in range(300)]
    floor = float(np.median([effect.half_width for effect in typical]))
    scatter = float(np.median([effect.scatter for effect in typical]))
    planted = detectable(floor, scatter, floor=floor, margin=margin)
    for _ in range(trials):
        effect = _effect(random, planted, sigma, tau, n)
        word = decide(
            effect.median, effect.low, effect.high, n=n, floor=floor, margin=margin, higher_is_better=True
        ).verdict
        called += word == "better"
    assert 0.70 <= called / trials <= 0.92


def _effect(random, planted: float, sigma: float, tau: float, n: int) -> paired_stats.Effect:
    return paired_stats.effect(planted + tau * random.normal() + sigma * random.normal(size=n), process_sigma=tau)


def test_an_interval_within_the_margin_is_not_called_wide():
    """The floor prevents the equivalence verdict, so the reason names the floor."""
    includes = decide(0.001, -0.005, 0.007, **OPTIONS | {"floor": 0.019}).reason
    assert "includes zero" in includes and "too wide" not in includes
    assert "with the noise floor of 1.9 % one beyond" in includes
    excludes = decide(0.015, 0.012, 0.0195, **OPTIONS).reason
    assert "with the noise floor of 1 % a larger one" in excludes and "reaches" not in excludes
    wide = decide(0.001, -0.03, 0.03, **OPTIONS).reason
    assert "too wide" in wide and "floor" not in wide
