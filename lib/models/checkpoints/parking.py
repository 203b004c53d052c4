"""Weights that for a while are on disk alone: their memory serves others meanwhile, and they are read again afterwards.

Parked are dense tensors on a processor that the files hold as they are; all else stays where it is, and so does what
someone else holds a view of.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from lib.models.checkpoints.weight_file import Place, WeightFile
from lib.models.structure import sparse


@contextmanager
def parked(*saved: tuple[nn.Module, Path]) -> Iterator[None]:
    """Within, the models have no weights and cannot run; `saved` says for each in which folder `io.save` put them.

    Tensors that share their memory, within a model or between two, share it again. Raises UserError at the end where
    the files can no longer be read.
    """
    with ExitStack() as opened:
        held: dict[tuple, tuple[WeightFile, Place]] = {}
        sharing: dict[tuple, list[torch.Tensor]] = {}
        for model, folder in saved:
            file = opened.enter_context(closing(WeightFile(folder)))
            for name, tensor in _tensors(model).items():
                memory = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)
                sharing.setdefault(memory, []).append(tensor)
                if _holds(file, name, tensor):
                    held[memory] = file, file.places[name]
        groups = [(*place, sharing[memory]) for memory, place in held.items()]
        for _, place, alike in groups:
            for tensor in alike:
                tensor.data = torch.empty(0, dtype=place.dtype)
        try:
            yield
        finally:
            for file, place, alike in groups:
                whole = file.tensor(place)
                for tensor in alike:
                    tensor.data = whole


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the dense, contiguous tensors of a model by name, tied ones under each."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    dense = ((name, tensor) for name, tensor in named if sparse.is_dense(tensor) and tensor.device.type == "cpu")
    return {name: tensor for name, tensor in dense if tensor.is_contiguous()}


def _holds(file: WeightFile, name: str, tensor: torch.Tensor) -> bool:
    """Return whether the file has this tensor, and memory is gained by giving it up: it is no part of a larger one."""
    place = file.places.get(name)
    return (
        place is not None
        and (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
    )
