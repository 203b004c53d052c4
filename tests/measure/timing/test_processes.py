"""Arms are timed in fresh processes with different memory placement; failing processes state why and never hang."""

import itertools
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
import torch

from lib.measure.timing import child, children, interleaved, process_child, processes
from lib.measure.timing.children import Arm
from lib.models.checkpoints import io

MODEL = "qwen3-4b-instruct-2507"

TRANSFORMS = """
import time

def negated(model):
    model.lm_head.weight.data.neg_()
    return model

def broken(model):
    raise ValueError("planted")

def hanging(model):
    time.sleep(60)
"""


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """The folder of a saved model; children can import modules next to it."""
    (tmp_path / "process_transforms.py").write_text(TRANSFORMS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return str(io.save(tiny(MODEL), tmp_path / "model"))


def replicate(baseline: Arm, optimized: Arm, names=("prefill",), **options):
    prompt_BT = torch.randint(8, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    return processes.replicate(baseline, optimized, names, prompt_BT=prompt_BT, new_tokens=2, batch=2, **options)


def test_every_process_times_every_workload_of_three_arms(folder):
    names = ("prefill", "decode", "batch_decode", "generate")
    timed = replicate(Arm(folder=folder), Arm(folder=folder), names, processes=3)
    assert list(timed) == list(names)
    for name, replicates in timed.items():
        assert [(sample.process, sample.workload) for sample in replicates] == [(0, name), (1, name), (2, name)]
        for sample in replicates:
            assert set(sample.wall) == set(sample.cpu) == {"baseline", "optimized", "copy"}
            assert all(len(times) == 2 and min(times) > 0 for times in [*sample.wall.values(), *sample.cpu.values()])
            assert len(sample.disturbed) == len(sample.orders) == 2 and len(sample.set_aside) <= 2
            assert sample.orders[0] == sample.orders[1][::-1], "balanced within each process"
            assert len(set(sample.outputs.values())) == 1, "the same model answers alike"
            assert sample.rounds.pairs("baseline", "copy").baseline_seconds == sample.wall["baseline"]


def test_weights_lie_at_other_addresses_in_every_process(folder):
    replicates = replicate(Arm(folder=folder), Arm(folder=folder), processes=4)["prefill"]
    for arm in ("baseline", "optimized", "copy"):
        assert len({sample.addresses[arm] for sample in replicates}) == 4
    assert all(len(set(sample.addresses.values())) == 3 for sample in replicates), "the copy has memory of its own"
    assert len({tuple(sample.loaded) for sample in replicates}) > 1, "no arm is always loaded first"
    again = replicate(Arm(folder=folder), Arm(folder=folder), processes=1, seed=9)["prefill"]
    assert again[0].addresses["baseline"] not in {sample.addresses["baseline"] for sample in replicates}


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_odd_rounds_are_balanced_across_processes_independently_of_load_order(rounds):
    arms, orders, alike = ["baseline", "optimized", "copy"], [], 0
    for process in range(12):
        chosen = process_child.order_of_rounds({"seed": 0, "process": process})
        orders += (drawn := interleaved.balanced_orders(arms, rounds, **chosen))
        alike += process_child.load_order(arms, process) == drawn[0]
    for first, second in itertools.combinations(arms, 2):
        before = sum(order.index(first) < order.index(second) for order in orders)
        assert before == 12 * rounds / 2
    assert alike < 8 and len({tuple(order) for order in orders}) > 2


def test_the_heap_shift_moves_small_and_large_allocations():
    kept = [child.move_heap(seed) for seed in range(3)]
    sizes = [[len(piece) for piece in pieces] for pieces in kept]
    assert sizes[0] != sizes[1] and [len(piece) for piece in child.move_heap(0)] == sizes[0]


def test_an_arm_with_a_transform_is_timed_as_transformed(folder):
    negated = Arm(folder=folder, transform="process_transforms:negated")
    for sample in replicate(Arm(folder=folder), negated, processes=2)["prefill"]:
        assert sample.outputs["baseline"] == sample.outputs["copy"] != sample.outputs["optimized"]


def test_a_failing_process_gives_its_reason(folder):
    with pytest.raises(processes.ChildFailed, match=r"process 1 of 2: .*ValueError: planted"):
        replicate(Arm(folder=folder), Arm(folder=folder, transform="process_transforms:broken"), processes=2)
    with pytest.raises(processes.ChildFailed, match="expected a checkpoint folder"):
        replicate(Arm(folder=folder), Arm(folder=folder + "/nothing"), processes=1)


def test_a_hanging_process_is_ended(folder):
    hanging = Arm(folder=folder, transform="process_transforms:hanging")
    with pytest.raises(processes.ChildFailed, match="ran past 2 s"):
        replicate(Arm(folder=folder), hanging, processes=1, limit_seconds=2)


def test_a_hanging_server_is_ended_with_its_children(tmp_path, monkeypatch):
    (tmp_path / "hanging_program.py").write_text("import os, time\nos.fork()\ntime.sleep(60)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(children, "STARTING_SECONDS", 1.0)
    answers = children.run("hanging_program", [{"arms": []}, {"arms": []}], limit_seconds=0.1)
    assert ["ran past" in answer["failed"] for answer in answers] == [True, True]


def test_a_program_that_ends_early_loses_its_jobs_and_reports_how(tmp_path, monkeypatch):
    text = 'print(\'{"value": 1}\')\nraise SystemExit("no more")\n'
    (tmp_path / "short_program.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done, lost = children.run("short_program", [{"arms": []}, {"arms": []}])
    assert done == {"value": 1} and "ended with 1: no more" in lost["failed"]


def test_one_server_serves_until_threads_change_or_it_dies(tmp_path, monkeypatch):
    text = "import os\ndef run(job):\n"
    text += "    return {'server': os.getppid(), 'process': os.getpid(), 'planted': os.environ.get('PLANTED')}\n"
    (tmp_path / "telling_program.py").write_text(text, encoding="utf-8")
    (tmp_path / "other_program.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, second = children.run("telling_program", [{"arms": []}, {"arms": []}])
    (again,) = children.run("other_program", [{"arms": []}])
    assert first["server"] == second["server"] == again["server"]
    assert len({answer["process"] for answer in (first, second, again)}) == 3
    monkeypatch.setenv("PLANTED", "a variable of now")
    (later,) = children.run("telling_program", [{"arms": []}])
    assert later["server"] == again["server"] and later["planted"] == "a variable of now" and not first["planted"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(children, "_threads", lambda: threads + 1)
    (elsewhere,) = children.run("telling_program", [{"arms": []}])
    assert elsewhere["server"] != again["server"] and not psutil.pid_exists(again["server"])
    psutil.Process(elsewhere["server"]).kill()
    next(iter(children._SERVERS.values())).process.wait(10)
    (after,) = children.run("telling_program", [{"arms": []}])
    assert "failed" not in after and after["server"] != elsewhere["server"]
    children.end_all()
    assert not psutil.pid_exists(after["server"])


def test_an_interrupted_call_leaves_no_answers_for_the_next(tmp_path, monkeypatch):
    text = "def run(job):\n    return {'echo': job['value']}\n"
    (tmp_path / "echoing_program.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (first,) = children.run("echoing_program", [{"arms": [], "value": 1}])
    lines = next(iter(children._SERVERS.values())).lines

    def interrupted(timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(lines, "get", interrupted)
        children.run("echoing_program", [{"arms": [], "value": number} for number in (2, 3)])
    (again,) = children.run("echoing_program", [{"arms": [], "value": 4}])
    assert (first["echo"], again["echo"]) == (1, 4)


def test_servers_end_with_the_process_that_started_them(tmp_path):
    text = "from lib.measure.timing import children\nimport os, signal\n"
    text += "print(children._server().process.pid, flush=True)\n"
    text += "os.kill(os.getpid(), signal.SIGKILL)\n"
    out = subprocess.run([sys.executable, "-c", text], cwd=children.ROOT, capture_output=True, text=True).stdout
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(out)).wait(timeout=60)  # it notices the end of its input once its libraries are imported


def test_differing_conditions_are_refused(folder):
    with pytest.raises(processes.ChildFailed, match="not comparable"):
        replicate(Arm(folder=folder), Arm(folder=folder, dtype="bfloat16"), processes=1)
    assert replicate(Arm(folder=folder), Arm(folder=folder, dtype="bfloat16"), processes=1, except_for=("dtype",))
