"""The transformers class that builds a model of a configuration, and the preparation of a model for inference.

Imports transformers only, so that everything that builds a model (with weights, without, from files) can use it.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(configuration: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """Return the transformers class that builds a model of this configuration."""
    return AutoModelForImageTextToText if hasattr(configuration, "vision_config") else AutoModelForCausalLM


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
