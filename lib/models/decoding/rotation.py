"""Determines how an attention module rotates its cached keys: in halves (Llama), in neighbouring pairs (Cohere, ERNIE)
or not at all (some blocks of SmolLM3 and Cohere 2).

The module's own forward runs on one known key and a rotation by a right angle, until the key reaches a cache. No weight
is read, so the weights need not be in memory. Knows nothing of what is done with the keys.

Shapes: G key-value heads, D head size, P rotated part of it.
"""

import copy
from typing import Any, Literal

import torch
from torch import nn

from lib.errors import NotApplicable
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import Attention

Layout = Literal["halves", "neighbours"]
LAYOUTS: tuple[Layout, ...] = ("halves", "neighbours")


def layout_of(attention: Attention, width: int) -> Layout | None:
    """Return how an attention rotates the first `width` elements of its keys; None if it does not rotate them.

    Latent attention rotates in halves (`lib.models.structure.support`). Raises NotApplicable if neither layout matches.
    """
    if attention.kind == "latent":
        return "halves"
    key_D = torch.linspace(0.5, 1.5, attention.head_dim)
    cached_D = _cached(attention, key_D, width)
    if cached_D is not None and torch.allclose(cached_D, key_D):
        return None
    for layout in LAYOUTS:
        turned_D = torch.cat([quarter(key_D[:width], layout), key_D[width:]])
        if cached_D is not None and torch.allclose(cached_D, turned_D):
            return layout
    raise NotApplicable(f"{type(attention.module).__name__} rotates its keys in an unknown way")


def quarter(keys: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return keys [..., P] rotated by a right angle: every pair (a, b) of the layout becomes (−b, a)."""
    if layout == "halves":
        first, second = keys.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-keys[..., 1::2], keys[..., ::2]], dim=-1).flatten(-2)


def spread(values_F: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the values per frequency [F] repeated for both elements that the frequency rotates, [P]."""
    return values_F.repeat(2) if layout == "halves" else values_F.repeat_interleave(2)


class _Reached(Exception):
    """The key has reached the cache."""


class _Watching:
    """A cache that stores one key and ends the forward pass by raising `_Reached`."""

    keys: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, *_: object, **__: object) -> None:
        self.keys = key_states
        raise _Reached


class _Always(nn.Module):
    """Takes the place of a projection and returns the same values for every input."""

    def __init__(self, value_X: torch.Tensor):
        super().__init__()
        self.value_X = value_X

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value_X[None, None]


def _cached(attention: Attention, key_D: torch.Tensor, width: int) -> torch.Tensor | None:
    """Return the key that the attention caches after a rotation by a right angle, [D]; None if its forward fails."""
    shell: Any = copy.copy(attention.module)
    stubs: dict[str, nn.Module] = {
        name: nn.Identity() for name in ("q_norm", "k_norm") if getattr(shell, name, None) is not None
    }
    for name, heads in (("q_proj", attention.heads), ("k_proj", attention.key_value_heads)):
        stubs[name] = _Always(key_D.repeat(heads))
    stubs["v_proj"] = stubs["k_proj"]
    shell.__dict__["_modules"] = dict(attention.module._modules) | stubs
    watching = _Watching()
    angle: dict[str, Any] = {"position_embeddings": (torch.zeros(1, 1, width), torch.ones(1, 1, width))}
    try:
        hidden_11X = torch.zeros(1, 1, 1)
        type(shell).forward(shell, hidden_11X, attention_mask=None, **angle, **cache_names.as_kwargs(watching))
    except _Reached:
        assert watching.keys is not None
        return watching.keys[0, 0, 0]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return None
