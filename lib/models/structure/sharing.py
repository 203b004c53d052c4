"""A second model of the same tensors: what is changed in it becomes its own, everything else stays in memory once."""

import copy

from torch import nn


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the modules and configuration of `model` that shares every tensor with it.

    Replace a parameter of the copy, never write into it; train a copy of its tensors.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
