"""Processes are started once per model, ended when they take too long, and make room for other models; a session
rehearsed in full on the CPU leaves records, an index and a page.
"""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest

from lib.errors import UserError
from lib.measure.timing import children
from tests.device import cuda_tests, full_size, processes, rehearsal, results, schedule
from tests.device.processes import Processes
from tests.device.schedule import Step

CHILD = """
    import json, sys, time
    for line in sys.stdin:
        request = json.loads(line)
        how = request["parameters"].get("how", "record")
        print(json.dumps({"event": "cell", "index": 3}), flush=True)
        if how == "late":
            time.sleep(600)
        if how == "dies":
            sys.exit(9)
        if how in ("fails", "faults"):
            reasons = {"fails": "RuntimeError: CUDA out of memory", "faults": "RuntimeError: CUDA error: misaligned"}
            print(json.dumps({"event": "failed", "reason": reasons[how]}), flush=True)
            continue
        record = {"status": "ok", "reason": None, "optimization": request["optimization"]}
        print(json.dumps({"event": "record", "record": record}), flush=True)
"""


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """Return a function that makes an executor with the small program above as workers; all are ended afterwards."""
    program = tmp_path / "child.py"
    program.write_text(textwrap.dedent(CHILD))
    stock, sessions, started = processes.subprocess.Popen, [], []

    def popen(command, **options):
        started.append(command[2])
        return stock([command[0], str(program)], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)

    def make(free=lambda: None, kept=2, slower=1.0):
        sessions.append(Processes(tmp_path / "log", "cpu", free, kept=kept, slower=slower))
        sessions[-1].started = started
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def _step(model: str = "a", how: str = "record", **about) -> Step:
    return Step(f"x--{model}", 60.0, model, "x", {"how": how}, **about)


def test_a_model_is_loaded_once_for_several_steps(executor):
    session = executor()
    assert session.loads(_step())
    outcomes = [session.execute(_step(), 20.0) for _ in range(3)]
    assert [ended.status for ended in outcomes] == ["finished"] * 3
    assert len(session.started) == 1 and not session.loads(_step())


def test_an_overrun_names_its_cell_and_the_process_is_restarted(executor):
    session = executor()
    assert session.execute(_step(), 20.0).status == "finished"  # so that it reports its cell at once
    start = time.monotonic()
    ended = session.execute(_step(how="late"), 1.0)
    assert (ended.status, ended.reason) == ("stopped", "took longer than its limit, in cell 3")
    assert time.monotonic() - start < 60 and session.loads(_step())
    assert session.execute(_step(), 20.0).status == "finished"


def test_limits_use_the_clock_that_set_them(executor):
    session = executor(slower=1e4)
    assert session.execute(_step(), 2e-3).status == "finished"  # twenty seconds of real time
    assert executor().execute(_step(), 1e-3).status == "stopped"  # starting a process takes longer


def test_a_lost_process_and_a_failed_notebook_are_distinguished(executor):
    session = executor()
    assert session.execute(_step(how="dies"), 20.0).reason == "its process was lost"
    ended = session.execute(_step(how="fails"), 20.0)
    assert (ended.status, ended.reason) == ("failed", "cell 3: RuntimeError: CUDA out of memory")
    assert not session.loads(_step()), "a process that has told of a failure goes on"


def test_a_process_runs_nothing_after_a_device_fault(executor):
    session = executor()
    assert session.execute(_step(how="faults"), 20.0).reason == "cell 3: RuntimeError: CUDA error: misaligned"
    assert session.loads(_step()) and not session.workers
    assert session.execute(_step(), 20.0).status == "finished" and len(session.started) == 2


FAILS = """
import gc, os, types, weakref

import lib.models

lib.models.loading = types.SimpleNamespace(load=None)  # libraries of models are not needed here

from tests.device import worker

class Weights:
    pass

out, made = os.dup(1), []

def play(request, held, tell):
    weights = Weights()
    made.append(weakref.ref(weights))
    try:
        raise KeyError("a cause, whose frame holds the weights")
    except KeyError as cause:
        raise ValueError("what is told") from cause

def free():
    gc.collect()
    os.write(out, b'{"event": "freed", "gone": %s}\\n' % (b"true" if made[0]() is None else b"false"))

worker.play, worker._free = play, free
worker.main()
"""


def test_memory_is_free_before_a_failure_is_reported():
    """After a failure the caller checks at once whether the next step has room."""
    order = json.dumps({"optimization": "x", "model": "a"}) + "\n"
    options = {"input": order, "capture_output": True, "text": True, "cwd": processes.ROOT, "start_new_session": True}
    ended = subprocess.run([sys.executable, "-c", FAILS], **options)
    events = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, ended.stderr
    assert events == [{"event": "freed", "gone": True}, {"event": "failed", "reason": "ValueError: what is told"}]


@pytest.mark.parametrize(
    ("device", "outcomes", "code", "expected"),
    [
        ("cuda", ["passed", "skipped"], 0, ("finished", None)),
        ("cuda", ["passed", "failed"], 1, ("failed", "1 tests failed")),
        ("cuda", [], 4, ("failed", "pytest ran no test (exit code 4)")),
        ("cuda", ["passed"], 3, ("failed", "no test failed, but pytest ended with exit code 3")),
        ("cuda", ["skipped", "skipped"], 0, ("failed", "every test was skipped: needs a GPU")),
        ("cpu", ["skipped"], 0, ("finished", None)),
    ],
)
def test_the_tests_step_is_finished_if_it_completes_and_uses_the_device(tmp_path, device, outcomes, code, expected):
    tests = [{"name": "test", "outcome": outcome, "reason": "needs a GPU"} for outcome in outcomes]
    assert Processes(tmp_path / "log", device, lambda: None)._outcome(tests, code) == expected


def test_tests_may_start_processes_though_notebooks_do_not(tmp_path, monkeypatch):
    """Some compare what a child process reads with what is read in place: without a child they always fail."""
    started = []

    class Told:
        def __init__(self, module, log, environment):
            started.append({**os.environ, **environment})

        def next(self, seconds):
            return {"event": "ended", "code": 0}

        def end(self):
            """Do nothing: nothing was started."""

    monkeypatch.setattr(processes, "Child", Told)
    monkeypatch.setenv(children.VARIABLE, "none")
    Processes(tmp_path / "log", "cuda", lambda: None).execute(Step(schedule.TESTS, 60.0), 20.0)
    monkeypatch.setenv(children.VARIABLE, started[0][children.VARIABLE])
    assert children.why_none() is None


def test_other_models_make_room_for_a_new_one(executor):
    session = executor(free=lambda: 10.0 if session.workers else 100.0)
    session.execute(_step("a"), 20.0)
    assert session.hindrance(_step("b", needs_bytes=50.0)) is None
    assert not session.workers
    assert "GiB are free" in session.hindrance(_step("c", needs_bytes=500.0))


def test_memory_of_loaded_weights_is_not_counted_twice(executor):
    session = executor(free=lambda: 30.0)
    session.execute(_step("a"), 20.0)
    assert session.hindrance(_step("a", needs_bytes=50.0, weights_bytes=25.0)) is None
    assert session.workers


def test_a_checkpoint_without_disk_space_is_not_written(executor):
    reason = executor().hindrance(_step("a", needs_bytes=1.0, disk_bytes=1e18))
    assert "of the temporary disk" in reason


def test_no_more_models_are_kept_than_requested(executor):
    session = executor(kept=1)
    for model in "ab":
        session.execute(_step(model), 20.0)
    assert [model for model, _ in session.workers] == ["b"]


def test_a_process_ends_with_its_parent():
    program = "from tests.device.processes import end_with_parent; end_with_parent(); print('it watches', flush=True)\n"
    program += "import time; time.sleep(600)"
    starter = f"""
import subprocess, sys
options = dict(start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
process = subprocess.Popen([sys.executable, "-c", {program!r}], **options)
assert process.stdout.readline() == b"it watches\\n"
print(process.pid, flush=True)
"""
    options = {"capture_output": True, "text": True, "check": True, "cwd": processes.ROOT}
    ended = subprocess.run([sys.executable, "-c", starter], **options)
    process = int(ended.stdout)
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the process outlived its parent"
            time.sleep(0.1)


def test_one_case_per_function_runs_first_led_by_functions_that_never_ran():
    flex, sparse = cuda_tests.FIRST[1], cuda_tests.FIRST[0]
    names = ["test_x[1]", "test_x[2]", f"{flex}[all-16]", f"{flex}[all-64]", f"{sparse}[16x1]", f"{sparse}[2:4]"]
    ordered = [names[at] for at in cuda_tests.in_order(names)]
    assert ordered[:3] == [f"{sparse}[2:4]", f"{flex}[all-64]", "test_x[1]"]
    assert sorted(ordered) == sorted(names)


def test_sizes_follow_from_the_configuration():
    exact = {"qwen3-vl-2b": 2_127_532_032, "qwen3-4b-instruct-2507": 4_022_468_096}
    exact |= {"glm-4.7-flash": 29_943_390_976, "qwen3-coder-30b": 30_532_122_624}
    for name, count in exact.items():
        assert full_size.weights_bytes(name) == pytest.approx(2 * count, rel=0.12)


def test_a_machine_without_git_reports_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert full_size._about(570.0, "cpu", [])["commit"] is None


def test_notebooks_accept_every_session_parameter():
    from lib.suite.plan import plan

    for name, parameters in schedule.OPTIMIZATIONS.items():
        about = {"scale": "full", "random_weights": True, "device": "cuda", "parameters": parameters}
        for job in plan.plan(plan.Request((name,), tuple(schedule.MODELS[0]), **about), to_run=False):
            assert all(job.parameters[key] == value for key, value in parameters.items())


def test_one_optimization_is_rehearsed_in_full(tmp_path, capsys):
    chosen = ["--out", str(tmp_path), "--optimization", "structured_pruning"]
    code = full_size.main([*chosen, "--model", "glm-4.7-flash", "rehearse"])
    index = json.loads((tmp_path / results.INDEX).read_text())
    assert code == 0, index["steps"]
    assert [step["status"] for step in index["steps"]] == ["finished"] * 2
    assert len((tmp_path / results.RECORDS).read_text().splitlines()) == 1
    assert {test["outcome"] for test in index["steps"][0]["tests"]} <= {"skipped", "passed"}
    assert "2 finished" in capsys.readouterr().out


def test_room_and_name_are_those_of_the_visible_device(monkeypatch):
    free = {"0": 1.0, "3": 99.0, "GPU-7f": 7.0}
    driver = {"nvmlInit": lambda: None, "nvmlDeviceGetName": "card {}".format}
    driver |= {"nvmlDeviceGetHandleByIndex": str, "nvmlDeviceGetHandleByUUID": str}
    driver |= {"nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(free=free[handle])}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**driver))
    for visible, handle in (("", "0"), ("3,0", "3"), ("GPU-7f", "GPU-7f")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert (full_size.free_bytes("cuda"), full_size.gpu_name()) == (free[handle], f"card {handle}")


def test_the_advice_without_a_gpu_is_a_command_that_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError) as refused:
        full_size.gpu_name()
    words = str(refused.value).rpartition("rehearse without one: ")[2].split()
    monkeypatch.setattr(rehearsal, "tiny_models", lambda: contextlib.nullcontext(({}, {})))
    monkeypatch.setattr(full_size, "session", lambda chosen, *_: 0 if chosen.command == "rehearse" else 1)
    assert full_size.main([str(tmp_path) if word == "OUT" else word for word in words]) == 0


@pytest.mark.parametrize("wrong", [("--model", "qwen3-vl"), ("--optimization", "structured-pruning")])
def test_a_name_that_selects_nothing_is_refused(wrong, tmp_path, capsys):
    assert full_size.main(["--out", str(tmp_path / "out"), *wrong, "rehearse"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Did you mean" in error and not (tmp_path / "out").exists()


def test_a_rehearsal_outside_the_environment_gives_one_line(tmp_path):
    lines = ["import sys", "sys.modules['yaml'] = None", "from tests.device import full_size"]
    lines.append(f"sys.exit(full_size.main(['--out', {str(tmp_path)!r}, 'rehearse']))")
    command = [sys.executable, "-c", "\n".join(lines)]
    ended = subprocess.run(command, cwd=full_size.ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and ".venv/bin/activate" in ended.stderr


def test_the_guide_says_where_its_commands_run():
    page = (full_size.ROOT / ".github" / "GPU-AND-CLUSTER.md").read_text(encoding="utf-8")
    assert page.index("source .venv/bin/activate") < page.index("python -m tests.device.full_size")
