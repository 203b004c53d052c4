"""The second baseline of latent attention: what is compared with it, and models that have none."""

import pytest
import torch

from lib.measure.metrics import settings
from lib.models.decoding import mla_absorption
from lib.optimizations.streaming_computation import experiment

QUICK = settings.read("quick")
PROMPT = torch.randint(8, 96, (1, 20), generator=torch.Generator().manual_seed(2))


class _Compared:
    def __init__(self, measurements):
        self.measurements = measurements


class _One:
    def __init__(self, metric):
        self.metric = metric


def test_decoding_is_held_against_the_absorbed_baseline(tiny, monkeypatch):
    base, other, seen = tiny("glm-4.7-flash"), tiny("glm-4.7-flash", seed=1), {}

    def compare(first, second, prompt, asked, **options):
        seen.update(options, first=first, second=second)
        return _Compared([_One("decode_tokens_per_second"), _One("model_flops_utilisation")])

    monkeypatch.setattr(experiment.speed, "compare", compare)
    found = experiment.against_absorbed(base, other, PROMPT, QUICK, seed=3)
    assert [one.metric for one in found] == ["decode_tokens_per_second"]
    assert (
        mla_absorption.is_absorbed(seen["first"]) and not mla_absorption.is_absorbed(base) and seen["second"] is other
    )
    assert seen["names"] == ("decode",) and seen["seed"] == 3
    assert next(seen["first"].parameters()) is next(base.parameters()), "weights were copied"


@pytest.mark.parametrize("plain", ["qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"])
def test_without_latents_there_is_nothing_to_hold_it_against(tiny, plain):
    model = tiny(plain)
    assert experiment.against_absorbed(model, model, PROMPT, QUICK) == []


def test_absorbed_decoding_says_the_same_and_is_told_part_by_part(tiny, monkeypatch):
    model, asked = tiny("glm-4.7-flash"), []
    monkeypatch.setattr(experiment.depth, "whole", lambda model: ["dense"] + ["routed"] * 9)
    monkeypatch.setattr(experiment.depth, "stands_for", lambda model: [1.0, 3.0, 3.0, 3.0])
    whole_seconds = experiment.full_depth.whole_seconds
    monkeypatch.setattr(
        experiment.full_depth, "whole_seconds", lambda *args: (asked.append(args[2]), whole_seconds(*args))[1]
    )
    pairs, same, gains = experiment.absorbed_against_stock(model, PROMPT, 40, 2)
    assert (
        same
        and len(pairs.baseline_seconds) == len(pairs.optimized_seconds) >= 6
        and not mla_absorption.is_absorbed(model)
    )
    assert gains["operations"] > 1 and min(gains.values()) > 0
    assert asked == [[1.0, 3.0, 3.0, 3.0]] * 6
    assert not any(block.attention.module._forward_hooks for block in experiment.anatomy(model).blocks)
    monkeypatch.setattr(experiment.depth, "whole", lambda model: None)
    assert experiment.absorbed_against_stock(model, PROMPT, 40, 1)[2]["at full depth"] is None
