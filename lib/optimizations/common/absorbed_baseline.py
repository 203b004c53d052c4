"""The second baseline of latent attention: the same weights, decoded absorbed, which is exact and changes no answer.

Stock latent attention expands its whole cache for every new token, so against it any other decoding looks fast. What is
gained beyond the absorbed baseline is the optimization's own. Knows nothing of the optimization that is compared.
"""

from typing import Any

import torch
from torch import nn

from lib.measure.compare import speed
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.models.decoding import attention_inputs, mla_absorption
from lib.models.structure.anatomy import anatomy

DECODED = ("decode_tokens_per_second", "time_per_output_token_ms")


def has_latents(model: nn.Module) -> bool:
    """Return whether any block of `model` keeps latents, so that absorbed decoding changes anything."""
    return any(block.attention.kind == "latent" for block in anatomy(model).blocks)


def absorbed_baseline(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its weights and decodes absorbed; `model` itself where it has no latents."""
    return mla_absorption.absorb(attention_inputs.sharing(model)) if has_latents(model) else model


def against_absorbed(
    baseline: nn.Module, optimized: nn.Module, prompt_BT: torch.Tensor, effort: Effort, **options: Any
) -> list[Measurement]:
    """Return decoding of `optimized` against the absorbed baseline; empty where `baseline` has no latents.

    `options` go to `speed.compare`. Only rates and latencies are returned: the other metrics rest on operation counts
    that may differ between the arms.
    """
    if not has_latents(baseline):
        return []
    compared = speed.compare(
        absorbed_baseline(baseline),
        optimized,
        prompt_BT,
        effort,
        names=("decode",),
        baseline_costs={"absorbed": True},
        with_energy=False,
        **options,
    )
    return [measurement for measurement in compared.measurements if measurement.metric in DECODED]
