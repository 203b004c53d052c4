"""The program that decodes a checkpoint in a child process of `children`: streamed, plainly mapped, or offloaded to the
disk by accelerate.
"""

import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.optimizations.streaming_computation.limited.serving import Decode, Decoded, serve, settle

OFFLOADED = "offloaded"  # an option, and the folder of accelerate's files next to the checkpoint


def opened(request: Mapping[str, Any]) -> tuple[Decode, int]:
    """Open the checkpoint and read the prompt; return the decode function and the bytes of privately held weights."""
    folder = Path(request["path"])
    if request["options"].get(OFFLOADED):
        _offload(folder)
    import torch  # imported late, so that its memory is charged to the group

    from lib.measure.timing import workloads
    from lib.optimizations.streaming_computation import method, read_bound
    from lib.optimizations.streaming_computation.limited import plain_mapping

    torch.set_num_threads(request["threads"])
    options = dict(request["options"])
    if options.pop(OFFLOADED, False):
        model, private_bytes = _open_offloaded(folder, options)
    elif options.pop("mapped", False):
        model, private_bytes = plain_mapping.open_mapped(request["path"])
        method.attach(model, **options)
    else:
        model = method.open_folder(request["path"], **options)
        private_bytes = read_bound.stream_of(model).private_bytes
    work = workloads.steps(model, torch.tensor(request["prompt"]), request["steps"])

    def decode() -> Decoded:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return Decoded([] if work.output_BN is None else work.output_BN[0].tolist(), seconds)

    settle(decode)
    return decode, private_bytes


def _offload(folder: Path) -> None:
    """Write the weights of a checkpoint in accelerate's offload format, in a process that then ends.

    Writing loads the model whole, and that memory must not count as memory for decoding. Raises UserError if the
    process fails.
    """
    writing = multiprocessing.get_context("fork").Process(target=_write, args=(folder,))
    writing.start()
    writing.join()
    if writing.exitcode:
        raise UserError(f"accelerate could not offload the weights: its process ended with {writing.exitcode}")


def _write(folder: Path) -> None:
    from accelerate.utils import offload_state_dict

    from lib.models.checkpoints import io

    offload_state_dict(str(folder.with_name(OFFLOADED)), io.load_folder(folder).state_dict())


def _open_offloaded(folder: Path, options: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the model whose weights `_offload` wrote, and the bytes of its stored buffers, which stay in memory.

    Each module is empty until it is called.
    """
    from accelerate.utils import OffloadedWeightsLoader

    from lib.models.offload.layout import layout
    from lib.models.structure.architecture import ready
    from lib.optimizations.streaming_computation import method, offload_baseline

    place = folder.with_name(OFFLOADED)
    model, stored = ready(layout(folder, False, "cpu").model), OffloadedWeightsLoader(save_folder=str(place))
    buffers = [(buffer, stored[name]) for name, buffer in model.named_buffers() if name in stored]
    for buffer, value in buffers:
        buffer.copy_(value)
    method.attach(model, **options)
    return offload_baseline.disk(model, place), sum(buffer.nbytes for buffer, _ in buffers)


if __name__ == "__main__":
    serve(opened)
