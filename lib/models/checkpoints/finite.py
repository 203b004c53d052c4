"""Weights that are not finite: one NaN in an expert that is rarely routed to spoils a ranking before any answer shows
it."""

import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile
from lib.models.structure.replacements import sparse


def require(model: nn.Module, where: object) -> None:
    """Raise UserError that names the first tensor of a model with a NaN or an infinite value, and the expert in it.

    One pass over the weights, without memory of its own; sparse and quantized ones are left out.
    """
    for name, parameter in model.named_parameters():
        if sparse.is_dense(parameter) and not parameter.is_meta:
            require_tensor(parameter, name, where)


def require_tensor(tensor: torch.Tensor, name: str, where: object) -> None:
    """Raise UserError that names a tensor with a NaN or an infinite value; of stacked experts, which of them."""
    if not _is_finite(tensor):
        raise _error(_place(name, tensor), where)


def require_read(file: WeightFile, place: TensorPlace, tensor: torch.Tensor) -> None:
    """Raise UserError that names what lies at `place` of a file, and was read into `tensor`, if it is not finite."""
    if not _is_finite(tensor):
        raise _error(file.name_of(place), file.folder)


def _is_finite(tensor: torch.Tensor) -> bool:
    readable = tensor.is_floating_point() and tensor.numel() > 0
    return not readable or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _error(what: str, where: object) -> UserError:
    return UserError(f"{where}: {what} holds NaN or infinite values; copy the checkpoint again")


def _place(name: str, tensor: torch.Tensor) -> str:
    """Return the name of a tensor; of stacked experts, which one."""
    if ".experts." not in name or tensor.dim() != 3:
        return name
    bad = [at for at, expert in enumerate(tensor) if not bool(expert.isfinite().all())]
    return f"{name}, expert {', '.join(map(str, bad[:4]))}{' and more' if len(bad) > 4 else ''},"
