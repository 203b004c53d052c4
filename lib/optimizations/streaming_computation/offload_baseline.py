"""What one would use otherwise: accelerate's offloading, as the control of streaming.

`disk` keeps every weight in a file of its own and loads it before its module runs, one after the other; `processor`
keeps them in main memory behind the same hooks, which on a processor moves nothing and shows what the hooks cost.
"""

from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn


def disk(model: nn.Module, folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Offload `model` to `folder` with accelerate, in place; return the model. It computes on `device`."""
    disk_offload(model, str(folder), execution_device=torch.device(device))
    return model


def cpu(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Offload `model` to main memory with accelerate, in place; return the model. It computes on `device`."""
    cpu_offload(model, execution_device=torch.device(device))
    return model
