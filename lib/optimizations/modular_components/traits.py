"""Traits: properties of a model that an optimization needs, checked on the model itself.

An optimization module names the traits that it needs and those that it invalidates. The pipeline orders by these names
and checks the real model here. A trait may concern only some models (channels are removed only where there are no
experts), so that one descriptor serves all architectures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError, suggest
from lib.models.calibration.second_moments import matrices
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements.factored import FactoredLinear
from lib.models.structure.replacements.sparse import is_dense, stored

STATISTICS = "statistics"  # observed on calibration text: a model never lacks them, they only get out of date
ASPECTS = ("shapes", "weights", "storage", "attention", "cache", "execution")  # what an optimization may touch


@dataclass(frozen=True)
class Trait:
    """`concerns` returns whether a model can have the trait at all, `lacking` why it has lost it (None: it has it)."""

    concerns: Callable[[nn.Module], bool]
    lacking: Callable[[nn.Module], str | None]


def _routed(model: nn.Module) -> bool:
    return any(block.feed_forward.experts for block in anatomy(model).blocks)


def _whole_channels(model: nn.Module) -> str | None:
    dense = [block.feed_forward for block in anatomy(model).blocks if block.feed_forward.dense is not None]
    for linear in (linear for part in dense for linear in (part.gate, part.up, part.down)):
        if not isinstance(linear, nn.Linear):
            factored = isinstance(linear, FactoredLinear)
            return f"its channels lie in matrices stored {'in factors' if factored else 'sparse'}"
    return None


def _stacked_experts(model: nn.Module) -> str | None:
    routed = [block.feed_forward.experts for block in anatomy(model).blocks if block.feed_forward.experts]
    dense = all(is_dense(stack) for experts in routed for stack in (experts.gate_up, experts.down))
    return None if dense else "its experts are stored sparse"


def _whole_matrices(model: nn.Module) -> str | None:
    if any(matrix.part != "experts" for matrix in matrices(model, inside_factors=False)):
        return None
    return "no matrix of its decoder is left in one dense piece"


def _dense_matrices(model: nn.Module) -> str | None:
    if matrices(model):
        return None
    return "every matrix of its decoder is stored sparse" if stored(model) else "its decoder has no matrix"


def _nothing_sparse(model: nn.Module) -> str | None:
    return "some of its matrices are stored sparse" if stored(model) else None


def _stock_attention(model: nn.Module) -> str | None:
    chosen = getattr(anatomy(model).config, "_attn_implementation", None)
    stock = chosen in (None, "eager", "sdpa", "flex_attention") or str(chosen).startswith("flash_attention")
    return None if stock else f'its attention is "{chosen}" already'


def _always(_model: nn.Module) -> bool:
    return True


TRAITS: dict[str, Trait] = {
    "whole channels": Trait(lambda model: not _routed(model), _whole_channels),
    "stacked experts": Trait(_routed, _stacked_experts),
    "whole matrices": Trait(_always, _whole_matrices),
    "dense matrices": Trait(_always, _dense_matrices),
    "dense storage": Trait(_always, _nothing_sparse),
    "stock attention": Trait(_always, _stock_attention),
}


def named(name: str) -> Trait:
    """Return the trait called `name`. Raises UserError, with the nearest valid name, if there is none."""
    if name not in TRAITS:
        raise UserError(f'unknown trait "{name}"; expected one of {", ".join(TRAITS)}.{suggest(name, TRAITS)}')
    return TRAITS[name]


def concerning(model: nn.Module) -> set[str]:
    """Return the names of the traits that concern `model`, whether or not it has them."""
    return {name for name, trait in TRAITS.items() if trait.concerns(model)}


def lacking(model: nn.Module, needed: tuple[str, ...] | list[str]) -> str | None:
    """Return why `model` lacks the first missing trait of `needed` that concerns it, or None if it has them all."""
    for name in needed:
        trait = named(name)
        if trait.concerns(model) and (reason := trait.lacking(model)):
            return f"{name}: {reason}"
    return None


def shapes(model: nn.Module, index: int) -> dict[str, str]:
    """Return the matrices of block `index` (the last block if there are fewer) by name, with shape and storage."""
    blocks = anatomy(model).blocks
    block = blocks[min(index, len(blocks) - 1)].module
    stored_as = {torch.sparse_csr: ", sparse", torch.sparse_bsr: ", sparse"}
    return {
        name: " × ".join(map(str, parameter.shape)) + stored_as.get(parameter.layout, "")
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1
    }
