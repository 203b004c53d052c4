"""The server that runs measuring programs in child processes: it reads jobs from standard input and answers each with
one line of JSON, from a separate process in which the program's `run` loads the arms. `lib.measure.timing.children`
starts the server. Knows nothing about what is measured.
"""

import gc
import json
import math
import mmap
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.measure.timing import workloads
from lib.measure.timing.children import Arm
from lib.models import loading, parameters
from lib.models.checkpoints import io
from lib.models.structure.beyond_files import named
from lib.models.structure.replacements import sparse

Run = Callable[[dict[str, Any]], dict[str, Any]]

# Allocations of `move_heap`: pieces of malloc's heap, and mappings of up to 8 MB.
PIECES, PIECE_BYTES = 64, 2**16
MAPPINGS, MAPPED_PAGES = 16, 2**11


def serve() -> None:
    """Answer requests from standard input (one line of JSON each) with one line for each job, computed by the program's
    `run`, in a forked process if the request asks for it.
    """
    for line in sys.stdin:
        _serve(json.loads(line))


def _serve(request: dict[str, Any]) -> None:
    jobs = request["jobs"]
    _take_over(request["environment"])
    run: Run = named(f"{request['program']}:run")
    # Imported here, so that every child holds the same libraries. Errors of an arm are reported by its child.
    for arm in _different([Arm(**fields) for job in jobs for fields in job["arms"]]):
        for name in filter(None, (arm.transform, arm.opener)):
            with suppress(Exception):
                named(name)
        with suppress(Exception):
            import_architecture(arm)
    gc.collect()
    gc.freeze()  # so that a child's garbage collection neither scans imported objects nor copies their pages
    for job in jobs:
        answer = _forked(run, job, request["limit_seconds"]) if request["fork"] else _answer(run, job)
        print(json.dumps(answer), flush=True)


def _take_over(environment: dict[str, str]) -> None:
    """Adopt the environment variables and the module path of the requesting process."""
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    tempfile.tempdir = None


def _different(arms: Sequence[Arm]) -> list[Arm]:
    return list({repr(arm): arm for arm in arms}.values())


def _answer(run: Run, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return run(job)
    except Exception as error:
        return {"failed": f"the child process failed: {type(error).__name__}: {error}".splitlines()[0]}


def _forked(run: Run, job: dict[str, Any], limit_seconds: float) -> dict[str, Any]:
    """Return the answer of a process forked from this one, or {"failed": why}."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reader)
            signal.alarm(math.ceil(limit_seconds))  # ends a process that hangs
            with os.fdopen(writer, "w") as out:
                out.write(json.dumps(_answer(run, job)))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code == -signal.SIGALRM:
        return {"failed": f"the child process ran past {limit_seconds:g} s"}
    return json.loads(answer) if code == 0 else {"failed": f"the child process ended with {code}"}


def move_heap(seed: int) -> list[object]:
    """Allocate random amounts of memory and return them, to be kept: later objects then have different addresses in
    every process, although forked processes begin with the same ones.

    Pieces of malloc's heap move small objects, mappings move large ones, also relative to the bounds of huge pages.
    """
    chance = random.Random(seed)
    allocations: list[object] = [bytearray(chance.randrange(2**10, PIECE_BYTES)) for _ in range(PIECES)]
    allocations += [mmap.mmap(-1, mmap.PAGESIZE * chance.randrange(1, MAPPED_PAGES)) for _ in range(MAPPINGS)]
    return allocations


# --- arms ------------------------------------------------------------------------------------------------------------


def import_architecture(arm: Arm) -> None:
    """Build the architecture once without weights, so that importing its code is not counted as the model's memory.
    Do nothing if this was done before, here or in the parent of this process.
    """
    if (origin := f"{arm.folder} {arm.load}") in _IMPORTED:
        return
    if arm.folder is not None:
        config = json.loads(_configuration(arm.folder).read_text(encoding="utf-8"))
        architecture = config.pop("model_type")
    else:
        assert arm.load is not None, "an arm needs a folder or a model to load"
        description = parameters.read(arm.load["name"])
        config, architecture = description.config(arm.load.get("scale", "proxy")), description.architecture
    io.build(config, architecture, device="meta")
    _IMPORTED.add(origin)


_IMPORTED: set[str] = set()


def _configuration(folder: str) -> Path:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a checkpoint folder")
    return path


def load(arm: Arm) -> torch.nn.Module:
    """Return the arm's model. Raises UserError if its folder does not hold one."""
    if arm.folder is not None:
        _configuration(arm.folder)
    if arm.opener:
        return named(arm.opener)(arm.folder, **arm.arguments)
    if arm.folder is not None:
        model = io.load_folder(arm.folder, dtype=io.DTYPES[arm.dtype], device=arm.device)
    else:
        model = loading.load(**{"device": arm.device, "dtype": arm.dtype, **(arm.load or {})}).model
    return named(arm.transform)(model, **arm.arguments) if arm.transform else model


def make_present(model: torch.nn.Module) -> int:
    """Read one number in every page of the weights, and return the bytes of these weights, tied tensors once.

    Pages of a mapped file are in memory only after their first use. Shells of streamed weights hold a single number
    and stay empty.
    """
    read: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and sparse.is_dense(tensor) and tensor.is_contiguous():
            tensor.detach().reshape(-1)[:: max(1, mmap.PAGESIZE // tensor.element_size())].sum()
            read[tensor.data_ptr()] = tensor.nbytes
    return sum(read.values())


def workload(model: torch.nn.Module, arm: Arm) -> workloads.Workload:
    """Return the arm's workload on `model`."""
    if ":" in arm.workload:
        return named(arm.workload)(model, **arm.workload_arguments)
    prompt_BT = workloads.random_prompt(model, arm.batch, arm.prompt_tokens)
    if arm.workload == "prefill":
        return workloads.prefill(model, prompt_BT)
    make = {"decode": workloads.decode, "generate": workloads.generate}[arm.workload]
    return make(model, prompt_BT, arm.new_tokens)
