"""Planted interactions and Shapley values are found, none are found where none exist, and rounds are balanced."""

import itertools

import numpy as np
import pytest

from lib.measure.metrics import process_variance
from lib.measure.timing import interleaved
from lib.optimizations.common.evidence import interactions, shapley

PARTS = ("a", "b", "c")


def _values(effect, samples: int = 400, spread: float = 0.01):
    random = np.random.default_rng(0)
    return {chosen: effect(chosen) + spread * random.normal(size=samples) for chosen in shapley.subsets(PARTS)}


def test_subsets_are_ordered_and_limited():
    assert shapley.subsets(("a", "b")) == [(), ("a",), ("b",), ("a", "b")]
    with pytest.raises(ValueError, match="32 subsets"):
        shapley.subsets("abcde")


def test_additive_parts_get_their_own_effect():
    own = {"a": 0.3, "b": -0.1, "c": 0.0}
    shares = shapley.shapley(PARTS, _values(lambda chosen: sum(own[part] for part in chosen)))
    for part, value_S in shares.items():
        estimate = shapley.over_items(value_S)
        assert estimate.low <= own[part] <= estimate.high and abs(estimate.value - own[part]) < 0.01


def test_a_planted_interaction_is_shared_and_the_parts_add_up_to_the_whole():
    own = {"a": 0.3, "b": 0.1, "c": 0.2}
    values = _values(lambda chosen: sum(own[p] for p in chosen) + (0.4 if {"a", "b"} <= set(chosen) else 0))
    shares = shapley.shapley(PARTS, values)
    assert [round(float(shares[part].mean()), 2) for part in PARTS] == [0.5, 0.3, 0.2]
    np.testing.assert_allclose(sum(shares.values()), values[PARTS] - values[()], atol=1e-12)
    both = shapley.over_items(shapley.interaction(values[()], values["a",], values["b",], values["a", "b"]))
    none = shapley.over_items(shapley.interaction(values[()], values["a",], values["c",], values["a", "c"]))
    assert both.clear and abs(both.value - 0.4) < 0.01 and not none.clear


def test_shapley_is_the_mean_over_all_orders_of_joining():
    random = np.random.default_rng(1)
    values = {chosen: random.normal(size=1) for chosen in shapley.subsets(PARTS)}
    shares = shapley.shapley(PARTS, values)
    for part in PARTS:
        gains = []
        for order in itertools.permutations(PARTS):
            before = tuple(p for p in PARTS if p in order[: order.index(part)])
            joined = tuple(p for p in PARTS if p in before or p == part)
            gains.append(values[joined] - values[before])
        np.testing.assert_allclose(shares[part], np.mean(gains, axis=0))


def test_interactions_of_timed_arms_and_losses():
    shared = np.random.default_rng(2).normal(size=12)
    shares = {"baseline": 1.0, "x": 0.8, "y": 0.9, "x → y": 0.5, "y → x": 0.7}  # y → x saves what both save alone
    seconds = {arm: list(share * np.exp(shared)) for arm, share in shares.items()}
    timed = {"prefill": interleaved.Rounds(seconds, 1, [None] * 12, [list(shares)] * 12)}
    lost = {
        arm: np.full(8, value) for arm, value in {"baseline": 1, "x": 1.1, "y": 1.2, "x → y": 1.6, "y → x": 1.3}.items()
    }
    states = {("x", "y"): ("works", None), ("y", "x"): ("works", None), ("x", "z"): ("refused", "no")}
    rows = interactions.interactions(timed, lost, states)
    assert [round(row.get("prefill", 0), 6) for row in rows] == [0.2, 0.0, 0]
    assert [round(row.get("prefill_both", 0), 6) for row in rows] == [0.693147, 0.356675, 0], "the log-speed of both"
    assert [round(row.get("loss", 0), 6) for row in rows] == [0.3, 0.0, 0] and rows[2]["reason"] == "no"
    (order,) = interactions.order_effects(timed, lost, states)
    assert round(order["prefill"], 6) == round(np.log(0.7 / 0.5), 6) and round(order["loss"], 6) == 0.3
    (alone,) = interactions.singles([timed, timed], lost, ["x"])
    hidden = 1.96 * process_variance.between_processes("prefill").sigma
    assert alone["prefill_low"] == pytest.approx(-np.log(0.8) - hidden) and alone["loss"] == pytest.approx(0.1)
