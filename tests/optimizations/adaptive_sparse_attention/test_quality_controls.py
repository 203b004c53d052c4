"""Values to be retrieved from three places of a prompt: the same prompts for every arm, known answers used again."""

import pytest
import torch

from lib.optimizations.adaptive_sparse_attention import quality_controls


def test_values_are_asked_for_at_three_places_of_prompts_of_one_length(monkeypatch):
    prompts = []

    def retrieve(loaded, distance, count, seed, lead):
        prompts.append((loaded.model, lead, lead + distance + 16))
        return quality_controls.Retrieved(distance, torch.tensor([True, True, False, True]).numpy())

    monkeypatch.setattr(quality_controls.evaluate, "retrieval", retrieve)
    monkeypatch.setattr(quality_controls, "_with", lambda loaded, model: type("Arm", (), {"model": model}))
    retrieved = quality_controls.at_places(None, {"full": "a", "sparse": "b"}, 512, 4)
    assert {length for *_, length in prompts} == {512} and [lead for _, lead, _ in prompts[:3]] == [8, 248, 432]
    bars = quality_controls.place_bars(retrieved)
    assert list(bars["arm"][:2]) == ["start, full", "start, sparse"] and (bars["value"] == 0.75).all()
    assert (bars["low"] > 0.2).all() and (bars["high"] < 1).all()
    middle = retrieved["full"]["middle"]
    prompts.clear()
    quality_controls.at_places(None, {"full": "a"}, 512, 4, 0, {"full": {"middle": middle}})
    assert [lead for _, lead, _ in prompts] == [8, 432]
    with pytest.raises(ValueError, match="not to prompts of 256 tokens"):
        quality_controls.at_places(None, {"full": "a"}, 256, 4, 0, {"full": {"middle": middle}})
