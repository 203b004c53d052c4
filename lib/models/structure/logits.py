"""Logits of hidden states as the model itself computes them: the head, and what the model does to the head's output.

Some architectures scale the logits (granite) or soft-cap them (gemma 2) after the head, so a product with the head's
weight alone is not the model's output. `logits_of` runs the model's own forward with a decoder that returns the given
states, which is right for every architecture and every head that an optimization replaces, without special cases. Knows
nothing of what the logits are used for.

Shapes: B sequences, T tokens, H hidden, V vocabulary, C tokens of a chunk; `...` any leading dimensions.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CHUNK_ELEMENTS = 2**24  # logits held at a time


class GivenStates(nn.Module):
    """Takes the place of a decoder and returns the hidden states passed to it, whatever the other arguments are."""

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> "Outputs":
        """Return `inputs_embeds` as the last hidden states."""
        return Outputs(inputs_embeds)


class Outputs:
    """The outputs of a decoder with nothing but the last hidden states; every other attribute is None."""

    def __init__(self, hidden_BTH: torch.Tensor):
        self.last_hidden_state = hidden_BTH

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None


def without_decoder(model: nn.Module) -> Any:
    """Return a shallow copy of the outermost module, sharing all parts, whose decoder is a `GivenStates`."""
    shell: Any = copy.copy(model)
    shell.__dict__.pop("forward", None)  # a replaced forward is bound to the original model
    shell.__dict__["_modules"] = dict(model._modules) | {"model": GivenStates()}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        shell.__dict__[name] = type(getattr(model, name))()
    return shell


def logits_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [..., V] of last hidden states [..., H] (after the final norm), in the model's dtype."""
    head: Any = model.get_submodule("lm_head")
    flat_1CH = hidden.reshape(1, -1, hidden.shape[-1]).to(head.weight.device)
    output = without_decoder(model)(inputs_embeds=flat_1CH, use_cache=False)
    return output.logits.reshape(*hidden.shape[:-1], -1)


def in_chunks(model: nn.Module, hidden_TH: torch.Tensor, elements: int = CHUNK_ELEMENTS) -> Iterator[torch.Tensor]:
    """Yield the logits of hidden_TH in chunks of rows [C, V], in float32, at most about `elements` at a time."""
    for hidden_CH in hidden_TH.split(rows_at_once(model, elements)):
        yield logits_of(model, hidden_CH).float()


def rows_at_once(model: nn.Module, elements: int = CHUNK_ELEMENTS) -> int:
    """Return how many rows of logits have about `elements` elements together; at least 1."""
    head: Any = model.get_submodule("lm_head")
    return max(1, elements // head.weight.shape[0])
