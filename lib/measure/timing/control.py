"""Copies models for timing: the control arm of every comparison, which is a separately allocated copy of the baseline
and shows how much two equal models differ, and fresh copies of all arms for a comparison in one process. Knows nothing
about how arms are timed.
"""

import copy
import random
from collections.abc import Mapping

from torch import nn

from lib.errors import UserError
from lib.measure.metrics.process_variance import SAME_OBJECT
from lib.models.checkpoints import placement

ROOM = 2.0  # a model is copied only if this many times its bytes are free
SMALL_BYTES = 2**30  # the speed of models on a CPU up to this size depends on where their tensors lie in memory


def separate_copy(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return (a copy of `model` with its own memory, None), or (`model` itself, the reason why there is no copy)."""
    needed = _bytes(model)
    if placement.free_bytes(str(next(model.parameters()).device)) < ROOM * needed:
        return model, f"no room for a copy of the baseline ({needed / 2**30:.1f} GiB): {SAME_OBJECT}"
    try:
        return copy.deepcopy(model).eval(), None
    # Weights that are views of a file, or stream from it; hooks, threads and pointers that cannot be copied.
    except (RuntimeError, TypeError, ValueError, NotImplementedError, UserError) as error:
        return model, f"the baseline cannot be copied ({error}): {SAME_OBJECT}"


def fresh_copies(models: Mapping[str, nn.Module], seed: int = 0) -> dict[str, tuple[nn.Module, str | None]]:
    """Return `separate_copy` of every model, copied in an order drawn by `seed`.

    A small model (a few megabytes of weights) that was loaded at the beginning and has run for minutes is up to 7 %
    slower than a fresh copy of it, because its tensors and modules are scattered in memory. Arms that are compared in
    one process must therefore have the same age, and the order in which they are copied must vary.
    """
    order = random.Random(seed).sample(list(models), len(models))
    fresh = {name: separate_copy(models[name]) for name in order}
    return {name: fresh[name] for name in models}


def fresh_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a small model on a CPU, to be timed next to a new model (see `fresh_copies`). Return the model
    itself if it is large, on another device or cannot be copied.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return separate_copy(model)[0] if on_cpu and _bytes(model) <= SMALL_BYTES else model


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
