"""Tiny random models of architectures outside the workbench's four, such as users bring.

Weights, norms and biases are random, so that a mistake in any of them changes the logits.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from lib.models.structure.architecture import auto_class, ready

VOCABULARY = 96
BASE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
BASE |= {"max_position_embeddings": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
BASE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": ROUTED | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": ROUTED | {"head_dim": 8, "decoder_sparse_step": 2},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.3},
    "gemma2": ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe_lite": {
        "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
        "topk_group": 1,
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {  # unsupported structures: refused by name
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_next": ROUTED | {"head_dim": 8},
    "bitnet": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v2": {
        "num_key_value_heads": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}


def build(name: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a tiny random model (float32, ready for inference) of the architecture `name`."""
    own = MODELS.get(name, OTHERS.get(name, {}))
    settings = own if name == "gpt2" else BASE | own
    config = AutoConfig.for_model(name, **(settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for buffer_name, buffer in model.named_buffers():
                if "correction_bias" in buffer_name:
                    buffer.add_(torch.randn_like(buffer) * 0.1)
    return ready(model)


def prompt(batch: int = 2, tokens: int = 24, seed: int = 3) -> torch.Tensor:
    """Return random token ids [B, T], longer than the windows of the models above."""
    return torch.randint(4, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
