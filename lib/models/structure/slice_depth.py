"""How many blocks of the full model each block of a slice (a model cut to a few blocks) represents.

The configuration of a slice lists the kinds of all blocks of the full model, so that they survive copying and saving.
Knows nothing of time or memory.
"""

from collections import Counter
from collections.abc import Collection

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from lib.models.structure.anatomy import anatomy
from lib.models.structure.architecture import auto_class

NAME = "whole_blocks"  # key of the text configuration
ALONE = "stands_alone"  # attribute of a decoder block that an optimization treats unlike all others of the full model


def kinds(model: nn.Module) -> list[str]:
    """Return the kind of each block's feed-forward part, by which the blocks of a model differ."""
    return [block.feed_forward.kind for block in anatomy(model).blocks]


def state(model: nn.Module, whole: dict, architecture: str) -> nn.Module:
    """Write the kinds of the full model's blocks into the configuration of a slice, in place; return the slice.

    `whole`: the configuration of the full model.
    """
    configuration = AutoConfig.for_model(architecture, **whole)
    with init_empty_weights():
        whole_kinds = kinds(auto_class(configuration).from_config(configuration))
    setattr(anatomy(model).config, NAME, whole_kinds)
    return model


def whole(model: nn.Module) -> list[str] | None:
    """Return the kinds of the full model's blocks, or None if `model` is not a slice."""
    return getattr(anatomy(model).config, NAME, None)


def alone(model: nn.Module) -> frozenset[int]:
    """Return the indices of the blocks marked by ALONE, which are unlike every other block of the full model."""
    return frozenset(block.index for block in anatomy(model).blocks if getattr(block.module, ALONE, False))


def stands_for(model: nn.Module, once: Collection[int] = ()) -> list[float] | str:
    """Return for each block of a slice how many blocks of the full model it represents.

    The blocks of the full model are divided evenly among the slice's blocks of the same kind. A block with an index in
    `once` represents only itself, unless the slice has no other block of its kind. If the slice lacks a kind of block,
    returns the reason as a sentence.
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
