"""The absorbed baseline of latent attention: what is compared with it, and models that have none."""

from dataclasses import dataclass

import pytest
import torch

from lib.measure.metrics import settings
from lib.models.decoding import mla_absorption
from lib.optimizations.common import absorbed_baseline

QUICK = settings.read("quick")
PROMPT = torch.randint(8, 96, (1, 20), generator=torch.Generator().manual_seed(2))


@dataclass
class _Compared:
    measurements: list


@dataclass
class _Measurement:
    metric: str


def test_decoding_is_held_against_the_absorbed_baseline(tiny, monkeypatch):
    base, other, seen = tiny("glm-4.7-flash"), tiny("glm-4.7-flash", seed=1), {}

    def compare(first, second, prompt, effort, **options):
        seen.update(options, first=first, second=second)
        return _Compared([_Measurement("decode_tokens_per_second"), _Measurement("model_flops_utilisation")])

    monkeypatch.setattr(absorbed_baseline.speed, "compare", compare)
    measurements = absorbed_baseline.against_absorbed(base, other, PROMPT, QUICK, seed=3)
    assert [measurement.metric for measurement in measurements] == ["decode_tokens_per_second"]
    assert mla_absorption.is_absorbed(seen["first"]) and not mla_absorption.is_absorbed(base)
    assert seen["second"] is other and seen["names"] == ("decode",) and seen["seed"] == 3
    assert next(seen["first"].parameters()) is next(base.parameters()), "weights were copied"


@pytest.mark.parametrize("plain", ["qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"])
def test_without_latents_there_is_nothing_to_hold_it_against(tiny, plain):
    model = tiny(plain)
    assert absorbed_baseline.against_absorbed(model, model, PROMPT, QUICK) == []
    assert absorbed_baseline.absorbed_baseline(model) is model
