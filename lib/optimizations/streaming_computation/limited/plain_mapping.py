"""A checkpoint with plainly mapped weights: no byte is copied, nothing is read ahead or released, and the system alone
decides what stays in the page cache. The rival of streaming under limited memory.

Independent of limits.
"""

from pathlib import Path

from torch import nn

from lib.errors import UserError
from lib.models.checkpoints.folder import ALIGNMENT
from lib.models.offload.layout import layout
from lib.models.offload.mapped_pages import FilePages
from lib.models.structure.architecture import ready


def open_mapped(folder: Path | str) -> tuple[nn.Module, int]:
    """Return the model of a checkpoint folder, on a CPU, and the bytes of its weights in private memory.

    Private are buffers, and tensors misaligned in the file, whose products would round differently. Raises UserError
    for a damaged checkpoint, and if a parameter is not one tensor of the file.
    """
    parts = layout(Path(folder), False, "cpu")
    pages, model = FilePages(parts.file, read_around=True), parts.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mapped: dict[int, nn.Parameter] = {}
    private_bytes = 0
    for empty in model.parameters():
        name = names[id(empty)]
        if name not in parts.file.places:
            raise UserError(f"{folder}: {name} is not one tensor of its files, and cannot be mapped")
        tensor = pages.view(parts.file.places[name])
        if tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.clone()
            private_bytes += tensor.nbytes
        mapped[id(empty)] = nn.Parameter(tensor, requires_grad=False)
    for module_name, module in model.named_modules():
        for leaf, empty in module._parameters.items():
            module._parameters[leaf] = None if empty is None else mapped[id(empty)]
        for leaf, buffer in module._buffers.items():
            place = parts.file.places.get(f"{module_name}.{leaf}" if module_name else leaf)
            if buffer is not None and place is not None:
                module._buffers[leaf] = pages.view(place).to(buffer.dtype, copy=True)
                private_bytes += module._buffers[leaf].nbytes
    return ready(model), private_bytes
