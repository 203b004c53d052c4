"""Absorbed against stock decoding: the same tokens, and a gain for each part of a step."""

from types import SimpleNamespace

import pytest
import torch

from lib.models.decoding import mla_absorption
from lib.models.structure.replacements import no_op
from lib.optimizations.streaming_computation import absorbed_decoding

PROMPT = torch.randint(8, 96, (1, 20), generator=torch.Generator().manual_seed(2))


def test_absorbed_decoding_generates_the_same_and_is_timed_part_by_part(tiny, monkeypatch):
    model, counts = tiny("glm-4.7-flash"), []
    monkeypatch.setattr(absorbed_decoding.slice_depth, "whole", lambda model: ["dense"] + ["routed"] * 9)
    monkeypatch.setattr(absorbed_decoding.slice_depth, "stands_for", lambda model: [1.0, 3.0, 3.0, 3.0])
    whole_seconds = absorbed_decoding.full_depth.whole_seconds
    monkeypatch.setattr(
        absorbed_decoding.full_depth, "whole_seconds", lambda *args: (counts.append(args[2]), whole_seconds(*args))[1]
    )
    pairs, same, gains = absorbed_decoding.absorbed_against_stock(model, PROMPT, 40, 2)
    assert (
        same
        and len(pairs.baseline_seconds) == len(pairs.optimized_seconds) >= 6
        and not mla_absorption.is_absorbed(model)
    )
    assert gains["operations"] > 1 and min(gains.values()) > 0
    assert counts == [[1.0, 3.0, 3.0, 3.0]] * 6
    assert not any(block.attention.module._forward_hooks for block in absorbed_decoding.anatomy(model).blocks)
    monkeypatch.setattr(absorbed_decoding.slice_depth, "whole", lambda model: None)
    assert absorbed_decoding.absorbed_against_stock(model, PROMPT, 40, 1)[2]["at full depth"] is None


def test_a_block_without_attention_has_no_cache_to_repeat(tiny):
    model = no_op.remove(tiny("glm-4.7-flash"), 1, "attention")
    _, same, gains = absorbed_decoding.absorbed_against_stock(model, PROMPT, 40, 1)
    assert same and gains["operations"] > 1


@pytest.mark.parametrize(("scale", "wanted"), [("full", 2048), ("proxy", 4096)])
def test_a_model_with_few_positions_caches_only_what_leaves_room_for_the_steps(tiny, monkeypatch, scale, wanted):
    """At real size 8,192 tokens are cached: a model of 512 positions has no room for them or for the request."""
    model = tiny("glm-4.7-flash")
    window = lambda loaded, split, count, length, seed: torch.full((count, length), 9)  # noqa: E731
    monkeypatch.setattr(absorbed_decoding.task_list, "text_windows", window)
    loaded = SimpleNamespace(model=model, scale=scale, device="cpu")
    row = absorbed_decoding.compare(loaded, 64, wanted)
    assert row["context"] == 512 - (2 if scale == "full" else 4)


def test_the_table_shows_only_digits_that_the_interval_supports():
    """It printed 1.9022371853601359 and a bare pair of ends."""
    row = {"context": 2048, "same_tokens": True, "gain": 1.9022371853601359, "ci": (1.7482716832118572, 2.0607121266)}
    row |= {"gain, operations": 29.695283018867926, "gain, attention alone": 3.0976372125912937}
    row |= {"gain, at full depth": None, "stock_tokens_per_second": 50.867105010668425}
    shown = dict(absorbed_decoding.table(row).to_numpy().tolist())
    assert shown["gain of the step"] == "1.9× (95 % interval 1.75 to 2.06)" and shown["cached tokens"] == "2,048"
    assert shown["fewer operations, by formula"] == "29.7×" and shown["stock path, tokens/s"] == "50.9"
    assert "no slice" in shown["gain of the step at full depth, derived"]
    unsure = absorbed_decoding.table(row | {"ci": None, "gain, at full depth": 21.23, "same_tokens": False})
    assert list(unsure["value"])[1:3] == ["no", "1.9×"] and "21.2×" in list(unsure["value"])
    assert len(absorbed_decoding.table(None)) == 1
