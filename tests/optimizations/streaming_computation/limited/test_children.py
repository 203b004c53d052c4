"""Processes that decode: their answers, exits and limits; copies outside the page cache."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.errors import UserError
from lib.measure.timing import disturbance
from lib.optimizations.streaming_computation.limited import children, process_memory, serving
from lib.optimizations.streaming_computation.limited.children import Child

# A stand-in for a model: it decodes by counting, and misbehaves on request.
PROGRAM = """
import sys
from lib.optimizations.streaming_computation.limited.serving import Decoded, serve

def opened(request):
    if request["fault"] == "no such model":
        raise ValueError("no such model:\\nlines")
    print("what a library prints")
    count = 0
    def decode():
        nonlocal count
        count += 1
        if request["fault"] == "dies" and count == 2:
            print("out of luck", file=sys.stderr)
            sys.exit(3)
        return Decoded([count], 0.5)
    return decode, 7

serve(opened)
"""


def start(fault: str = ""):
    return children.started([sys.executable, "-c", PROGRAM], {"fault": fault})


def test_a_process_answers_each_call_and_prints_elsewhere():
    with start() as child:
        assert child.private_bytes == 7
        child()
        child()
        assert [(answer["tokens"], answer["seconds"]) for answer in child.answers] == [([1], 0.5), ([2], 0.5)]
        held = child.answers[-1]["memory"]
        assert not held or held["peak"] >= held["file"] + held["anonymous"] > 0
        assert set(child.ask("reset")) == {"reset"}
        assert child.cpu_seconds() > 0
        process = child.process
    assert process.poll() is not None, "it ends with its block"


def test_a_failure_is_one_line_and_an_exit_reports_the_last_output():
    message = r"^the decoding process failed: ValueError: no such model: lines$"
    with pytest.raises(UserError, match=message), start("no such model"):
        pass
    with start("dies") as child:
        child()
        with pytest.raises(UserError, match=r"ended with 3 \(out of luck\)"):
            child()


def test_a_process_that_takes_too_long_is_terminated(monkeypatch):
    monkeypatch.setattr(children, "LONGEST_SECONDS", 0.2)
    sleeping = children.started([sys.executable, "-c", "import time; time.sleep(60)"], {})
    with pytest.raises(UserError, match=r"gave no answer within 0\.2 s"), sleeping:
        pass


def test_a_limit_counts_weights_once_wherever_they_are():
    limits = []
    group = SimpleNamespace(private_bytes=lambda: 500, limit=limits.append)
    child = Child(None, None, group, private_bytes=80)
    assert child.limit(100) == 500 - 80 + 100 + children.SLACK == limits[0]
    with pytest.raises(UserError, match="are in private memory, more than the allowance"):
        child.limit(79)


def test_the_processes_own_work_is_not_a_disturbance(monkeypatch):
    """Planted counts: they take 0.9 of a second on one core, which would be too much for another process."""
    moments = iter(
        [disturbance.Reading(0.0, 0.0, 0.0, 0.0, 0.0, 0), disturbance.Reading(1.0, 0.0, 0.9, 0.0, 0.0, 0)] * 2
    )
    monkeypatch.setattr(disturbance, "reading", lambda: next(moments))
    monkeypatch.setattr(disturbance, "cores", lambda: [0])
    seconds = iter([0.0, 0.9])
    child = SimpleNamespace(cpu_seconds=lambda: next(seconds))
    assert children.watch([child])() is None
    assert "other processes took 90 %" in children.watch([])()


def test_a_copy_is_complete_and_an_impossible_one_is_reported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"12")
    copied = children.copy(tmp_path / "model", tmp_path / "arm" / "model")
    assert (copied / "weights").read_bytes() == b"12"
    assert children.copy(copied / "weights", tmp_path / "other" / "file").read_bytes() == b"12"
    with pytest.raises(UserError, match=r"nothing: cannot be copied to .*No such file"):
        children.copy(tmp_path / "nothing", tmp_path / "third" / "nothing")


def test_a_file_tree_in_memory_is_not_a_disk(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to("/fast")
    assert children.in_memory("/dev/shm") in (True, False)
    monkeypatch.setattr(children.Path, "read_text", lambda *_, **__: "a / ext4 rw\nb /fast tmpfs rw\n")
    assert children.in_memory("/fast/place") and not children.in_memory("/tmp/place")
    assert children.in_memory(str(tmp_path / "link" / "place")), "a link into memory is memory"


@pytest.mark.parametrize(
    ("held", "calls"), [([5, 5], 2), ([5, 9, 9], 3), ([9, 5], 2), (list(range(5, 50, 5)), serving.SETTLING)]
)
def test_a_process_has_settled_once_its_memory_stops_growing(monkeypatch, held, calls):
    amounts, called = iter(held), []
    monkeypatch.setattr(process_memory, "usage", lambda: {"anonymous": next(amounts) * serving.STEADY})
    serving.settle(lambda: called.append(1))
    assert len(called) == calls


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts what a process holds")
def test_freed_memory_is_kept():
    """In a separate process: 20 freed blocks of 4 MiB are still held; by default they are returned."""
    blocks = "blocks = [b'1' * 2**22 for _ in range(20)]; del blocks; print(process_memory.usage()['anonymous'])"
    held = []
    for keep in ("process_memory.keep_freed_memory()", "pass"):
        program = f"from lib.optimizations.streaming_computation.limited import process_memory; {keep}; {blocks}"
        held.append(int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout))
    if held[0] == held[1]:
        pytest.skip("another allocator than glibc's")
    assert held[0] - held[1] > 60 * 2**20
