"""Decoding at several allowances and against accelerate's offloading, on tiny models: what each arm really is."""

import pytest
import torch

from lib.measure.timing import workloads
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import memory_tradeoff, method, offload_baseline

LATENT, OTHER = "glm-4.7-flash", "qwen3-4b-instruct-2507"
PROMPT = torch.arange(8, 24)[None]


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder that a tiny model with latent attention is saved in."""
    return io.save(tiny(LATENT), tmp_path / "model")


def _absorbed(model) -> bool:
    """Return whether every attention decodes absorbed, below a hook of accelerate's or not."""
    forwards = [getattr(block.attention.module, "_old_forward", None) for block in anatomy(model).blocks]
    hooked = [getattr(forward, "__func__", None) is mla_absorption._forward for forward in forwards if forward]
    return all(hooked) if hooked else mla_absorption.is_absorbed(model)


def test_every_rival_of_streaming_decodes_latents_absorbed(tiny, folder, monkeypatch):
    seen, steps = [], workloads.steps

    def watched(model, *arguments, **options):
        seen.append(_absorbed(model))
        return steps(model, *arguments, **options)

    monkeypatch.setattr(workloads, "steps", watched)
    resident = tiny(LATENT)
    memory_tradeoff.by_allowance(resident, PROMPT, 2, folder, [1.0])
    streamed = method.open_folder(folder, memory_ratio=1.0)
    _, same = offload_baseline.compare(streamed, folder, PROMPT, 2)
    assert same and len(seen) == 2 * 3 + 1 + 2 and all(seen)
    assert not mla_absorption.is_absorbed(resident), "the caller's model is as it was"
