"""Refuses weights that are not finite: a NaN in a rarely used expert spoils a ranking before any output shows it."""

import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile
from lib.models.structure.replacements import sparse


def require(model: nn.Module, where: object) -> None:
    """Raise UserError if a tensor of `model` has a NaN or infinite value, naming the tensor and the expert.

    One pass over the weights, without extra memory; sparse and quantized weights are skipped.
    """
    for name, parameter in model.named_parameters():
        if sparse.is_dense(parameter) and not parameter.is_meta:
            require_tensor(parameter, name, where)


def require_tensor(tensor: torch.Tensor, name: str, where: object) -> None:
    """Raise UserError if `tensor` has a NaN or infinite value, naming it and, in stacked experts, the expert."""
    if not _is_finite(tensor):
        raise _error(_place(name, tensor), where)


def require_read(file: WeightFile, place: TensorPlace, tensor: torch.Tensor) -> None:
    """Raise UserError if `tensor`, read from `place` of `file`, is not finite, naming the tensor in the file."""
    if not _is_finite(tensor):
        raise _error(file.name_of(place), file.folder)


def _is_finite(tensor: torch.Tensor) -> bool:
    readable = tensor.is_floating_point() and tensor.numel() > 0
    return not readable or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _error(what: str, where: object) -> UserError:
    return UserError(f"{where}: {what} holds NaN or infinite values; copy the checkpoint again")


def _place(name: str, tensor: torch.Tensor) -> str:
    """Return the name of a tensor and, in stacked experts, the indices of those that are not finite."""
    if ".experts." not in name or tensor.dim() != 3:
        return name
    bad = [at for at, expert in enumerate(tensor) if not bool(expert.isfinite().all())]
    return f"{name}, expert {', '.join(map(str, bad[:4]))}{' and more' if len(bad) > 4 else ''},"
