"""Decides where the weights of a checkpoint go: onto the device if they all fit, else streamed from their files.

Computes bytes from the file headers, before weights are read. Knows nothing of what the model is used for.
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
ROW_STARTS = ".crow"  # ends the name of a tensor of every matrix in CSR


def free_bytes(device: str) -> int:
    """Return the free memory of a device, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return memory_limits.free_memory_bytes()


def weights_bytes(folder: Path | str, dtype: torch.dtype) -> int:
    """Return the bytes that the weights of a checkpoint folder take in `dtype`. Matrices stored in CSR keep their
    32-bit columns and float32 values.
    """
    places = checkpoint.tensor_places(folder)
    in_csr = {name.removesuffix(ROW_STARTS) for name in places if name.endswith(ROW_STARTS)}
    total = 0
    for name, (_, _, stored, _, shape) in places.items():
        converted = dtype.itemsize * math.prod(shape)
        total += max(stored, converted) if name.rpartition(".")[0] in in_csr else converted
    return total


def allowance_bytes(
    folder: Path | str, dtype: torch.dtype, device: str, free: int | None = None, copies: int = 1
) -> int | None:
    """Return None if `copies` of the weights fit into `free` bytes, else how many bytes of weights may be in memory at
    a time.

    `free` defaults to the free memory of the device.
    """
    free = free_bytes(device) if free is None else free
    return None if copies * weights_bytes(folder, dtype) <= WEIGHTS_SHARE * free else int(STREAMED_SHARE * free)


def require_room(model: nn.Module, copies: int, what: str) -> None:
    """Raise NotApplicable if `copies` further copies of a model do not fit into free memory. `what` needs them."""
    weight = next(model.parameters())
    needed = copies * sum(parameter.nbytes for parameter in model.parameters())
    free = free_bytes(str(weight.device))
    if needed > WEIGHTS_SHARE * free:
        raise NotApplicable(
            f"{what} holds about {copies} copies of the model at once, {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free"
        )
