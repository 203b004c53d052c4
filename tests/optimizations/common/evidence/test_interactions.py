"""Arms timed together are copies of equal age, and an interval includes the variation that one process hides."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from lib.measure.metrics import process_variance
from lib.measure.timing import control, workloads
from lib.measure.timing.interleaved import Rounds
from lib.models.decoding import chunked
from lib.optimizations.common.evidence import interactions, shapley
from lib.optimizations.pre_vs_post_optimization import attribution


def _timed(model) -> list[int]:
    """Time two arms; return the addresses of the weights that were passed in."""
    arms = {interactions.BASELINE: model, "other": copy.deepcopy(model)}
    interactions.time_arms(arms, torch.arange(8, 24)[None], 2, 0, 2, 2)
    return [arm.get_input_embeddings().weight.data_ptr() for arm in arms.values()]


def test_models_are_timed_as_fresh_copies(tiny, monkeypatch):
    seen, prefill, steps = set(), workloads.prefill, workloads.steps

    def watched(make):
        def made(model, *arguments):
            seen.add(model.get_input_embeddings().weight.data_ptr())
            return make(model, *arguments)

        return made

    monkeypatch.setattr(workloads, "prefill", watched(prefill))
    monkeypatch.setattr(workloads, "steps", watched(steps))
    model = tiny("qwen3-4b-instruct-2507")
    passed_in = _timed(model)
    assert len(seen) == 2 and not seen & set(passed_in)
    seen.clear()
    monkeypatch.setattr(control, "separate_copy", lambda given: (given, "no room" if given is model else None))
    assert seen | {*_timed(model)} == seen, "all or none: a copy beside an old model would be of another age"


def test_copies_are_freed_even_if_they_reference_themselves(tiny, monkeypatch):
    copies, separate_copy = [], control.separate_copy

    def watched(model):
        made, reason = separate_copy(model)
        copies.append(weakref.ref(made.model))  # the decoder, whose method it is
        return made, reason

    monkeypatch.setattr(control, "separate_copy", watched)
    model = tiny("qwen3-4b-instruct-2507")
    arms = {interactions.BASELINE: model, "chunked": chunked.chunk_prefill(copy.deepcopy(model), 6)}
    gc.disable()
    try:
        timed = interactions.time_arms(arms, torch.arange(8, 24)[None], 2, 0, 2, 2)
        assert len(copies) == 2 and all(made() is None for made in copies)
    finally:
        gc.enable()
    assert timed["prefill"].copied and interactions.timed_on([timed]) == "copies made for them"


def test_a_copy_with_other_outputs_is_not_timed_and_this_is_reported(tiny, monkeypatch):
    model, other = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507", seed=5)
    arms = {interactions.BASELINE: model, "other": copy.deepcopy(model)}
    sound = interactions.time_arms(arms, torch.arange(8, 24)[None], 2, 0, 2, 2)
    copies = {id(model): other}
    monkeypatch.setattr(control, "separate_copy", lambda given: (copies.get(id(given)) or copy.deepcopy(given), None))
    timed = interactions.time_arms(arms, torch.arange(8, 24)[None], 2, 0, 2, 2)
    assert not timed["prefill"].copied and not timed["decode"].copied
    assert interactions.timed_on([timed]) == "the models themselves"
    assert interactions.timed_on([sound, timed]).endswith("in 1 of 2 cases the models themselves")


def test_equal_arms_keep_the_interval_of_variation_between_processes():
    sigma = process_variance.between_processes("prefill").sigma
    names = [interactions.named(*subset) for subset in shapley.subsets(("x", "y"))]
    rounds = Rounds({name: [1.0] * 12 for name in [*names, "y → x"]}, 1, [None] * 12, [names] * 12)
    states = {("x", "y"): ("works", None), ("y", "x"): ("works", None)}
    (single, *_), (pair, *_) = (
        interactions.singles([{"prefill": rounds}], {}, ["x"]),
        interactions.interactions({"prefill": rounds}, {}, states),
    )
    (order,) = interactions.order_effects({"prefill": rounds}, {}, states)
    shares = attribution.attribute(["x", "y"], {"prefill": rounds}, {})
    widths = [row["prefill_high"] - row["prefill_low"] for row in (single, order, pair)]
    widths += [row["high"] - row["low"] for row in shares]
    # Four models each vary by σ/√2; the Shapley weights of two parts are one half each.
    models = np.asarray([2, 2, 4, 1, 1, 2])
    assert widths == pytest.approx(2 * 1.96 * sigma * np.sqrt(models / 2))
    assert shares[-1]["part"] == attribution.WHOLE


def test_interactions_in_time_shares_weigh_each_arm_by_its_time():
    sigma = process_variance.between_processes("prefill").sigma
    seconds = {"baseline": [1.0] * 12, "x": [0.5] * 12, "y": [0.5] * 12, "x → y": [0.25] * 12}
    rounds = Rounds(seconds, 1, [None] * 12, [list(seconds)] * 12)
    (row,) = interactions.interactions({"prefill": rounds}, {}, {("x", "y"): ("works", None)})
    squares = 0.25**2 + 2 * 0.5**2 + 0.75**2
    assert row["prefill_high"] - row["prefill"] == pytest.approx(1.96 * sigma * np.sqrt(squares / 2))


def test_window_losses_of_one_document_are_resampled_together():
    names = ["baseline", "x", "y", "x → y", "y → x"]
    steps = np.repeat([0.0, 0.1], 6)
    lost = {name: 2 + at * steps for at, name in enumerate(names)}
    states = {("x", "y"): ("works", None), ("y", "x"): ("works", None)}
    documents, stems = np.repeat([0, 1], 6), ["x", "y"]

    def rows(source_N):
        return [
            *interactions.singles([], lost, stems, source_N),
            *interactions.interactions({}, lost, states, source_N),
            *interactions.order_effects({}, lost, states, source_N),
            *interactions.staleness(lost, {("x", "y"): lost["baseline"]}, source_N),
        ]

    for apart, together in zip(rows(np.arange(12)), rows(documents), strict=True):
        if apart["loss"] != 0:
            assert together["loss_high"] - together["loss_low"] > 2 * (apart["loss_high"] - apart["loss_low"])
        assert together["loss"] == apart["loss"]
