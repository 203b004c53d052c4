"""Checks whether `lib.models.structure.anatomy` can view a model, so that planning reports an unsupported architecture
in one line, instead of an AttributeError in the middle of a run.

A model is judged by its parts, as the view recognises them, never by its name.
"""

import sys
from typing import Any

import torch
from torch import nn

from lib.models.structure.anatomy import SHARED
from lib.models.structure.supported import SUPPORTED

# The weights of a part that the view knows. Any further weight (a gate over heads, a norm over channels, an indexer)
# would be ignored when the part is cut, sorted or replaced.
GROUPED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
LATENT = (
    "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj",
)  # fmt: skip
DENSE = ("gate_proj", "up_proj", "down_proj")
ROUTED = ("experts", "gate", *SHARED, "shared_expert_gate")
ROUTER = ("weight", "e_score_correction_bias")
ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")  # absorbed decoding calls one of them


def unsupported(model: nn.Module) -> str | None:
    """Return None, or one line that names the unsupported part of `model` and the supported architectures."""
    lacking = _lacking(model)
    if lacking is None:
        return None
    return refusal(getattr(getattr(model, "config", None), "model_type", type(model).__name__), lacking)


def refusal(architecture: str, lacking: str) -> str:
    """Return one line that says why an architecture is unsupported (`lacking`) and which ones are supported."""
    return f'architecture "{architecture}" is not supported: {lacking}; supported are {", ".join(SUPPORTED)}'


def _lacking(model: nn.Module) -> str | None:
    inner: Any = getattr(model, "model", model)
    decoder: Any = getattr(inner, "language_model", inner)
    parts = {"layers": nn.ModuleList, "embed_tokens": nn.Module, "norm": nn.Module}
    missing = [name for name, kind in parts.items() if not isinstance(getattr(decoder, name, None), kind)]
    if missing or not isinstance(getattr(model, "lm_head", None), nn.Module):
        return f"no decoder with {(missing or ['lm_head'])[0]}"
    if getattr(getattr(model, "config", None), "vision_config", None) is not None and not isinstance(
        getattr(inner, "visual", None), nn.Module
    ):
        return "it reads images, but has no vision tower called visual"
    if getattr(getattr(decoder, "config", None), "is_heterogeneous", False):
        return "its blocks have configurations of their own (per_layer_config)"
    for index, layer in enumerate(decoder.layers):
        if reason := _unknown_attention(layer) or _unknown_feed_forward(layer) or _unknown_rest(layer):
            return f"block {index}: {reason}"
    return None


def _beyond(module: Any, known: tuple[str, ...], *, buffers: bool = False) -> str | None:
    """Return the first weight (with `buffers`, also buffer) of a module whose name is not in `known`, or None."""
    tensors = [*module.named_parameters(), *(module.named_buffers() if buffers else ())]
    return next((name for name, _ in tensors if name.partition(".")[0] not in known), None)


def _unknown_attention(layer: Any) -> str | None:
    module = getattr(layer, "self_attn", None)
    if getattr(module, "absent", False):
        return None
    latent = hasattr(module, "kv_b_proj")
    names = ("kv_b_proj", "o_proj") if latent else ("q_proj", "k_proj", "v_proj", "o_proj")
    lacking = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if lacking or not hasattr(module, "v_head_dim" if latent else "head_dim"):
        return f"no attention with separate projections ({', '.join(names)})"
    if isinstance(getattr(module, "sinks", None), nn.Parameter):
        return "attention with learned sinks"
    if weight := _beyond(module, LATENT if latent else GROUPED):
        return f"attention with an unknown weight ({weight})"
    if not latent and _of_other_widths(module):
        return "attention whose values are not as wide as its keys, or whose output projection does not fit its queries"
    file = sys.modules.get(type(module).__module__)
    if latent and not any(hasattr(file, name) for name in ROTATIONS):
        return f"latent attention that rotates by none of {', '.join(ROTATIONS)}"
    return None


def _of_other_widths(module: Any) -> bool:
    """Return whether the widths of grouped-query attention contradict the head counts of the view, which come from the
    output projection and the keys. MiMo's values are narrower than its keys, Qwen3-Next's queries include a gate.
    """
    queries, keys, values = (getattr(getattr(module, name), "out_features", None) for name in GROUPED[:3])
    output = getattr(module.o_proj, "in_features", None)
    known = None not in (queries, keys, values, output)
    return not known or (queries, keys) != (output, values) or bool(queries % module.head_dim or keys % module.head_dim)


def _unknown_feed_forward(layer: Any) -> str | None:
    module = getattr(layer, "mlp", None)
    if getattr(module, "absent", False):
        return None
    experts = getattr(module, "experts", None)
    if experts is None:
        names = DENSE
        lacking = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
        if lacking:
            return f"no feed-forward part with {', '.join(names)}"
        weight = _beyond(module, DENSE)
        return f"a feed-forward part with an unknown weight ({weight})" if weight else None
    router = getattr(module, "gate", None)
    if not hasattr(router, "top_k") or not hasattr(router, "weight"):
        return "experts without a router called gate"
    if any("bias" in name for name, _ in experts.named_parameters()):
        return "experts with biases"
    if name := _beyond(module, ROUTED, buffers=True) or _beyond(router, ROUTER, buffers=True):
        return f"experts or a router with an unknown tensor ({name})"
    return "experts with an unknown gating function" if _gates_otherwise(experts) else None


def _gates_otherwise(experts: Any) -> bool:
    """Return whether experts compute something other than activation(gate) · up, with gate and up concatenated."""
    if not hasattr(experts, "_apply_gate"):  # our own replacement of experts that passed this check
        return False
    ends = (-30, 30), (40, -20)  # outside the range of a clamp
    both = torch.cat([torch.linspace(*pair, 61, device="cpu") for pair in ends])[None]
    gate, up = both.chunk(2, dim=-1)
    return not torch.allclose(experts._apply_gate(both), experts.act_fn(gate) * up)


def _unknown_rest(layer: nn.Module) -> str | None:
    """Return the reason if a block has a matrix outside attention and feed-forward part; None if it has only norms."""
    for name, parameter in layer.named_parameters():
        if name.partition(".")[0] not in ("self_attn", "mlp") and parameter.ndim > 1:
            return f"a matrix outside attention and feed-forward part ({name})"
    return None
