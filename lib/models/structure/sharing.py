"""A copy of a model that shares its tensors: only what is replaced in the copy takes memory of its own."""

import copy

from torch import nn


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the modules and configuration of `model` that shares every tensor with it.

    Replace parameters of the copy, never write into them in place; to train one, clone its tensor first.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
