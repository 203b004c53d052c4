"""The program that decodes a checkpoint, streamed or plainly mapped, in a child process of `children`."""

import time
from collections.abc import Mapping
from typing import Any

from lib.optimizations.streaming_computation.limited.serving import Decode, Decoded, serve


def opened(request: Mapping[str, Any]) -> tuple[Decode, int]:
    """Open the checkpoint and read the prompt; return what decodes, and the bytes of weights in private memory."""
    import torch  # from here on everything belongs to the group

    from lib.measure.timing import workloads
    from lib.optimizations.streaming_computation import method, read_bound
    from lib.optimizations.streaming_computation.limited import plain_mapping

    torch.set_num_threads(request["threads"])
    options = dict(request["options"])
    if options.pop("mapped", False):
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

    decode()
    return decode, private_bytes


if __name__ == "__main__":
    serve(opened)
