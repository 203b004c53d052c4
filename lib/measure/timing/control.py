"""The third arm of every comparison of models: the baseline's work on a separately allocated copy of it, which shows
what differs between two copies of one thing. Knows nothing of how arms are timed.
"""

import copy

from torch import nn

from lib.models.checkpoints import placement

ROOM = 2.0  # a copy is made where twice its bytes are free


def separate_copy(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return a copy of `model` with memory of its own, and None; or `model` itself, and why there is no copy."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    if placement.free_bytes(str(next(model.parameters()).device)) < ROOM * needed:
        return model, f"no room for a copy of the baseline ({needed / 2**30:.1f} GiB): the control is the same object"
    try:
        return copy.deepcopy(model).eval(), None
    except (RuntimeError, TypeError) as error:  # weights that are views of a file, hooks that cannot be copied
        return model, f"the baseline cannot be copied ({error}): the control is the same object"
