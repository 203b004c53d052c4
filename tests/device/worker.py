"""A process that keeps one model and runs notebooks on it: `python -m tests.device.worker`, started by
`tests.device.processes`.

Reads one request per line from standard input (JSON: optimization, model, scale, parameters, checkpoints, device,
dimensions) and answers on standard output with events, one per line: `load`, `cell`, and either `record` or `failed`.
The notebook's code cells are executed in order in a namespace of their own, as papermill would, without a kernel; their
output goes to the log. The model is loaded once and handed to every notebook; if one has changed it, as the version
counters of its tensors show, the next loads it again.
"""

import contextlib
import dataclasses
import datetime
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.device.processes import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
Tell = Callable[..., None]


class Held:
    """The model that is kept, returned in place of `lib.models.loading.load`."""

    def __init__(self, load: Callable[..., Any], tell: Tell):
        self.load, self.tell = load, tell
        self.loaded: Any = None
        self.key: tuple = ()
        self.versions: list[tuple] = []

    def __call__(self, name: str, scale: str = "proxy", *, tasks: Any = (), **options: Any) -> Any:
        key = (name, scale, *sorted((option, str(value)) for option, value in options.items()))
        if self.loaded is None or key != self.key or self.versions != _versions(self.loaded.model):
            self.loaded = None
            _free()
            start = time.perf_counter()
            self.loaded, self.key = self.load(name, scale, tasks=tasks, **options), key
            self.versions = _versions(self.loaded.model)
            self.tell(event="load", seconds=round(time.perf_counter() - start, 2))
        return dataclasses.replace(self.loaded, chosen_tasks=tuple(tasks))


def _versions(model: Any) -> list[tuple]:
    """Return values that change when a tensor of the model is written to or replaced."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(t), tuple(t.shape), None if t.is_inference() else t._version) for name, t in tensors]


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def play(request: dict[str, Any], held: Held, tell: Tell) -> None:
    """Execute the notebook of a request and report its record or its failure."""
    import IPython.display

    from lib.errors import NotApplicable
    from lib.models import loading
    from lib.report.records import record as records
    from lib.suite.plan import plan

    stem, model = request["optimization"], request["model"]
    wanted = plan.Request(
        optimizations=(stem,),
        models=(model,),
        scale=request["scale"],
        effort="quick",
        device=request["device"],
        checkpoints=request["checkpoints"],
        random_weights=request["scale"] == "full" and not request["checkpoints"],
        parameters=request["parameters"],
    )
    (job,) = plan.plan(wanted, to_run=False)
    values = dict(job.parameters)
    glued: list[Any] = []
    stock = loading.load, records.glue
    loading.load, records.glue = held, glued.append
    IPython.display.display = show
    os.environ["WORKBENCH_DIMENSIONS"] = ",".join(request["dimensions"])
    began, start = datetime.datetime.now().astimezone().isoformat(timespec="seconds"), time.perf_counter()
    try:
        _execute(job.template, values, tell)
        result = glued[-1]
    except NotApplicable as reason:
        about = {"status": "not_applicable", "reason": " ".join(str(reason).split())}
        result = records.build(stem, model, request["scale"], "quick", values, **about)
    finally:
        loading.load, records.glue = stock
        _free()
    seconds = round(time.perf_counter() - start, 2)
    result = result.model_copy(update={"started": began, "seconds": seconds, "parameters": values})
    tell(event="record", record=records.to_json(result))


def show(data: Any, **_: Any) -> None:
    """Print what a notebook displays, as text: replaces IPython's `display`."""
    print(data.get("text/plain", "") if isinstance(data, dict) else data, flush=True)


def _execute(notebook: Any, values: dict[str, Any], tell: Tell) -> None:
    """Execute the code cells; the values replace those of the cell tagged `parameters`, as papermill's cell would."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for index, (kind, source, tags) in enumerate(notebook.cells):
        if kind == "code":
            tell(event="cell", index=index)
            exec(compile(source, f"{notebook.path.name}, cell {index}", "exec"), namespace)
            if "parameters" in tags:
                namespace.update(values)
    namespace.clear()


def main() -> None:
    """Answer requests until standard input closes."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # library output goes to the log
    end_with_parent()
    os.chdir(ROOT / "notebooks")
    os.environ.setdefault("MPLBACKEND", "agg")

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    held: Held | None = None
    for line in sys.stdin:
        request = json.loads(line)
        print(f"--- {request['optimization']}--{request['model']}", flush=True)
        reason = None
        try:
            if held is None:
                from lib.models import loading

                held = Held(loading.load, tell)
            play(request, held, tell)
        except BaseException as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            if not isinstance(error, Exception):
                tell(event="failed", reason=reason)
                raise
        if reason is not None:
            # The error is freed by now, with its causes, whose frames held the notebook's objects. The caller
            # measures at once how much room the next step has.
            with contextlib.suppress(Exception):
                _free()
            tell(event="failed", reason=reason)


if __name__ == "__main__":
    main()
