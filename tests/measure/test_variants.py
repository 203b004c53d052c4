"""The second baseline of latent attention: what is compared with it, and models that have none."""

import pytest
import torch

from lib.measure import effort, variants
from lib.models import absorbed

QUICK = effort.read("quick")
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

    monkeypatch.setattr(variants.speed, "compare", compare)
    found = variants.against_absorbed(base, other, PROMPT, QUICK, seed=3)
    assert [one.metric for one in found] == ["decode_tokens_per_second"]
    assert absorbed.is_absorbed(seen["first"]) and not absorbed.is_absorbed(base) and seen["second"] is other
    assert seen["names"] == ("decode",) and seen["seed"] == 3
    assert next(seen["first"].parameters()) is next(base.parameters()), "weights were copied"


@pytest.mark.parametrize("plain", ["qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"])
def test_without_latents_there_is_nothing_to_hold_it_against(tiny, plain):
    model = tiny(plain)
    assert variants.against_absorbed(model, model, PROMPT, QUICK) == []
