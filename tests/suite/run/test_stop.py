"""A build stopped gracefully or not: no kernel outlives it, finished runs are kept, the next call resumes."""

import json
import signal

import psutil
import pytest
import workbench

from lib.suite.run.sampling import is_alive

# Identifies itself, then takes as long as told, or until it may continue.
SLOW = """import os, time
from pathlib import Path

marks, start = Path(os.environ["MARKS"]), time.monotonic()
(marks / (NAME + model + ".pid")).write_text(str(os.getpid()))
while time.monotonic() - start < float(os.environ["SLOW"]) and not (marks / "go").exists():
    time.sleep(0.05)"""


@pytest.fixture
def slow(project, tmp_path):
    """Return a project with a quick and a slow template, and the folder to which the slow kernel writes its pid."""
    workbench.notebook(project / "notebooks" / "z_slow.ipynb", [("Slow", SLOW), ("Record", workbench.RECORD)])
    marks = tmp_path / "marks"
    marks.mkdir()
    return project, marks


@pytest.fixture(params=[workbench.NOT_FORKED, workbench.FORKED], ids=["started", "forked"])
def how_started(request):
    """The environment variables that make children start anew, or be forked."""
    return request.param


def _kernel(marks):
    """Return the slow kernel once it has identified itself."""
    path = marks / "z_slowalpha-1.5.pid"
    return psutil.Process(int(workbench.wait_for(lambda: path.is_file() and path.read_text())))


def _runs(root):
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))["started"]
        for path in (root / "executed/proxy").glob("*--*.json")
    }


def test_a_killed_build_resumes_where_it_was(slow, how_started):
    root, marks = slow
    arguments = ("run", "--model", "alpha-1.5", "--jobs", "1")
    process = workbench.begin(root, *arguments, MARKS=str(marks), SLOW="600", **how_started)
    kernel = _kernel(marks)
    before = _runs(root)
    assert list(before) == ["well--alpha-1.5.json"]
    workbench.kill(process, signal.SIGKILL)
    workbench.wait_for(lambda: not is_alive(kernel), 15)
    workbench.wait_for(lambda: not workbench.running(root), 15)
    ended = workbench.build(root, *arguments, MARKS=str(marks), SLOW="0")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 of 2 runs are already finished and kept" in ended.stdout
    after = _runs(root)
    assert set(after) == {"well--alpha-1.5.json", "z_slow--alpha-1.5.json"}
    assert after["well--alpha-1.5.json"] == before["well--alpha-1.5.json"]
    assert not (root / "executed/proxy/.running").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_build_ends_its_kernels(slow, how, how_started):
    root, marks = slow
    force = ("--force",) if how == signal.SIGTERM else ()
    arguments = ("run", "z_slow", "--model", "alpha-1.5", *force)
    process = workbench.begin(root, *arguments, MARKS=str(marks), SLOW="600", **how_started)
    kernel = _kernel(marks)
    workbench.kill(process, how)
    assert process.returncode == 128 + how
    again = "with --force the same command runs all of them again" if force else "the same command resumes"
    assert f"stopped; finished runs are kept, and {again}" in process.stdout.read()
    assert not is_alive(kernel)
    workbench.wait_for(lambda: not workbench.running(root), 15)


def test_the_index_of_a_stopped_build_shows_finished_runs(slow):
    root, marks = slow
    process = workbench.begin(root, "run", "--model", "alpha-1.5", "--jobs", "1", MARKS=str(marks), SLOW="600")
    _kernel(marks)
    workbench.kill(process, signal.SIGINT)
    page = (root / "executed/proxy/index.html").read_text(encoding="utf-8")
    assert process.returncode == 130 and 'href="well--alpha-1.5.html"' in page and "1 not applicable" in page


def test_a_lost_worker_is_retried_once(slow, how_started):
    root, marks = slow
    arguments = ("run", "z_slow", "--model", "alpha-1.5")
    process = workbench.begin(root, *arguments, MARKS=str(marks), SLOW="600", **how_started)
    first = _kernel(marks)
    first.parent().kill()
    (marks / "go").touch()
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    assert "WorkerLost, trying once more" in out and not is_alive(first)
    assert workbench.record(root, "z_slow--alpha-1.5")["status"] == "not_applicable"


def test_a_build_continues_without_a_lost_fork_server(slow):
    root, marks = slow
    arguments = ("run", "--model", "alpha-1.5", "--jobs", "1")
    process = workbench.begin(root, *arguments, MARKS=str(marks), SLOW="600", **workbench.FORKED)
    workbench.wait_for(lambda: (root / "executed/proxy/well--alpha-1.5.json").is_file())
    kernel = _kernel(marks)
    server = next(child for child in psutil.Process(process.pid).children() if "fork_server" in str(child.cmdline()))
    assert server in kernel.parents()
    server.kill()
    (marks / "go").touch()
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    assert len(_runs(root)) == 2
