"""Logits equal the model's own forward where an architecture scales or caps them after the head, on every path."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lib.measure.quality import evaluate
from lib.models.calibration import walk
from lib.models.decoding import chunked
from lib.models.structure import logits
from lib.optimizations.continuous_nas import scoring

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 96, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
AFTER_THE_HEAD = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 64},
    "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 64},
    "llama": {},
}


def random_model(architecture: str, seed: int = 0) -> nn.Module:
    """Return a tiny random model of an architecture, with weights large enough that a cap on its logits shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **SIZES, **AFTER_THE_HEAD[architecture])
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=AFTER_THE_HEAD)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(1))


def test_logits_of_hidden_states_match_the_forward(architecture, ids_NT):
    model = random_model(architecture)
    expected_NTV, hidden_NTH = model(ids_NT).logits, model.model(ids_NT).last_hidden_state
    assert torch.equal(logits.logits_of(model, hidden_NTH), expected_NTV)
    pieces = list(logits.in_chunks(model, hidden_NTH[0], elements=96 * 5))
    assert len(pieces) == 5 and torch.allclose(torch.cat(pieces), expected_NTV[0], atol=1e-5)
    bare_NTV = model.lm_head(hidden_NTH)
    assert torch.allclose(bare_NTV, expected_NTV) == (architecture == "llama")  # or the test would show nothing


def test_losses_divergences_and_replayed_blocks_match_the_forward(architecture, ids_NT):
    model, other = random_model(architecture), random_model(architecture, seed=3)
    expected_N = [model(row[None], labels=row[None]).loss.item() for row in ids_NT]
    text = evaluate.read(model, ids_NT)
    assert text.loss_N == pytest.approx(expected_N, rel=1e-5)
    assert chunked.losses(model, ids_NT, rows=7).mean(1).tolist() == pytest.approx(expected_N, rel=1e-5)
    whole = [arm(ids_NT).logits.log_softmax(-1) for arm in (model, other)]
    kl = nn.functional.kl_div(whole[1], whole[0], reduction="sum", log_target=True).item() / ids_NT.numel()
    assert evaluate.divergence(text, evaluate.read(other, ids_NT))[0].mean() == pytest.approx(kl, rel=1e-4)
    probe = scoring.probe(model, [{"input_ids": ids_NT}])
    assert scoring.divergence(model, probe) == pytest.approx(0, abs=1e-6)
    (entered,) = walk.enter(model, [{"input_ids": ids_NT}])
    assert torch.allclose(walk.finish(model, entered, 0), model(ids_NT).logits, atol=1e-4)


def test_a_replaced_head_is_used(ids_NT):
    model = random_model("granite")
    hidden_NTH = model.model(ids_NT).last_hidden_state
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    assert torch.equal(logits.logits_of(model, hidden_NTH), model(ids_NT).logits)


def test_the_model_itself_is_unchanged(ids_NT):
    model = random_model("gemma2")
    before = dict(model._modules)
    shell = logits.without_decoder(model)
    assert dict(model._modules) == before and shell.lm_head is model.lm_head
    assert math.isfinite(model(ids_NT).logits.sum().item())
    assert not list(shell.model.parameters())
