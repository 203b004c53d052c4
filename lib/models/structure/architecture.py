"""The transformers class that builds a model of a configuration, and the preparation of a model for inference.

Imports transformers only, so that everything that builds a model (with weights, without, from files) can use it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(configuration: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """Return the transformers class that builds a model of this configuration."""
    sees = getattr(configuration, "vision_config", None) is not None  # of a text model cut out of another it is null
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def with_generation(model: Any, folder: Path) -> Any:
    """Return a model that was built from the configuration of `folder` with the folder's settings of generation, which
    transformers reads where it loads a model itself: where a text ends, what is penalised. Without a file of them, the
    model keeps those of its configuration.
    """
    with suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def ready(model: nn.Module) -> nn.Module:
    """Prepare a model for inference in place; return it.

    A hook gives its head contiguous hidden states. Those of a prompt's last token are a view into a larger tensor, for
    whose strides torch (2.13, on a CPU) copies the whole head before it multiplies: seconds at real vocabularies.
    """
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.register_forward_pre_hook(copy_hidden)
    return model.eval().requires_grad_(False)


def copy_hidden(module: nn.Module, args: tuple) -> tuple:
    """Return the arguments of a module with its hidden states copied into contiguous memory."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
