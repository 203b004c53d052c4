"""The program in a child process of `lib.measure.trackers.memory`: reads arms from standard input; loads and runs each
in a process forked from this one (one call of the workload, a second unless that was long); prints memory and time as
one line of JSON. No arm inherits memory from another.
"""

import importlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from lib.errors import UserError
from lib.measure.timing import workloads
from lib.measure.trackers.memory import Arm, Peak
from lib.models import loading, parameters
from lib.models.checkpoints import io
from lib.models.structure import sparse

LONG_SECONDS = 1.0  # after a first call that lasts longer there is no second
LARGE_BYTES = 2**28  # smaller weights could fit into memory that was held and freed before they were loaded


def peak_bytes() -> tuple[int | None, str]:
    """Return the peak of this process's resident memory so far and its source; None on a system without one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "VmHWM of the whole process"
    try:
        import resource
    except ImportError:
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None), "peak working set of the whole process"
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "ru_maxrss of the whole process"


def run(arm: Arm) -> Peak:
    """Load and run `arm` in this process and return its peaks."""
    on_gpu = arm.device.startswith("cuda")
    if on_gpu:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()

    def read() -> tuple[int | None, str]:
        if on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(), "peak of the CUDA allocator"
        return peak_bytes()

    _import_architecture(arm)
    before, scope = read()
    start = time.perf_counter()
    model = _load(arm)
    present = _make_present(model)
    if on_gpu:
        torch.cuda.synchronize()
    load_seconds = time.perf_counter() - start
    after_load, _ = read()
    if not on_gpu:
        _require_all(present, after_load, before)
    work = _workload(model, arm)
    calls: list[float] = []
    while len(calls) < 2 and (not calls or calls[0] < 1000 * LONG_SECONDS):
        if work.prepare:
            work.prepare()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        calls.append(1000 * (time.perf_counter() - start))
    second_call_ms = calls[1] if len(calls) > 1 else None
    return Peak(before, after_load, read()[0], scope, load_seconds, calls[0], second_call_ms)


def _import_architecture(arm: Arm) -> None:
    """Build the architecture once without weights, so that importing its code is not counted as the model's memory."""
    if arm.folder is not None:
        path = Path(arm.folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{arm.folder}: no config.json; expected a checkpoint folder")
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config.pop("model_type")
    else:
        assert arm.load is not None, "an arm needs a folder or a model to load"
        description = parameters.read(arm.load["name"])
        config, architecture = description.config(arm.load.get("scale", "proxy")), description.architecture
    io.build(config, architecture, device="meta")


def _load(arm: Arm) -> torch.nn.Module:
    if arm.opener:
        return _named(arm.opener)(arm.folder, **arm.arguments)
    if arm.folder is not None:
        model = io.load_folder(arm.folder, dtype=io.DTYPES[arm.dtype], device=arm.device)
    else:
        model = loading.load(**{"device": arm.device, "dtype": arm.dtype, **(arm.load or {})}).model
    if arm.transform:
        model = _named(arm.transform)(model, **arm.arguments)
    return model


def _make_present(model: torch.nn.Module) -> int:
    """Read one number of every page of the weights, and return the bytes of these weights, tied ones once.

    Pages of a mapped file are in memory only once they have been used, and would be missing from the peak after
    loading. Shells of streamed weights hold a single number and stay empty.
    """
    read: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and sparse.is_dense(tensor) and tensor.is_contiguous():
            tensor.detach().reshape(-1)[:: max(1, mmap.PAGESIZE // tensor.element_size())].sum()
            read[tensor.data_ptr()] = tensor.nbytes
    return sum(read.values())


def _require_all(present: int, after_load: int | None, before: int | None) -> None:
    """Raise UserError where the weights were never whole in memory: the system took mapped pages away again."""
    if present > LARGE_BYTES and after_load is not None and after_load - (before or 0) < 0.95 * present:
        raise UserError(
            f"memory is short: of {present / 1e9:.2f} GB of weights the system kept "
            f"{(after_load - (before or 0)) / 1e9:.2f} GB in memory, so a peak would be too low"
        )


def _named(name: str) -> Callable[..., torch.nn.Module]:
    """Return the function named "module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _workload(model: torch.nn.Module, arm: Arm) -> workloads.Workload:
    prompt_BT = workloads.random_prompt(model, arm.batch, arm.prompt_tokens)
    if arm.workload == "prefill":
        return workloads.prefill(model, prompt_BT)
    make = {"decode": workloads.decode, "generate": workloads.generate}[arm.workload]
    return make(model, prompt_BT, arm.new_tokens)


def forked(arm: Arm) -> dict[str, object]:
    """Run one arm in a process forked from this one; return its peak as JSON, or {"failed": why}."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                try:
                    out.write(json.dumps(asdict(run(arm))))
                    code = 0
                except Exception as error:
                    out.write(f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return json.loads(answer)
    return {"failed": f"the child process ended with {code}: {answer or 'no message'}"}


def main() -> None:
    """Run the arms described on standard input."""
    arms = [Arm(**fields) for fields in json.load(sys.stdin)]
    for name in filter(None, [name for arm in arms for name in (arm.transform, arm.opener)]):
        with suppress(Exception):  # imported here, so that every arm's peak holds the same libraries
            _named(name)
    if len(arms) == 1:
        print(json.dumps(asdict(run(arms[0]))))
        return
    with suppress(Exception):  # what is wrong with the first arm is reported by its own process
        _import_architecture(arms[0])
    for arm in arms:
        print(json.dumps(forked(arm)), flush=True)


if __name__ == "__main__":
    main()
