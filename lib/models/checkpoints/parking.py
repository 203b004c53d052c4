"""Parks weights on disk for a while: frees their memory, and reads them again afterwards.

Only dense CPU tensors that the files hold unchanged are parked. Everything else stays in memory, including tensors that
are views into a larger storage.
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
    """Free the weights of models while the context is open; they cannot run meanwhile.

    `saved`: a pair (model, folder that `io.save` wrote) for each model. Tensors that shared memory, within a model or
    between models, share it again afterwards. Raises UserError at the end if the files can no longer be read.
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
                restored = file.tensor(place)
                for tensor in sharers:
                    tensor.data = restored


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the dense, contiguous CPU tensors of a model by name; tied tensors appear under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    dense = ((name, tensor) for name, tensor in named if sparse.is_dense(tensor) and tensor.device.type == "cpu")
    return {name: tensor for name, tensor in dense if tensor.is_contiguous()}


def _holds(file: WeightFile, name: str, tensor: torch.Tensor) -> bool:
    """Return whether `file` holds the tensor `name` and freeing it gains memory: it owns its whole storage."""
    place = file.places.get(name)
    return (
        place is not None
        and (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
    )
