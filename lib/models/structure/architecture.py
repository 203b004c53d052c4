"""The transformers class that builds a model from a configuration, and the preparation of a model for inference.

Imports transformers only, so that all code that builds a model (with weights, without, from files) can use it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(configuration: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """Return the transformers class that builds a model from this configuration."""
    has_vision = getattr(configuration, "vision_config", None) is not None  # null in a text model cut out of another
    return AutoModelForImageTextToText if has_vision else AutoModelForCausalLM


def with_generation(model: Any, folder: Path) -> Any:
    """Return `model`, built from the configuration of `folder`, with the generation settings of the folder.

    Transformers reads these (end tokens, penalties) only when it loads a model itself. Without a generation file, the
    model keeps the settings of its configuration.
    """
    with suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def ready(model: nn.Module) -> nn.Module:
    """Prepare a model for inference in place; return it.

    A hook makes the hidden states contiguous before they reach the head. Those of a prompt's last token are a view into
    a larger tensor, and for its strides torch (2.13, on a CPU) copies the whole head: seconds at real vocabularies.
    """
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.register_forward_pre_hook(copy_hidden)
    return model.eval().requires_grad_(False)


def copy_hidden(module: nn.Module, args: tuple) -> tuple:
    """Return the module arguments `args` with the hidden states, the first of them, copied into contiguous memory."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
