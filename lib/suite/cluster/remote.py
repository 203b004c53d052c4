"""The workbench on a worker's side: `python -m lib.suite.cluster.remote`, started only by `worker_stub.py`.

Reads one line of JSON from standard input and answers with one. `hello` reports the cores, and whether code,
environment, weights and data here equal those of the build. `run` makes the same comparison and then runs the job, with
the same loop as on a single machine (`lib.suite.run.schedule`), into its own result folder, whose files the build puts
into place. When standard input closes, the answer is no longer wanted: all processes are ended.
"""

import contextlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import files
from lib.errors import UserError
from lib.models import parameters as parameter_files
from lib.suite.plan import cache_key, dependencies, plan
from lib.suite.plan import template as templates
from lib.suite.plan.plan import Job
from lib.suite.run import cpu_affinity
from lib.suite.run.sampling import Tree
from lib.suite.store import result_folder
from lib.suite.store.result_folder import Folder

BOOT = Path("/proc/sys/kernel/random/boot_id")
REPORT_SECONDS = 1.0
STUDIES = "studies"  # the results' folder of the trials of searches


def library(hashes: cache_key.Hashes) -> dict[str, str]:
    """Return the hash of every file of `lib`: a worker also runs the suite's own code, not only the template's."""
    return {f"lib/{name}": value for name, value in hashes.of_folder(plan.ROOT / "lib").items()}


def describe(job: Job) -> dict[str, Any]:
    """Return a job as plain JSON, without its template: the worker reads its own, and the keys are compared."""
    return {
        "optimization": job.optimization,
        "model": job.model,
        "scale": job.scale,
        "effort": job.effort,
        "parameters": dict(job.parameters),
        "dimensions": list(job.dimensions),
    }


def job_of(described: dict[str, Any]) -> Job:
    """Return the job of a description from `describe`. Raises UserError where its template cannot be read here."""
    path = plan.NOTEBOOKS / f"{described['optimization']}.ipynb"
    if not path.is_file():
        raise UserError(f"notebooks/{path.name}: no such file")
    rest = {name: described[name] for name in ("model", "scale", "effort", "parameters")}
    return Job(templates.read(path), dimensions=tuple(described["dimensions"]), **rest)


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries belongs in the log
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(Path(request["folder"]),), daemon=True).start()

    writing = threading.Lock()

    def tell(**event: Any) -> None:
        with writing:
            answers.write(json.dumps(event) + "\n")
            answers.flush()

    os.environ.update(request["variables"])
    try:
        tell(**{"hello": _hello, "run": _run}[request["do"]](request, tell))
    except UserError as error:
        tell(error=str(error))
    os._exit(0)  # the listening thread may block on standard input


def _listen(folder: Path) -> None:
    """End all processes when standard input closes: the worker has died, or the answer is no longer needed."""
    for _ in sys.stdin:
        pass
    Tree(os.getpid()).end_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _compared(
    request: dict, hashes: cache_key.Hashes, reached: dict[str, list[Path]], job: Job, expected_key: str
) -> dict | None:
    """Return None if this side matches the build for `job`, else the parts of the key on this side."""
    parts = cache_key.parts(job, hashes, reached)
    return None if cache_key.of(parts) == expected_key else parts


def _hello(request: dict, tell: Callable[..., None]) -> dict:
    """Return this machine's id, its cores, the GPU if the jobs use one and, if something differs from the build, the
    parts on this side.
    """
    hashes, reached = cache_key.Hashes(), {}
    here = library(hashes)
    answer = {"host": _host(), "cores": cpu_affinity.available(), "machine": platform.node(), "parts": None}
    if cache_key.digest(here) != request["library"]:
        return answer | {"parts": {"code": here}}
    for described, expected_key in request["jobs"]:
        job = job_of(described)
        plan.check_device(job.parameters["device"])
        if job.parameters["device"] == "cuda" and "gpu" not in answer:
            answer["gpu"] = _gpu()
        if job.model not in (*plan.models(), *parameter_files.registered()):
            raise UserError(f"parameters/{job.model}.yaml: no such file")
        if job.optimization not in reached:
            reached[job.optimization] = dependencies.reached(job.template)
        if parts := _compared(request, hashes, reached, job, expected_key):
            return answer | {"parts": parts, "stem": job.stem}
    return answer


def _host() -> str:
    """Return an id shared by all workers of one machine; containers on it share its cores and this id."""
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _gpu() -> str:
    """Return the id of the GPU that this worker's runs use: the first in CUDA_VISIBLE_DEVICES, or the first of all. The
    number alone would not do: under a batch system that hides the others, different GPUs have the same one. Raises
    UserError.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    if not first.isdigit():
        return first
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(int(first)))
    except pynvml.NVMLError as error:
        raise UserError(f"CUDA_VISIBLE_DEVICES starts with {first}: no such NVIDIA device here ({error})") from None
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)


class _ProgressReports:
    """Replaces the progress table on a worker: forwards the job's current step to the build, which shows it."""

    def __init__(self, tell: Callable[..., None]):
        self.tell = tell
        self.side_by_side = 1
        self.doing: Callable[[], str] = lambda: "starting"
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        last = ""
        while True:
            if (now := self.doing()) != last:
                self.tell(doing=now)
                last = now
            time.sleep(REPORT_SECONDS)

    def start(self, stem: str, doing: Callable[[], str]) -> None:
        self.doing = doing

    def line(self, text: str) -> None:
        self.tell(doing=text)

    def end(self, *_: Any) -> None:
        self.doing = lambda: "sending"


def _run(request: dict, tell: Callable[..., None]) -> dict:
    """Run the job into `<folder>/results` and render its pages; return its status, reason and seconds. The job can read
    the build's stacks, and stacks that it chooses are among its results.
    """
    from lib.suite.run import schedule

    job, hashes = job_of(request["job"]), cache_key.Hashes()
    parts = cache_key.parts(job, hashes)
    if cache_key.digest(library(hashes)) != request["library"] or cache_key.of(parts) != request["key"]:
        return {"parts": parts | {"code": {**parts["code"], **library(hashes)}}, "stem": job.stem}
    base = Path(request["folder"])
    folder = Folder(base / "results")
    folder.path.mkdir()
    shared = _shared(base, job.scale, request["stacks"])
    build = schedule.BuildContext(
        folder=folder,
        shares=[request["cores"]],
        temporary=base / "temporary",
        neighbours=[(optimization, model) for optimization, model in request["neighbours"]],
        progress=_ProgressReports(tell),
        side_by_side=request["side_by_side"],
    )
    [result] = schedule.run(build, [schedule.Entry(job, request["key"], parts)])
    shutil.rmtree(folder.running, ignore_errors=True)
    chosen = {name: text for name, text in result_folder.stacks(shared).items() if request["stacks"].get(name) != text}
    result_folder.lay_out(folder, chosen)
    return {"status": result.status, "reason": result.reason, "seconds": result.seconds}


def _shared(base: Path, scale: str, stacks: dict[str, str]) -> Folder:
    """Return the folder of the files that runs share, and set it in the environment. It has the build's stacks;
    interrupted searches resume from the studies on this machine.
    """
    studies = files.results_folder(scale) / STUDIES
    shared = Folder(base / "shared" / scale)
    result_folder.lay_out(shared, stacks)
    with contextlib.suppress(OSError):  # without it a search starts from the beginning
        studies.mkdir(parents=True, exist_ok=True)
        (shared.path / STUDIES).symlink_to(studies, target_is_directory=True)
    os.environ[files.RESULTS] = str(base / "shared")
    return shared


if __name__ == "__main__":
    main()
