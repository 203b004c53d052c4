"""How deep the whole model is that a slice was cut from, and which of its blocks each block of the slice stands for.

A slice carries the kinds of all blocks of the whole model in its configuration, so a copy of it, or one that was saved
and read again, still knows them. Knows nothing of time or memory.
"""

from collections import Counter

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from lib.models.structure.anatomy import anatomy
from lib.models.structure.architecture import auto_class

NAME = "whole_blocks"  # of the text configuration


def kinds(model: nn.Module) -> list[str]:
    """Return the kind of each block: of its feed-forward part, which is where the blocks of one model differ."""
    return [block.feed_forward.kind for block in anatomy(model).blocks]


def state(model: nn.Module, whole: dict, architecture: str) -> nn.Module:
    """Write into a slice the blocks of the model with configuration `whole` (built without weights); return it."""
    configuration = AutoConfig.for_model(architecture, **whole)
    with init_empty_weights():
        found = kinds(auto_class(configuration).from_config(configuration))
    setattr(anatomy(model).config, NAME, found)
    return model


def whole(model: nn.Module) -> list[str] | None:
    """Return the kinds of the whole model's blocks, or None where `model` is not a slice of another."""
    return getattr(anatomy(model).config, NAME, None)


def stands_for(model: nn.Module) -> list[float] | str:
    """Return for each block of a slice, as it was cut, how many blocks of the whole model it stands for.

    Blocks of one kind share those of that kind. Where the slice has none of a kind, or no longer as many blocks as it
    began with, the reason why nothing can be told is returned.
    """
    named, own = Counter(whole(model) or []), kinds(model)
    if lacking := sorted(set(named) - set(own)):
        return f"the slice has no block of kind {lacking[0]}, of which the whole model has {named[lacking[0]]}"
    held = Counter(own)
    return [named[kind] / held[kind] for kind in own]
