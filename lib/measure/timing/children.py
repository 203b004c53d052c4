"""Fresh processes for arms that lie in saved files: what an arm is, and how the processes that load and run it are
started. Knows nothing of what they measure; `lib.measure.timing.child` is the other side.

The children of one call are forked, one after another, from a process that has imported the libraries and done nothing
else: importing takes longer than most measurements. On CUDA, and where processes cannot fork, each is started anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 1800.0  # of one child
VARIABLE = "WORKBENCH_CHILDREN"
STARTING_SECONDS = 120.0


@dataclass(frozen=True)
class Arm:
    """What a child process loads and runs.

    `folder`: a checkpoint folder; or `load`: keyword arguments of `lib.models.loading.load`. `transform`:
    "module:function", called with the loaded model and `arguments`, returns the model to measure. `opener`:
    "module:function", called with the folder and `arguments`, returns the model, which is then not loaded whole.
    `workload`: prefill, decode or generate, of `batch` random prompts; or "module:function", called with the model and
    `workload_arguments`, returns the `Workload`. A timing child gets its workloads from its job instead.
    """

    folder: str | None = None
    load: dict[str, Any] | None = None
    transform: str | None = None
    opener: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    workload: str = "generate"
    workload_arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 16
    dtype: str = "float32"
    device: str = "cpu"


def left_out() -> str | None:
    """Return why no process is to be started (the variable WORKBENCH_CHILDREN is "none": on a device that is lent for
    minutes, starting them takes longer than the rest of a run), or None.
    """
    return f"no processes of their own: {VARIABLE}=none" if os.environ.get(VARIABLE) == "none" else None


def run(
    program: str,
    jobs: Sequence[Mapping[str, Any]],
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> list[dict[str, Any]]:
    """Return the answer of a fresh process to each job, in order; all run on the cores and threads of this one.

    `program` is a module that calls `child.serve`. A job is plain JSON; its entry "arms" lists its arms as
    dictionaries. `environment` adds variables. A process that fails or runs past `limit_seconds` answers
    {"failed": the reason}.
    """
    on_gpu = any(arm["device"].startswith("cuda") for job in jobs for arm in job["arms"])
    if on_gpu and (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that this process's allocator holds back is not free for a child
    together = hasattr(os, "fork") and not on_gpu
    groups: list[Sequence[Mapping[str, Any]]] = [jobs] if together else [[job] for job in jobs]
    return [answer for group in groups for answer in _serve(program, group, together, environment, limit_seconds)]


def _serve(
    program: str,
    jobs: Sequence[Mapping[str, Any]],
    fork: bool,
    environment: Mapping[str, str] | None,
    limit_seconds: float,
) -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if torch else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-m", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **threads, **(environment or {}), "PYTHONPATH": path},
    )
    request = json.dumps({"jobs": jobs, "fork": fork, "limit_seconds": limit_seconds})
    try:
        out, errors = server.communicate(request, timeout=limit_seconds * len(jobs) + STARTING_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"failed": f"the child process ran past {limit_seconds:g} s"}] * len(jobs)
    finally:
        _end(server)
    answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = (errors.strip().splitlines() or ["no message"])[-1]
    lost = {"failed": f"the child process ended with {server.returncode}: {last}"}
    return answers + [lost] * (len(jobs) - len(answers))


def _end(server: "subprocess.Popen[str]") -> None:
    """End a server that still runs, and the children that it has forked."""
    if server.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        server.wait()
    for stream in (server.stdin, server.stdout, server.stderr):
        if stream:
            with suppress(BrokenPipeError):
                stream.close()
