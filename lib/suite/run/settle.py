"""Turns the outcome of an execution into the files of the result folder, among them the record.

Papermill marks every cell `completed` even when the kernel was killed or a cell ran out of time, so its marks are not
used. Knows neither processes nor their order.
"""

import datetime
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import NotApplicable
from lib.files import seen_from_here
from lib.report.records import record as records
from lib.suite.plan.plan import Job
from lib.suite.plan.template import Template
from lib.suite.run.kernel_process import ExecutionOutcome, Task
from lib.suite.store import result_folder
from lib.suite.store.result_folder import Folder

LOG_LINES = 40
LOST_WORKERS = "LostWorkers"  # kind of the error of a run that lost its workers, not attributed to the notebook


@dataclass(frozen=True)
class Result:
    """The result of a run, for the final lines of a build. `notebook` is the relative path of a failed notebook."""

    stem: str
    status: str
    reason: str | None
    notebook: str | None
    seconds: float


def settle(folder: Folder, job: Job, parts: Mapping, key: str, task: Task, outcome: ExecutionOutcome) -> Result:
    """Put the notebook into place and write the record; return the run's result. Raises OSError (a full disk)."""
    record: records.Record | None = None
    status: records.Status = "failed"
    reason: str | None
    if outcome.error and outcome.error["kind"] == NotApplicable.__name__ and outcome.error["raised"]:
        status, reason = "not_applicable", " ".join(outcome.error["text"].split())
    elif outcome.error:
        reason = fault(job.template, outcome, outcome.error)
    else:
        record, reason = _accept(job, outcome.record)
    if record is None:
        record = records.build(
            job.optimization, job.model, job.scale, job.effort, job.parameters, status=status, reason=reason
        )
        record = record.model_copy(update={"dimensions": list(job.dimensions) or None})
    log = _log(job.template, task, outcome, record.status == "failed")
    record = record.model_copy(
        update={
            "key": key,
            "started": _started(outcome.seconds),
            "seconds": round(outcome.seconds, 2),
            "parameters": dict(job.parameters),
            "process": _process(task, outcome),
            "log": log,
        }
    )
    _place(folder, job.stem, task, failed=record.status == "failed")
    result_folder.keep_parts(folder, job.stem, parts)
    records.write(record, folder.of(job.stem, ".json"))
    failed = folder.failed(job.stem)
    notebook = seen_from_here(failed) if record.status == "failed" and failed.is_file() else None
    return Result(job.stem, record.status, record.reason, notebook, outcome.seconds)


def _accept(job: Job, content: Any) -> tuple[records.Record | None, str | None]:
    """Return the record that the notebook glued, or None and why it is not this job's record."""
    if content is None:
        return None, 'the notebook glued no record; the cell tagged "record" has to call lib.report.records.record.glue'
    record = records.from_json(content, f"{job.stem}.ipynb")
    for name in ("optimization", "model", "scale", "effort"):
        glued, expected = getattr(record, name), getattr(job, name)
        if glued != expected:
            return None, f'the glued record says {name} "{glued}", but this run is "{expected}"'
    if record.dimensions != (list(job.dimensions) or None):
        return (
            None,
            f"the glued record has {record.dimensions or 'all dimensions'}; use lib.report.records.record.build",
        )
    return record, None


def _started(seconds: float) -> str:
    began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    return began.astimezone().isoformat(timespec="seconds")


def _process(task: Task, outcome: ExecutionOutcome) -> records.Process:
    """Return the samples with the number of parallel jobs, the cores, and the seconds of each cell."""
    samples = outcome.samples
    return records.Process(
        seconds=samples.seconds,
        cpu_percent=samples.cpu_percent,
        memory_bytes=[float(size) for size in samples.memory_bytes],
        interval_seconds=samples.interval_seconds,
        cores=len(task.cores),
        pinned_to=list(task.cores),
        jobs_side_by_side=task.jobs,
        cell_seconds={str(index): seconds for index, seconds in sorted(outcome.cell_seconds.items())},
    )


def _place(folder: Folder, stem: str, task: Task, failed: bool) -> None:
    if task.log.is_file():
        result_folder.place(task.log, folder.log(stem))
    if failed:
        folder.failed(stem).unlink(missing_ok=True)
        result_folder.discard_pages(folder, stem)
        if task.output.is_file():
            result_folder.place(task.output, folder.failed(stem))
    else:
        result_folder.place(task.output, folder.of(stem, ".ipynb"))
        folder.failed(stem).unlink(missing_ok=True)
    shutil.rmtree(task.folder, ignore_errors=True)


def fault(template: Template, outcome: ExecutionOutcome, error: Mapping[str, Any]) -> str:
    """Return in one line which cell failed and why."""
    kind, text = error["kind"], " ".join(error["text"].split())
    if kind == "CellTimeoutError":
        reason = "it exceeded its time limit"
    elif kind == "TimeLimit":
        reason = text
    elif kind == "DeadKernelError":
        held = max(outcome.samples.memory_bytes, default=0)
        reason = f"the kernel was killed or died (it and its children held up to {held / 2**20:.0f} MiB)"
    else:
        reason = f"{kind}: {text[:300]}" if text else kind
    if kind == LOST_WORKERS:
        return text
    if outcome.cell is None:
        return f"before the first cell: {reason}"
    return f"{_cell(template, outcome.cell)}: {reason}"


def _cell(template: Template, executed: int) -> str:
    """Return a description of the template's cell with the index `executed` in the executed notebook: its number from
    1, heading and first line. Papermill injects the parameters after the cell tagged `parameters`.
    """
    at = next(index for index, (_, _, tags) in enumerate(template.cells) if "parameters" in tags)
    if executed == at + 1:
        return "the injected parameters"
    index = executed if executed <= at else executed - 1
    if index >= len(template.cells):  # the notebook has changed since
        return f"cell {index + 1}"
    heading = _heading(template, index)
    lines = [line.strip() for line in template.cells[index][1].splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith("#")), "")
    return f"cell {index + 1}{f' under “{heading}”' if heading else ''} (`{first[:60]}`)"


def _heading(template: Template, index: int) -> str:
    for kind, source, _ in reversed(template.cells[:index]):
        for line in source.splitlines():
            if kind == "markdown" and line.startswith("#"):
                return line.lstrip("# ").strip()
    return ""


def _log(template: Template, task: Task, outcome: ExecutionOutcome, failed: bool) -> str:
    """Return the run's log: the seconds of each cell and, if it failed, the last lines of the kernel's log."""
    lines = [f"{outcome.seconds:.1f} s, {task.jobs} side by side, cores {', '.join(map(str, task.cores))}"]
    for index, seconds in sorted(outcome.cell_seconds.items()):
        lines.append(f"{seconds:8.2f} s  {_cell(template, index)}")
    if failed and task.log.is_file():
        kernel_log = task.log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines += ["", *kernel_log[-LOG_LINES:]]
    return "\n".join(lines)
