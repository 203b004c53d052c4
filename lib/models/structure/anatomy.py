"""One view of all supported architectures: decoder blocks (attention and feed-forward part), embeddings, head, vision.

Parts are recognised by structure (attention with `kv_b_proj` is latent, a feed-forward part with `experts` routes),
never by the name of a model, so that an optimization is written once against this view. The view holds references to
the model's modules: create a new one after a structural change (`lib.models.structure.surgery`).

Transformers modules are typed Any, since their attributes differ between architectures. Knows nothing of measuring,
tokenizers or where weights come from.

Shapes: E experts, H hidden, I width of one expert, C channels of a dense feed-forward part.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SHARED = ("shared_experts", "shared_expert")  # attribute names of the expert that every token passes through


@dataclass(frozen=True)
class Attention:
    """Attention of one block. Head sizes are per head, in elements.

    `kind` is `grouped_query` (queries, keys and values are projected from hidden; query heads share `key_value_heads`),
    `latent` (queries, keys and values are expanded from latents, one slice per head; the cache stores the latents) or
    `none` (a block without attention, see `lib.models.structure.replacements.no_op`: every count is 0). `window`: the
    number of tokens that a token attends to, itself included; None if it attends to all earlier tokens.
    """

    module: Any
    kind: str
    heads: int
    key_value_heads: int
    head_dim: int
    value_dim: int
    latent_dim: int
    rope_dim: int
    window: int | None = None

    @property
    def output(self) -> nn.Linear:
        """Projection from the heads back to hidden, weight [H, heads × value_dim]."""
        return self.module.o_proj

    @property
    def cache_elements_per_token(self) -> int:
        """Number of elements that this block stores in the cache per token."""
        if self.kind == "latent":
            return self.latent_dim + self.rope_dim
        return self.key_value_heads * (self.head_dim + self.value_dim)

    def cached_tokens(self, context: float) -> float:
        """Return how many tokens of a context this block's cache holds: with a window, one less than its width, since
        the token that attends is not cached yet.
        """
        return context if self.window is None else min(context, self.window - 1)

    def attended_tokens(self, context: float) -> float:
        """Return how many tokens the last token of a context attends to, itself included."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Experts:
    """Routed experts of one block: `gate_up` [E, 2I, H] and `down` [E, H, I], chosen by `router` (weight [E, H])."""

    module: Any
    router: Any

    @property
    def gate_up(self) -> nn.Parameter:
        return self.module.gate_up_proj

    @property
    def down(self) -> nn.Parameter:
        return self.module.down_proj

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]

    @property
    def channels(self) -> int:
        return self.down.shape[2]

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """Bias [E] added to the router's scores for selection only, or None."""
        return getattr(self.router, "e_score_correction_bias", None)

    @property
    def groups(self) -> int:
        """Number of equal groups of experts, of which the router first chooses some (DeepSeek-V3); 1 without groups."""
        return getattr(self.router, "num_group", None) or getattr(self.router, "n_group", None) or 1

    @property
    def least_per_group(self) -> int:
        """Smallest group size with which the router works: it adds the two best scores of each group, and the chosen
        groups must hold `top_k` experts.
        """
        if self.groups == 1:
            return self.top_k
        return max(2, -(-self.top_k // self.router.topk_group))


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward part of one block: kind `dense`, `experts` (then `dense` is the shared expert or None) or `none`."""

    module: Any
    kind: str
    dense: Any
    experts: Experts | None

    @property
    def gate(self) -> nn.Linear | None:
        return getattr(self.dense, "gate_proj", None)

    @property
    def up(self) -> nn.Linear | None:
        return getattr(self.dense, "up_proj", None)

    @property
    def down(self) -> nn.Linear | None:
        return getattr(self.dense, "down_proj", None)

    @property
    def channels(self) -> int:
        """Number of channels of the dense part; 0 without a dense part."""
        return 0 if self.down is None else self.down.in_features


@dataclass(frozen=True)
class Block:
    """One decoder block: its index in the decoder, the module itself, and the views of its two parts."""

    index: int
    module: nn.Module
    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class Anatomy:
    """The whole model: `decoder` holds the list `decoder.layers`; `config` is the text configuration."""

    model: nn.Module
    decoder: Any
    config: Any
    blocks: list[Block]
    embeddings: nn.Embedding
    head: nn.Linear
    final_norm: nn.Module
    vision: nn.Module | None

    @property
    def hidden(self) -> int:
        return self.embeddings.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.embeddings.weight.shape[0]

    @property
    def fixed_blocks(self) -> int:
        """Number of leading blocks that must stay, since the vision tower adds features to their outputs by index."""
        return len(getattr(self.vision, "deepstack_merger_list", ()))

    @property
    def tied(self) -> bool:
        """Whether head and embeddings are one tensor."""
        return self.head.weight is self.embeddings.weight


def anatomy(model: nn.Module) -> Anatomy:
    """Return the view of `model`. Raises TypeError for an unsupported architecture."""
    inner: Any = getattr(model, "model", model)
    decoder: Any = getattr(inner, "language_model", inner)
    head: Any = getattr(model, "lm_head", None)
    if not hasattr(decoder, "layers") or head is None:
        raise TypeError(f"{type(model).__name__}: unsupported architecture: no decoder with `layers` and `lm_head`")
    blocks = [
        Block(index, layer, attention(layer.self_attn), feed_forward(layer.mlp))
        for index, layer in enumerate(decoder.layers)
    ]
    return Anatomy(
        model=model,
        decoder=decoder,
        config=decoder.config,
        blocks=blocks,
        embeddings=decoder.embed_tokens,
        head=head,
        final_norm=decoder.norm,
        vision=getattr(inner, "visual", None),
    )


def attention(module: Any) -> Attention:
    """Return the view of one attention module, with head counts from the shapes of its tensors."""
    if getattr(module, "absent", False):
        return Attention(module, "none", 0, 0, head_dim=0, value_dim=0, latent_dim=0, rope_dim=0)
    if hasattr(module, "kv_b_proj"):
        heads = module.o_proj.in_features // module.v_head_dim
        return Attention(
            module,
            "latent",
            heads,
            heads,
            head_dim=module.qk_nope_head_dim + module.qk_rope_head_dim,
            value_dim=module.v_head_dim,
            latent_dim=module.kv_lora_rank,
            rope_dim=module.qk_rope_head_dim,
        )
    size = module.head_dim
    return Attention(
        module,
        "grouped_query",
        heads=module.o_proj.in_features // size,
        key_value_heads=module.k_proj.out_features // size,
        head_dim=size,
        value_dim=size,
        latent_dim=0,
        rope_dim=size,
        window=_window(module),
    )


def _window(module: Any) -> int | None:
    """Return the sliding window of an attention module in tokens: the module's value, else the configuration's.

    Returns None if `layer_types` lists the block as not sliding (EXAONE 4 gives every module the same number).
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[min(module.layer_idx, len(kinds) - 1)] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def feed_forward(module: Any) -> FeedForward:
    """Return the view of one feed-forward module."""
    if getattr(module, "absent", False):
        return FeedForward(module, "none", None, None)
    if hasattr(module, "experts"):
        shared = next((getattr(module, name) for name in SHARED if getattr(module, name, None) is not None), None)
        return FeedForward(module, "experts", shared, Experts(module.experts, module.gate))
    return FeedForward(module, "dense", module, None)


def reset_rope_deltas(model: nn.Module) -> None:
    """Reset the position offset that a vision-language model stores for the images of its last prompt.

    Otherwise the offset shifts positions while decoding after the next text-only prompt. No effect on other models.
    """
    inner: Any = getattr(model, "model", None)
    if hasattr(inner, "rope_deltas"):
        inner.rope_deltas = None


def carry_rope_deltas(source: nn.Module, target: nn.Module) -> None:
    """Copy the position offset of the current prompt's images from `source` to `target`, which continues the prompt.

    The offset of an earlier prompt would shift the remaining positions. No effect if one of the models stores none.
    """
    inner_source: Any = getattr(source, "model", None)
    inner_target: Any = getattr(target, "model", None)
    if hasattr(inner_source, "rope_deltas") and hasattr(inner_target, "rope_deltas"):
        inner_target.rope_deltas = inner_source.rope_deltas
