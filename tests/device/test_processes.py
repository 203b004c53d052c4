"""Processes are started once for each model, ended when they take too long, and give way to others' memory; a session
rehearsed whole on the processor leaves records, an index and a page.
"""

import json
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.device import cuda_tests, full_size, processes, results, schedule
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
        if how == "fails":
            print(json.dumps({"event": "failed", "reason": "RuntimeError: out of memory"}), flush=True)
            continue
        record = {"status": "ok", "reason": None, "optimization": request["optimization"]}
        print(json.dumps({"event": "record", "record": record}), flush=True)
"""


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """Return a function that makes an executor whose workers are the small program above; all are ended afterwards."""
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


def test_what_takes_too_long_is_ended_with_its_cell_and_started_anew(executor):
    session = executor()
    start = time.monotonic()
    ended = session.execute(_step(how="late"), 0.7)
    assert (ended.status, ended.reason) == ("stopped", "took longer than its limit, in cell 3")
    assert time.monotonic() - start < 60 and session.loads(_step())
    assert session.execute(_step(), 20.0).status == "finished"


def test_limits_are_those_of_the_clock_that_gave_them(executor):
    session = executor(slower=1e4)
    assert session.execute(_step(), 2e-3).status == "finished"  # twenty seconds of this machine
    assert executor().execute(_step(), 1e-3).status == "stopped"  # a process takes longer to start


def test_a_lost_process_and_a_failed_notebook_are_told_apart(executor):
    session = executor()
    assert session.execute(_step(how="dies"), 20.0).reason == "its process was lost"
    ended = session.execute(_step(how="fails"), 20.0)
    assert (ended.status, ended.reason) == ("failed", "cell 3: RuntimeError: out of memory")
    assert not session.loads(_step()), "a process that has told of a failure goes on"


def test_others_give_way_to_a_model_that_has_no_room(executor):
    session = executor(free=lambda: 10.0 if session.workers else 100.0)
    session.execute(_step("a"), 20.0)
    assert session.hindrance(_step("b", needs_bytes=50.0)) is None
    assert not session.workers
    assert "GiB are free" in session.hindrance(_step("c", needs_bytes=500.0))


def test_weights_that_are_held_already_are_not_asked_for_twice(executor):
    session = executor(free=lambda: 30.0)
    session.execute(_step("a"), 20.0)
    assert session.hindrance(_step("a", needs_bytes=50.0, weights_bytes=25.0)) is None
    assert session.workers


def test_a_checkpoint_that_has_no_room_on_the_disk_is_not_written(executor):
    reason = executor().hindrance(_step("a", needs_bytes=1.0, disk_bytes=1e18))
    assert "of the temporary disk" in reason


def test_no_more_models_are_kept_than_asked(executor):
    session = executor(kept=1)
    for model in "ab":
        session.execute(_step(model), 20.0)
    assert [model for model, _ in session.workers] == ["b"]


def test_a_process_ends_with_its_parent():
    program = "from tests.device.processes import end_with_parent; end_with_parent(); import time; time.sleep(600)"
    starter = f"""
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", {program!r}], start_new_session=True, stdout=-3).pid, flush=True)
time.sleep(2)
"""
    ended = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True)
    process = int(ended.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process outlived its parent"
        time.sleep(0.1)


def test_one_case_of_every_function_comes_first_those_that_never_ran_at_the_head():
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


def test_every_parameter_of_a_session_is_one_that_its_notebook_takes():
    from lib.suite.plan import plan

    for name, parameters in schedule.OPTIMIZATIONS.items():
        about = {"scale": "full", "random_weights": True, "device": "cuda", "parameters": parameters}
        for job in plan.plan(plan.Request((name,), tuple(schedule.MODELS[0]), **about), to_run=False):
            assert all(job.parameters[key] == value for key, value in parameters.items())


def test_one_optimization_is_rehearsed_whole(tmp_path, capsys):
    chosen = ["--out", str(tmp_path), "--optimization", "structured_pruning"]
    code = full_size.main([*chosen, "--model", "glm-4.7-flash", "rehearse"])
    index = json.loads((tmp_path / results.INDEX).read_text())
    assert code == 0, index["steps"]
    assert [step["status"] for step in index["steps"]] == ["finished"] * 2
    assert len((tmp_path / results.RECORDS).read_text().splitlines()) == 1
    assert {test["outcome"] for test in index["steps"][0]["tests"]} <= {"skipped", "passed"}
    assert "2 finished" in capsys.readouterr().out
