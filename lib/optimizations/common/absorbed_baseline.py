"""The baseline of latent attention: the same weights, decoded absorbed, which is exact and changes no answer.

Stock latent attention expands its whole cache for every new token, so against it any other decoding looks fast; engines
decode absorbed. What is gained beyond the absorbed baseline is the optimization's own. What is made of the baseline
decodes absorbed as well, in whatever form its matrices are stored; formulas of cost and child processes see that by
themselves. Knows nothing of the optimization that is compared.
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
    """Return whether any block of `model` keeps latents, so that absorbed decoding changes anything."""
    return any(block.attention.kind == "latent" for block in anatomy(model).blocks)


def of(loaded: Loaded) -> Loaded:
    """Return `loaded` with the absorbed baseline as its model; itself where it has no latents."""
    if not has_latents(loaded.model):
        return loaded
    model = absorbed_baseline(loaded.model)
    return replace(loaded, model=model, original=weakref.ref(model))


def absorbed_baseline(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its weights and decodes absorbed; `model` itself where it has no latents.

    A model whose weights stream from a file cannot be copied: it is made to decode absorbed itself.
    """
    if not has_latents(model):
        return model
    return mla_absorption.absorb(model if streamer.streamer(model) else sharing(model))
