"""Which architectures the view of `lib.models.structure.anatomy` knows: said in one line while planning, not by an
AttributeError in the middle of a run.

A model is judged by its parts, as the view recognises them, never by its name.
"""

from typing import Any

from torch import nn

# The model types that tests hold, by transformers' names; others of the same structure work too.
SUPPORTED = (
    "gemma2", "gemma3_text", "glm4_moe_lite", "granite", "llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "qwen3_vl",
)  # fmt: skip


def unsupported(model: nn.Module) -> str | None:
    """Return None, or in one line which part of `model` the view does not know, and which architectures it does."""
    lacking = _lacking(model)
    if lacking is None:
        return None
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return f'architecture "{name}" is not supported: {lacking}; supported are {", ".join(SUPPORTED)}'


def _lacking(model: nn.Module) -> str | None:
    inner: Any = getattr(model, "model", model)
    decoder: Any = getattr(inner, "language_model", inner)
    parts = {"layers": nn.ModuleList, "embed_tokens": nn.Module, "norm": nn.Module}
    missing = [name for name, kind in parts.items() if not isinstance(getattr(decoder, name, None), kind)]
    if missing or not isinstance(getattr(model, "lm_head", None), nn.Module):
        return f"no decoder with {(missing or ['lm_head'])[0]}"
    if hasattr(getattr(model, "config", None), "vision_config") and not isinstance(
        getattr(inner, "visual", None), nn.Module
    ):
        return "its pictures are read by no vision tower called visual"
    for index, layer in enumerate(decoder.layers):
        if reason := _unknown_attention(layer) or _unknown_feed_forward(layer):
            return f"block {index}: {reason}"
    return None


def _unknown_attention(layer: Any) -> str | None:
    module = getattr(layer, "self_attn", None)
    if getattr(module, "absent", False):
        return None
    latent = hasattr(module, "kv_b_proj")
    names = ("kv_b_proj", "o_proj") if latent else ("q_proj", "k_proj", "v_proj", "o_proj")
    lacking = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if lacking or not hasattr(module, "v_head_dim" if latent else "head_dim"):
        return f"no attention with separate projections ({', '.join(names)})"
    sinks = isinstance(getattr(module, "sinks", None), nn.Parameter)
    return "attention with learned sinks" if sinks else None


def _unknown_feed_forward(layer: Any) -> str | None:
    module = getattr(layer, "mlp", None)
    if getattr(module, "absent", False):
        return None
    experts = getattr(module, "experts", None)
    if experts is None:
        names = ("gate_proj", "up_proj", "down_proj")
        lacking = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
        return f"no feed-forward part with {', '.join(names)}" if lacking else None
    router = getattr(module, "gate", None)
    if not hasattr(router, "top_k") or not hasattr(router, "weight"):
        return "experts without a router called gate"
    if any("bias" in name for name, _ in experts.named_parameters()):
        return "experts with biases"
    return None
