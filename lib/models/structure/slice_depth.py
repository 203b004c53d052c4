"""The depth of the model that a slice was cut from, and how many of its blocks each block of the slice represents.

The configuration of a slice lists the kinds of all blocks of the full model, so that copies of the slice, and slices
loaded from disk, have them too. Knows nothing of time or memory.
"""

from collections import Counter
from collections.abc import Collection

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from lib.models.structure.anatomy import anatomy
from lib.models.structure.architecture import auto_class

NAME = "whole_blocks"  # of the text configuration
ALONE = "stands_alone"  # of a decoder block that an optimization treats as no other of the full model


def kinds(model: nn.Module) -> list[str]:
    """Return the kind of each block's feed-forward part, in which the blocks of one model differ."""
    return [block.feed_forward.kind for block in anatomy(model).blocks]


def state(model: nn.Module, whole: dict, architecture: str) -> nn.Module:
    """Write the kinds of the full model's blocks into a slice; return the slice. `whole`: the full configuration."""
    configuration = AutoConfig.for_model(architecture, **whole)
    with init_empty_weights():
        whole_kinds = kinds(auto_class(configuration).from_config(configuration))
    setattr(anatomy(model).config, NAME, whole_kinds)
    return model


def whole(model: nn.Module) -> list[str] | None:
    """Return the kinds of the full model's blocks, or None if `model` is not a slice."""
    return getattr(anatomy(model).config, NAME, None)


def alone(model: nn.Module) -> frozenset[int]:
    """Return the indices of the blocks that no other block of the full model is like: they are marked by ALONE."""
    return frozenset(block.index for block in anatomy(model).blocks if getattr(block.module, ALONE, False))


def stands_for(model: nn.Module, once: Collection[int] = ()) -> list[float] | str:
    """Return for each block of a slice how many blocks of the full model it represents.

    The blocks of the full model are divided evenly among the slice's blocks of the same kind. Those with an index in
    `once` represent themselves alone, unless the slice has no other block of their kind. Returns the reason, in words,
    if the slice has no block of a kind.
    """
    whole_counts, slice_kinds = Counter(whole(model) or []), kinds(model)
    if lacking := sorted(set(whole_counts) - set(slice_kinds)):
        return f"the slice has no block of kind {lacking[0]}, of which the whole model has {whole_counts[lacking[0]]}"
    others = Counter(kind for index, kind in enumerate(slice_kinds) if index not in once)
    single = Counter(kind for index, kind in enumerate(slice_kinds) if index in once and others[kind])
    slice_counts = Counter(slice_kinds)
    return [
        1.0
        if index in once and others[kind]
        else (whole_counts[kind] - single[kind]) / (slice_counts[kind] - single[kind])
        for index, kind in enumerate(slice_kinds)
    ]
