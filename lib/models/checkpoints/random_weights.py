"""Draws random weights of real sizes within seconds: large tensors repeat a tile of random values.

Torch draws random values on a CPU with one thread, at most a hundred million per second: half a minute for two billion
weights, again in every child process that measures memory. Speed and memory do not depend on the values, and with a
tile of prime length no two rows of a matrix are equal. Knows nothing of models.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TILE = 1_048_573  # the largest prime below 2**20
LARGE = 4 * TILE  # elements; smaller tensors are drawn completely
DRAWING = ("normal_", "uniform_", "kaiming_uniform_")  # names, since transformers wraps the functions of torch


class Tiled(TorchFunctionMode):
    """A mode in which functions that draw random values fill large contiguous CPU tensors with copies of a tile."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in DRAWING:
            return function(*args, **kwargs)
        tensor, *arguments = args or (kwargs.pop("tensor"),)
        if not _large(tensor):
            return function(tensor, *arguments, **kwargs)
        with torch.no_grad():
            rows = -(-TILE * len(tensor) // tensor.numel())  # enough to hold a tile
            function(tensor[:rows], *arguments, **kwargs)
            repeat(tensor.view(-1))
        return tensor


def _large(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() >= LARGE


def repeat(flat: torch.Tensor) -> None:
    """Fill a flat tensor with copies of its first TILE elements, in place."""
    tile, whole = flat[:TILE].clone(), len(flat) // TILE
    flat[: whole * TILE].view(whole, TILE).copy_(tile)
    flat[whole * TILE :].copy_(tile[: len(flat) % TILE])
