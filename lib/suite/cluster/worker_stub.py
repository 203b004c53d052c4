"""What the build sends to a Dask worker: starts the workbench that lies there, and brings back what it left.

This module travels as text of its own, so a worker need not be able to import `lib`: the standard library and
`distributed` are all it uses. The workbench on the worker's side is the folder in which `dask worker` was started, or
the one that its variable WORKBENCH_ROOT names. Knows nothing of what is asked (`lib.suite.cluster.remote`).
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
# Dask's nanny sets it for its worker's own sake; in a kernel it would make every release of memory slower.
NOT_PASSED_ON = ("MALLOC_TRIM_THRESHOLD_",)


def call(request: dict) -> dict:
    """Carry out `request` in a process of its own; return its answer, with the bytes of the files it left.

    The answer holds `error` where there is no workbench, and `lost` where the process ended without an answer. When the
    build, the scheduler or this worker goes, the process and all that it started are ended.
    """
    import distributed

    worker = distributed.get_worker()
    key = worker.get_current_task()
    root = Path(os.environ.get("WORKBENCH_ROOT") or os.getcwd())
    if not (root / "lib" / "suite" / "cluster" / "remote.py").is_file():
        return {"error": f"no workbench in {root}; start `dask worker` in the workbench's folder"}
    folder = Path(tempfile.mkdtemp(prefix="workbench-", dir=worker.local_directory))
    try:
        with (folder / "said.txt").open("wb") as log:
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
                process.stdin.close()  # which ends the process, if it has not ended by itself
            process.wait()
        if answer is None:
            log_lines = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
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
    """Send the request and forward progress; return the process's answer, or None if there was none."""
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
