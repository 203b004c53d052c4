"""The third arm of every comparison of models: the baseline's work on a separately allocated copy of it, which shows
what differs between two copies of one thing; and the arms of a comparison in one process, all copied afresh. Knows
nothing of how arms are timed.
"""

import copy
import random
from collections.abc import Mapping

from torch import nn

from lib.errors import UserError
from lib.measure.metrics.process_variance import SAME_OBJECT
from lib.models.checkpoints import placement

ROOM = 2.0  # a copy is made where twice its bytes are free
SMALL_BYTES = 2**30  # of a model on a CPU whose speed depends on where its tensors lie


def separate_copy(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return a copy of `model` with memory of its own, and None; or `model` itself, and why there is no copy."""
    needed = _bytes(model)
    if placement.free_bytes(str(next(model.parameters()).device)) < ROOM * needed:
        return model, f"no room for a copy of the baseline ({needed / 2**30:.1f} GiB): {SAME_OBJECT}"
    try:
        return copy.deepcopy(model).eval(), None
    # Weights that are views of a file, or stream from it; hooks, threads and pointers that cannot be copied.
    except (RuntimeError, TypeError, ValueError, NotImplementedError, UserError) as error:
        return model, f"the baseline cannot be copied ({error}): {SAME_OBJECT}"


def fresh_copies(models: Mapping[str, nn.Module], seed: int = 0) -> dict[str, tuple[nn.Module, str | None]]:
    """Return `separate_copy` of every model, made in an order drawn by `seed`.

    A model that was loaded at the beginning and has run for minutes is up to 7 % slower than a copy of it that was made
    just now, a few megabytes of weights given: its tensors and modules lie scattered. What is compared in one process
    must be of one age, and which copy comes first must not always be the same.
    """
    order = random.Random(seed).sample(list(models), len(models))
    fresh = {name: separate_copy(models[name]) for name in order}
    return {name: fresh[name] for name in models}


def fresh_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a small model on a CPU, to be timed beside one that is new (see `fresh_copies`); else, or where
    it cannot be copied, the model itself.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return separate_copy(model)[0] if on_cpu and _bytes(model) <= SMALL_BYTES else model


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
