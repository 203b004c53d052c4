"""Decides where the weights of a checkpoint go: whole onto the device if they fit, else streamed from their files.

Counts bytes from the headers before anything is read. Knows nothing of what the model is used for.
"""

import math
from pathlib import Path

import torch
from torch import nn

from lib import memory_limits
from lib.errors import NotApplicable
from lib.models.checkpoints import folder as checkpoint

WEIGHTS_SHARE = 0.8  # of the free memory; the rest is for the cache, activations and a prompt's logits
STREAMED_SHARE = 0.6  # of the free memory, if the weights do not fit


def free_bytes(device: str) -> int:
    """Return the free memory of a device, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return memory_limits.free_memory_bytes()


def weights_bytes(folder: Path | str, dtype: torch.dtype) -> int:
    """Return the bytes that the weights of a checkpoint folder take in `dtype`."""
    return dtype.itemsize * sum(math.prod(shape) for shape in checkpoint.tensor_shapes(folder).values())


def allowance_bytes(folder: Path | str, dtype: torch.dtype, device: str, free: int | None = None) -> int | None:
    """Return None if the weights fit into `free` bytes, else how many bytes of them may be in memory at a time.

    `free` defaults to the free memory of the device.
    """
    free = free_bytes(device) if free is None else free
    return None if weights_bytes(folder, dtype) <= WEIGHTS_SHARE * free else int(STREAMED_SHARE * free)


def require_room(model: nn.Module, copies: int, what: str) -> None:
    """Raise NotApplicable if this many copies of a model do not fit into the free memory beside it."""
    weight = next(model.parameters())
    each = sum(parameter.nbytes for parameter in model.parameters())
    free = free_bytes(str(weight.device))
    if copies * each > WEIGHTS_SHARE * free:
        raise NotApplicable(
            f"{what} holds about {copies} copies of the model at once, {copies * each / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free"
        )
