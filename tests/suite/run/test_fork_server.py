"""A forked child behaves like a started one: its variables, cores, exit code, kernel and measurements."""

import json
import os
import sys

import psutil
import pytest
import workbench

from lib.forked_process import ForkedProcess, run_to_end
from lib.suite.run import fork_server, kernel_process
from lib.suite.run.fork_server import ForkServer
from lib.suite.run.sampling import is_alive

pytestmark = pytest.mark.skipif(not fork_server.possible(), reason="nothing is forked on this system")

PROBE = """
import os

def run(job):
    return {"server": os.getppid(), "planted": os.environ["PLANTED"], "threads": os.environ["OMP_NUM_THREADS"]}
"""
MEASURES = """import json, os
from pathlib import Path

import psutil

from lib.measure.timing import children

os.environ["PLANTED"] = "in the notebook"
[answer] = children.run("probe", [{"arms": []}])
server = psutil.Process(answer["server"])
answer |= {"command": server.cmdline(), "children": server.ppid() == os.getpid()}
answer |= {"here": os.getcwd(), "cores": sorted(os.sched_getaffinity(0))}
Path(os.environ["MARKS"], "answer.json").write_text(json.dumps(answer))"""
ENDS = """import atexit, os
from pathlib import Path

atexit.register(Path(os.environ["MARKS"], NAME).touch)"""
DRAWS = """from matplotlib import pyplot

pyplot.plot([1, 2])
pyplot.show()"""


@pytest.fixture
def server(tmp_path):
    """A server that imports almost nothing."""
    served = ForkServer({**os.environ, **kernel_process.threads(1)}, ["json", "no_such_module"])
    yield served
    served.end()


def _events(child):
    return [json.loads(line) for line in child.stdout]


def test_a_child_runs_its_task_and_returns_its_exit_code(server, tmp_path):
    request = {"environment": {**os.environ, "PLANTED": "a"}, "cores": []}
    with (tmp_path / "log").open("ab") as log:
        child = server.fork(request, log)
        other = server.fork(request, log)
    order = {"notebook": "nowhere.ipynb", "output": str(tmp_path / "out.ipynb"), "parameters": {}, "cores": []}
    child.stdin.write(json.dumps(order | {"directory": str(tmp_path), "cell_seconds": 9, "glued": False}).encode())
    child.stdin.write(b"\n")
    child.stdin.flush()
    [end] = [json.loads(child.stdout.readline())]
    assert os.getsid(child.pid) == child.pid != other.pid
    assert end["event"] == "end" and "nowhere.ipynb" in end["error"]["text"]
    child.stdin.close()
    assert child.wait(20) == 1 and child.returncode == child.poll() == 1
    other.kill()
    assert other.wait(20) == -9
    assert _events(other) == []


def test_forked_children_outlive_their_server_with_unknown_exit_codes(server, tmp_path):
    with (tmp_path / "log").open("ab") as log:
        child = server.fork({"environment": dict(os.environ), "cores": []}, log)
        server.process.kill()
        server.process.wait()
        assert is_alive(psutil.Process(child.pid))
        assert child.wait(20) == -9 and server.fork({"environment": {}, "cores": []}, log) is None
    child.stdin.close()
    workbench.wait_for(lambda: not psutil.pid_exists(child.pid))


def test_variables_longer_than_a_message_are_not_truncated(server, tmp_path):
    """The child is then started anew, and the server keeps running."""
    long = {f"MODULES_{number}": "x" * 2000 for number in range(80)}
    with (tmp_path / "log").open("ab") as log:
        assert server.fork({"environment": {**os.environ, **long}, "cores": []}, log) is None
        child = server.fork({"environment": dict(os.environ), "cores": []}, log)
    child.stdin.close()
    assert child.wait(20) != 0  # it received nothing


def test_a_server_is_used_only_for_its_own_thread_count(server, tmp_path):
    with (tmp_path / "log").open("ab") as log:
        assert kernel_process._forked(server, {**os.environ, **kernel_process.threads(2)}, (0, 1), log) is None
        assert kernel_process._forked(None, {**os.environ, **kernel_process.threads(1)}, (0,), log) is None


def test_setting_the_variable_to_none_starts_every_child_anew(monkeypatch):
    monkeypatch.setenv(fork_server.VARIABLE, "none")
    with kernel_process.fork_server(1, ["qwen3"]) as served:
        assert served is None


@pytest.mark.parametrize(
    ("program", "code"),
    [(lambda: None, 0), (lambda: sys.exit(3), 3), (lambda: sys.exit("why"), 1), (lambda: 1 / 0, 1)],
    ids=["well", "exit", "text", "error"],
)
def test_a_forked_process_exits_as_python_would(program, code):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run_to_end(program)
    assert ForkedProcess(pid).wait(20) == code


def test_a_notebook_measures_in_processes_forked_with_its_kernel(project, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    cells = [("Measured", MEASURES), ("Drawn", DRAWS), ("Record", workbench.RECORD)]
    workbench.notebook(project / "notebooks" / "measures.ipynb", cells)
    workbench.import_all(project)
    more = {"MARKS": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    ended = workbench.build(project, "run", "measures", "--model", "alpha-1.5", **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    answer = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert answer["children"] and any("fork_server" in word for word in answer["command"])
    assert answer["planted"] == "in the notebook" and answer["threads"] == str(len(answer["cores"]))
    assert answer["here"] == str(project / "notebooks")
    drawn = json.loads((project / "executed/proxy/measures--alpha-1.5.ipynb").read_text(encoding="utf-8"))
    kinds = {kind for cell in drawn["cells"] for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert "image/png" in kinds


def test_a_kernel_shuts_down_by_itself_with_or_without_a_used_measuring_server(project, tmp_path):
    """A kernel that jupyter_client has to terminate runs none of its exit handlers."""
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    shown = [("Ends", ENDS), ("Record", workbench.RECORD)]
    workbench.notebook(project / "notebooks" / "idle.ipynb", shown)
    workbench.notebook(project / "notebooks" / "measures.ipynb", [("Measured", MEASURES), *shown])
    workbench.import_all(project)
    more = {"MARKS": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    ended = workbench.build(project, "run", "idle", "measures", "--model", "alpha-1.5", **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "idle").exists() and (tmp_path / "measures").exists()
