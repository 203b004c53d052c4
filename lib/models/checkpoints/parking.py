"""Weights that are on disk only for a while: their memory is free meanwhile, and they are read again afterwards.

Only dense CPU tensors that the files hold unchanged are parked; everything else stays in memory, as do tensors that
share their storage with a larger one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from lib.models.checkpoints.weight_file import TensorPlace, WeightFile
from lib.models.structure.replacements import sparse


@contextmanager
def parked(*saved: tuple[nn.Module, Path]) -> Iterator[None]:
    """Within, the models have no weights and cannot run. `saved`: (model, folder that `io.save` wrote) for each.

    Tensors that shared memory, within a model or between two, share it again afterwards. Raises UserError at the end if
    the files cannot be read any more.
    """
    with ExitStack() as opened:
        parkable: dict[tuple, tuple[WeightFile, TensorPlace]] = {}
        sharing: dict[tuple, list[torch.Tensor]] = {}
        for model, folder in saved:
            file = opened.enter_context(closing(WeightFile(folder)))
            for name, tensor in _tensors(model).items():
                memory = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)
                sharing.setdefault(memory, []).append(tensor)
                if _holds(file, name, tensor):
                    parkable[memory] = file, file.places[name]
        groups = [(*place, sharing[memory]) for memory, place in parkable.items()]
        for _, place, sharers in groups:
            for tensor in sharers:
                tensor.data = torch.empty(0, dtype=place.dtype)
        try:
            yield
        finally:
            for file, place, sharers in groups:
                whole = file.tensor(place)
                for tensor in sharers:
                    tensor.data = whole


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the dense, contiguous tensors of a model by name, tied ones under each."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    dense = ((name, tensor) for name, tensor in named if sparse.is_dense(tensor) and tensor.device.type == "cpu")
    return {name: tensor for name, tensor in dense if tensor.is_contiguous()}


def _holds(file: WeightFile, name: str, tensor: torch.Tensor) -> bool:
    """Return whether the file holds this tensor and freeing it gains memory: it is not part of a larger storage."""
    place = file.places.get(name)
    return (
        place is not None
        and (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
    )
