"""Which transformers class builds a model of a configuration, and what makes it ready for inference.

Rests on transformers alone, so that whatever builds a model (with weights, without, from files) can ask here.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(configuration: object) -> type:
    """Return the transformers class that builds a model of this configuration."""
    return AutoModelForImageTextToText if hasattr(configuration, "vision_config") else AutoModelForCausalLM


def ready(model: nn.Module) -> nn.Module:
    """Make a model ready for inference; return it.

    Its head is given hidden states of their own. Those of a prompt's last token are a view into a larger tensor, and
    for its strides torch (2.13, on a processor) copies the whole head before it multiplies: seconds at real
    vocabularies.
    """
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.register_forward_pre_hook(own)
    return model.eval().requires_grad_(False)


def own(module: nn.Module, args: tuple) -> tuple:
    """Return a module's arguments with hidden states that are no view."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
