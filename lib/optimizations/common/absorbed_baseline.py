"""The baseline for latent attention: the same weights with absorbed decoding, which is exact and changes no answer.

Stock latent attention expands its whole cache for every new token, so any other decoding looks fast next to it, while
serving engines decode absorbed. Only a gain over the absorbed baseline belongs to the optimization. Models derived from
this baseline decode absorbed too, however their matrices are stored; cost formulas and child processes detect this
themselves.
"""

import weakref
from dataclasses import replace

from torch import nn

from lib.models.decoding import mla_absorption
from lib.models.loading import Loaded
from lib.models.offload import streamer
from lib.models.structure.anatomy import anatomy
from lib.models.structure.sharing import sharing


def has_latents(model: nn.Module) -> bool:
    """Return whether any block of `model` uses latent attention, so that absorbed decoding applies."""
    return any(block.attention.kind == "latent" for block in anatomy(model).blocks)


def of(loaded: Loaded) -> Loaded:
    """Return `loaded` with the absorbed baseline as its model; `loaded` itself if it has no latent attention."""
    if not has_latents(loaded.model):
        return loaded
    model = absorbed_baseline(loaded.model)
    return replace(loaded, model=model, original=weakref.ref(model))


def absorbed_baseline(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its weights and decodes absorbed; `model` itself if it has no latents.

    A model whose weights stream from a file cannot be copied: it is switched to absorbed decoding in place.
    """
    if not has_latents(model):
        return model
    return mla_absorption.absorb(model if streamer.streamer(model) else sharing(model))
