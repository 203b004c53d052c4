"""The code that the build sends to a Dask worker: it starts the worker's copy of the workbench and returns its files.

This module is sent by value, so that a worker need not be able to import `lib`: it uses only the standard library and
`distributed`. The worker's copy of the workbench is the folder in which `dask worker` was started, or WORKBENCH_ROOT.
Independent of the requests (`lib.suite.cluster.remote`).
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

POLL_SECONDS = 0.2
TOPIC = "workbench"
# Dask's nanny sets it for the worker; in a kernel it would slow down every release of memory.
NOT_PASSED_ON = ("MALLOC_TRIM_THRESHOLD_",)


def call(request: dict) -> dict:
    """Carry out `request` in a separate process; return its answer, with the content of its result files.

    The answer has `error` where there is no workbench, and `lost` where the process ended without an answer. If the
    build, the scheduler or this worker ends, so do the process and its children.
    """
    import distributed

    worker = distributed.get_worker()
    key = worker.get_current_task()
    root = Path(os.environ.get("WORKBENCH_ROOT") or os.getcwd())
    if not (root / "lib" / "suite" / "cluster" / "remote.py").is_file():
        return {"error": f"no workbench in {root}; start `dask worker` in the workbench's folder"}
    folder = Path(tempfile.mkdtemp(prefix="workbench-", dir=worker.local_directory))
    try:
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lib.suite.cluster.remote"],
                cwd=root,
                env={name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            answer = _follow(process, request | {"folder": str(folder)}, worker, key)
        finally:
            if process.stdin is not None:
                process.stdin.close()  # ends the process if it still runs
            process.wait()
        if answer is None:
            log_lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return {
                "lost": f"its process ended with {process.returncode}"
                + (f" ({log_lines[-1][:200]})" if log_lines else "")
            }
        results = folder / "results"
        paths = [path for path in results.rglob("*") if path.is_file()] if results.is_dir() else []
        return answer | {"files": {path.relative_to(results).as_posix(): path.read_bytes() for path in paths}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _follow(process, request, worker, key):
    """Send the request and forward progress; return the process's answer, None without one."""
    events = queue.Queue()

    def listen():
        for line in process.stdout:
            events.put(line)
        events.put(None)

    threading.Thread(target=listen, daemon=True).start()
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return None
    answer = None
    while True:
        try:
            line = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if _unwanted(worker, key):
                return None
            continue
        if line is None:
            return answer
        event = json.loads(line)
        if "doing" in event:
            worker.log_event(TOPIC, {"key": key, "doing": event["doing"]})
        else:
            answer = event


def _unwanted(worker, key):
    """Return whether the answer is no longer needed: the build or scheduler is gone, or this worker is closing."""
    task = worker.state.tasks.get(key)
    return task is None or task.state == "cancelled" or worker.status.name in ("closing", "closed", "failed")
