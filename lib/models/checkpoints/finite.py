"""Weights that are not finite: one NaN in an expert that is rarely routed to spoils a ranking before any answer shows
it."""

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.replacements import sparse


def require(model: nn.Module, where: object) -> None:
    """Raise UserError that names the first tensor of a model with a NaN or an infinite value, and the expert in it.

    One pass over the weights, without memory of its own; sparse and quantized ones are left out.
    """
    for name, parameter in model.named_parameters():
        readable = parameter.is_floating_point() and parameter.numel() and not parameter.is_meta
        if readable and sparse.is_dense(parameter) and not torch.stack(parameter.detach().aminmax()).isfinite().all():
            what = _place(name, parameter)
            raise UserError(f"{where}: {what} holds NaN or infinite values; copy the checkpoint again")


def _place(name: str, parameter: torch.Tensor) -> str:
    """Return the name of a tensor; of stacked experts, which one."""
    if ".experts." not in name or parameter.dim() != 3:
        return name
    bad = [at for at, expert in enumerate(parameter) if not bool(expert.isfinite().all())]
    return f"{name}, expert {', '.join(map(str, bad[:4]))}{' and more' if len(bad) > 4 else ''},"
