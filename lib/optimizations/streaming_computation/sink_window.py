"""A cache of constant size for endless text: the first tokens (sinks) and the most recent ones stay, the middle is cut.

StreamingLLM (Xiao et al. 2024): positions count within the cache, not within the text, so they never exceed the range
that the model was trained on. Keys are stored rotated; when the middle is cut, the keys after it are rotated back by
the number of positions cut, which is exact because rotations add. The window may overrun by `slack` tokens before it is
cut, so that rotations are rare. Cut tokens are lost: the model reads on fluently but cannot retrieve them. Independent
of attention.

Shapes: B batch, G key-value heads, S cached tokens, D head size, P rotated part, F = P / 2 frequencies.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.errors import UserError
from lib.models.decoding import rotation
from lib.models.decoding.rotation import Layout
from lib.models.structure.anatomy import Anatomy, Block, anatomy


class SinkWindowLayer(DynamicLayer):
    """The cache of one block.

    `rotated` names the rotated tensor: "keys", or "values" for latent attention. `layout` is the layout of the rotation
    (`lib.models.decoding.rotation`), None in a block without rotation.
    """

    def __init__(
        self,
        sinks: int,
        window: int,
        slack: int,
        rotated: str,
        layout: Layout | None,
        inverse_frequency_F: torch.Tensor,
    ):
        super().__init__()
        self.sinks, self.window, self.slack = sinks, window, slack
        self.rotated, self.layout, self.inverse_frequency_F = rotated, layout, inverse_frequency_F
        self.forgotten = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states, then cut tokens outside the window; return the cache before the cut, [B, G, S, D]."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        excess = keys.shape[-2] - self.sinks - self.window
        if excess >= max(1, self.slack):
            self._cut(excess)
        return keys, values

    def _cut(self, excess: int) -> None:
        behind = self.sinks + excess
        for name in ("keys", "values"):
            cached = getattr(self, name)
            recent = cached[..., behind:, :]
            if name == self.rotated and self.layout is not None:
                recent = turn(recent, -excess, self.inverse_frequency_F, self.layout)
            setattr(self, name, torch.cat([cached[..., : self.sinks, :], recent], dim=-2))
        self.forgotten += excess


def turn(
    rotated: torch.Tensor, positions: int, inverse_frequency_F: torch.Tensor, layout: Layout = "halves"
) -> torch.Tensor:
    """Return keys [..., D], whose first P dimensions are rotated (all if D = P), rotated further by `positions`.

    Computed in float32.
    """
    angle, width = positions * inverse_frequency_F.float(), 2 * len(inverse_frequency_F)
    cos, sin = (rotation.spread(each_F, layout) for each_F in (angle.cos(), angle.sin()))
    turning, still = rotated[..., :width].float(), rotated[..., width:]
    turned = turning * cos + rotation.quarter(turning, layout) * sin
    return torch.cat([turned.to(rotated.dtype), still], dim=-1)


def whole_cache() -> DynamicCache:
    """Return an empty cache that keeps everything."""
    return DynamicCache()


def windowed_cache(model: nn.Module, *, sinks: int = 4, window: int = 256, slack: int = 1) -> DynamicCache:
    """Return an empty cache for `model` that holds at most sinks + window + slack − 1 tokens between steps.

    A longer prompt has to be read in chunks (`lib.models.decoding.chunked.chunk_prefill`). Raises UserError for numbers
    out of range, or for more tokens than the model has positions; NotApplicable if keys rotate in an unknown layout.
    """
    view = anatomy(model)
    if sinks < 0 or window < 1 or slack < 1:
        raise UserError(
            f"window: sinks {sinks}, window {window}, slack {slack}; expected sinks >= 0, window >= 1, slack >= 1"
        )
    if sinks + window + slack > view.config.max_position_embeddings:
        raise UserError(
            f"window: {sinks} sinks, {window} recent and {slack} spare tokens are more than this model's "
            f"{view.config.max_position_embeddings} positions; choose a smaller window"
        )
    cache = DynamicCache()
    cache.layers = [
        _layer(view, block, sinks, window, slack) for block in view.blocks if block.attention.kind != "none"
    ]
    return cache


def _layer(view: Anatomy, block: Block, sinks: int, window: int, slack: int) -> SinkWindowLayer:
    frequencies_F = _frequencies(view, block)
    layout = rotation.layout_of(block.attention, 2 * len(frequencies_F))
    rotated = "values" if block.attention.kind == "latent" else "keys"
    return SinkWindowLayer(sinks, window, slack, rotated, layout, frequencies_F)


def _frequencies(view: Anatomy, block: Block) -> torch.Tensor:
    """Return the inverse frequencies [F] of a block; some models have separate ones per kind of layer (Gemma 3)."""
    rotary, kinds = view.decoder.rotary_emb, getattr(view.config, "layer_types", None) or ()
    own = f"{kinds[block.index]}_inv_freq" if kinds else "inv_freq"
    return getattr(rotary, own if hasattr(rotary, own) else "inv_freq")
