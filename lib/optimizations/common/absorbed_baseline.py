"""The baseline of latent attention: the same weights, decoded absorbed, which is exact and changes no answer.

Stock latent attention expands its whole cache for every new token, so against it any other decoding looks fast; engines
decode absorbed. What is gained beyond the absorbed baseline is the optimization's own. Knows nothing of the
optimization that is compared.
"""

from dataclasses import replace

from torch import nn

from lib.models.decoding import attention_inputs, mla_absorption
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy


def has_latents(model: nn.Module) -> bool:
    """Return whether any block of `model` keeps latents, so that absorbed decoding changes anything."""
    return any(block.attention.kind == "latent" for block in anatomy(model).blocks)


def of(loaded: Loaded) -> Loaded:
    """Return `loaded` with the absorbed baseline as its model; what is made of it decodes absorbed as well."""
    return replace(loaded, model=absorbed_baseline(loaded.model)) if has_latents(loaded.model) else loaded


def formula(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Return the options of `speed.compare` for two arms that both decode absorbed where there are latents."""
    absorbed = {"absorbed": has_latents(model)}
    return {"costs": absorbed, "baseline_costs": absorbed}


def absorbed_baseline(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its weights and decodes absorbed; `model` itself where it has no latents."""
    return mla_absorption.absorb(attention_inputs.sharing(model)) if has_latents(model) else model
