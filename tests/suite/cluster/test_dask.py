"""Jobs on a real Dask cluster: what arrives, what is refused, and what remains when workers or the scheduler die.

The workers run in a separate copy of the project, so everything has to go over the wire.
"""

import shutil
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import workbench
from clusters import QUICK, cluster

from lib.errors import ClusterLost, UserError
from lib.files import hash_of
from lib.suite.cluster import dask as clusters
from lib.suite.cluster import remote, workers
from lib.suite.run import cpu_affinity

# Leaves a mark naming its worker, then waits for as long as told by a file that both sides see.
WAITS = """import os, time
from pathlib import Path

marks = Path(MARKS)
with (marks / NAME).open("a") as file:
    file.write(f"{os.getpid()}\\n")
while (marks / ("hold-" + NAME)).exists():
    time.sleep(0.05)"""
# A run's output for other runs, and its reader, among the results: both as in the templates.
LEAVES = """from lib.files import results_folder, write_atomically

write_atomically(results_folder(scale) / "stacks" / f"{model}.yaml", "stack: []")"""
READS = """from lib.files import hash_of, results_folder

place = f"stacks/{model}.yaml"
hashes = {place: hash_of(results_folder(scale) / place)}
inputs = {"inputs": {"provenance": "derived", "source": "SHA-256", "value": hashes}}"""
KILLS = """import psutil

for process in psutil.Process().parents():
    if "dask" in " ".join(process.cmdline()) and "worker" in process.cmdline():
        process.kill()"""


@pytest.fixture
def sides(tmp_path):
    """Return the build's project, the workers' copy of it made by `copy()`, and the folder of marks."""
    marks = tmp_path / "marks"
    marks.mkdir()
    root = workbench.project(tmp_path / "here" / "project")
    workbench.notebook(
        root / "notebooks" / "well.ipynb", [("W", _waits(marks)), ("Sums", "x = ratio"), ("R", workbench.RECORD)]
    )
    there = tmp_path / "there" / "bench"

    def copy():
        shutil.copytree(root, there, ignore=shutil.ignore_patterns("executed"))  # with its compiled files
        return there

    return root, copy, marks


def _waits(marks):
    return WAITS.replace("MARKS", repr(str(marks)))


def _run(root, address, *arguments):
    return workbench.build(root, *arguments, "--cluster", address, **QUICK)


def _pids(marks, name):
    """Return the kernels that have run `name` so far, in order."""
    path = marks / name
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def _files(root):
    return {path.relative_to(root / "executed/proxy").as_posix() for path in (root / "executed/proxy").rglob("*")}


def test_results_arrive_whole_and_workers_with_different_files_are_refused(sides, tmp_path):
    root, copy, _ = sides
    raises = "1 / 0"
    workbench.notebook(root / "notebooks" / "raises.ipynb", [("Sums", raises), ("Record", workbench.RECORD)])
    there = copy()
    with cluster(tmp_path / "dask", there) as running:
        ended = _run(root, running.address)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "2 of 4 finished, 2 failed" in ended.stdout
        assert "(notebook: executed/proxy/failed/raises--" in ended.stdout
        records = [workbench.record(root, f"well--{model}") for model in workbench.MODELS]
        assert all(record["process"]["jobs_side_by_side"] == 2 for record in records)
        share = len(cpu_affinity.available()) // 2  # of the available cores, which may be fewer than exist
        assert all(len(record["process"]["pinned_to"]) == share for record in records)
        assert workbench.record(root, "raises--beta-2")["reason"].endswith("ZeroDivisionError: division by zero")
        left = _files(root)
        assert {f"well--beta-2{ending}" for ending in (".ipynb", ".html", ".md", ".json")} <= left
        assert {"failed/raises--beta-2.ipynb", "raises--beta-2.html", "logs/raises--beta-2.log"} <= left
        assert not [name for name in left if ".part" in name or ".running" in name]
        assert not list((there / "executed").glob("**/*--*")) and not list(running.folder.glob("w*/**/workbench-*"))
        assert _list(root, "well") == {"not_applicable"}  # finished by its key, with pages newer than its record

        other = there.with_name("other")
        shutil.copytree(there, other)
        (there / "lib/errors.py").write_text("# changed\n" + (there / "lib/errors.py").read_text())
        (other / "parameters/proxies/beta-2/config.json").write_text('{"model_type": "qwen3" }')
        running.worker("other", root=other)
        running.meet(3)
        ended = _run(root, running.address, "run", "well", "--force")
        assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1
        assert "code: lib/errors.py differs" in ended.stderr and "weights: config.json differs" in ended.stderr


def _list(root, name):
    lines = workbench.build(root, "list").stdout.splitlines()
    return {line.split()[0] for line in lines if f"  {name}--" in line}


def test_a_stack_chosen_by_a_run_reaches_the_runs_that_read_it(sides, tmp_path):
    root, copy, _ = sides
    reading = workbench.RECORD.replace('reason="tiny")', 'reason="tiny", details=inputs)')
    workbench.notebook(root / "notebooks" / "a_writes.ipynb", [("Leave", LEAVES), ("Record", workbench.RECORD)])
    workbench.notebook(root / "notebooks" / "b_reads.ipynb", [("Read", READS), ("Record", reading)])
    there = copy()
    with cluster(tmp_path / "dask", there, workers=1) as running:
        ended = _run(root, running.address, "run", "a_writes", "b_reads", "--model", "alpha-1.5")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    stack = root / "executed/proxy/stacks/alpha-1.5.yaml"
    recorded = workbench.record(root, "b_reads--alpha-1.5")["details"]["inputs"]["value"]
    assert recorded == {"stacks/alpha-1.5.yaml": hash_of(stack)} and stack.read_text() == "stack: []"
    assert not (there / "executed/proxy/stacks").exists()
    # Finished on the requested model: it read the file that is here. The other model was never run.
    assert _list(root, "b_reads") == {"not_applicable", "missing"}


def test_a_killed_workers_job_runs_again_elsewhere(sides, tmp_path):
    root, copy, marks = sides
    hold = marks / "hold-well"
    hold.touch()
    with cluster(tmp_path / "dask", copy()) as running:
        started = workbench.begin(root, "run", "--model", "alpha-1.5", "--cluster", running.address, **QUICK)
        try:
            [first] = workbench.wait_for(lambda: _pids(marks, "well"))
            worker = next(p for p in psutil.Process(first).parents() if p.pid in [q.pid for q in running.processes])
            worker.kill()
            workbench.wait_for(lambda: len(_pids(marks, "well")) == 2)
            workbench.wait_for(lambda: not psutil.pid_exists(first), 20)  # the kernel does not outlive its worker
            assert not list((root / "executed/proxy").glob("well--*"))
            hold.unlink()
            output, _ = started.communicate(timeout=180)
        finally:
            started.kill()
    assert started.returncode == 0, output
    assert "its worker was lost" in output and "it runs again elsewhere" in output
    assert workbench.record(root, "well--alpha-1.5")["status"] == "not_applicable"


def test_a_job_that_kills_all_workers_is_abandoned_and_a_lost_cluster_is_reported(sides, tmp_path):
    root, copy, _ = sides
    workbench.notebook(root / "notebooks" / "kills.ipynb", [("Kill", KILLS), ("Record", workbench.RECORD)])
    workbench.notebook(root / "notebooks" / "later.ipynb", [("Record", workbench.RECORD)])
    with cluster(tmp_path / "dask", copy()) as running:
        ended = _run(root, running.address, "run", "kills", "later", "--model", "alpha-1.5")
        assert ended.returncode == 1, ended.stdout + ended.stderr
        record = workbench.record(root, "kills--alpha-1.5")
        assert record["status"] == "failed" and record["reason"].startswith("given up: it lost 2 workers (tcp://")
        assert "given up: it lost 2 workers" in ended.stdout and "Traceback" not in ended.stderr
        assert (root / "executed/proxy/kills--alpha-1.5.html").is_file()
        ended = _run(root, running.address, "run", "well")
        assert ended.returncode == 2 and 'none of its 0 workers has a "device" token' in ended.stderr


def test_finished_runs_survive_the_death_of_the_scheduler(sides, tmp_path):
    root, copy, marks = sides
    workbench.notebook(root / "notebooks" / "a.ipynb", [("Record", workbench.RECORD)])
    (marks / "hold-well").touch()
    there = copy()
    arguments = ("run", "a", "well", "--model", "alpha-1.5")
    with cluster(tmp_path / "dask", there, workers=1) as running:
        started = workbench.begin(root, *arguments, "--cluster", running.address, **QUICK)
        try:
            [kernel] = workbench.wait_for(lambda: _pids(marks, "well"))
            before = workbench.record(root, "a--alpha-1.5")["started"]
            running.scheduler.kill()
            output, _ = started.communicate(timeout=180)
        finally:
            started.kill()
        workbench.wait_for(lambda: not psutil.pid_exists(kernel), 20)
    assert started.returncode == 1 and "Traceback" not in output, output
    assert f"build.py: the scheduler at {running.address} is gone; finished runs are kept" in output
    assert not list((root / "executed/proxy").glob("well--*")) and not (root / "executed/proxy/.running").exists()
    (marks / "hold-well").unlink()
    ended = workbench.build(root, *arguments)
    assert ended.returncode == 0 and "1 of 2 runs are already finished and kept" in ended.stdout
    assert workbench.record(root, "a--alpha-1.5")["started"] == before


def test_a_killed_build_leaves_nothing_running_on_the_workers(sides, tmp_path):
    root, copy, marks = sides
    (marks / "hold-well").touch()
    with cluster(tmp_path / "dask", copy(), workers=0) as running:
        running.worker("untold", resources="")
        running.meet(1)
        ended = _run(root, running.address)
        assert ended.returncode == 2 and 'none of its 1 workers has a "device" token' in ended.stderr
        running.worker("w0")
        running.meet(2)
        started = workbench.begin(root, "run", "--model", "beta-2", "--cluster", running.address, **QUICK)
        [kernel] = workbench.wait_for(lambda: _pids(marks, "well"))
        workbench.kill(started, signal.SIGKILL)
        workbench.wait_for(lambda: not psutil.pid_exists(kernel), 20)
        workbench.wait_for(lambda: not list(running.folder.glob("w0/**/workbench-*")), 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "somewhere"), "expected the address of a Dask scheduler, such as tcp://HOST:8786"),
        (("--cluster", "tcp://127.0.0.1"), "expected the address of a Dask scheduler"),
        (("--cluster", "http://127.0.0.1:8786"), "expected the address of a Dask scheduler"),
        (("--cluster", "tcp://127.0.0.1:9"), "--cluster tcp://127.0.0.1:9: no Dask scheduler answers there"),
        (("--cluster", "tcp://127.0.0.1:9", "--jobs", "2"), "--jobs is for this machine"),
    ],
)
def test_a_wrong_address_gets_one_line(project, arguments, message):
    ended = workbench.build(project, "run", *arguments, **QUICK)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and not list((project / "executed").glob("**/*--*"))


def test_an_address_may_be_ipv6_or_encrypted():
    for address in ("tcp://[::1]:8786", "tls://head:8786"):
        clusters.check_address(address)
    with pytest.raises(UserError, match="tcp://HOST:8786"):
        clusters.check_address("tcp://head:port")


def test_workers_on_one_machine_get_separate_cores():
    met = workers.Crew(None, (), {}.__getitem__, {}, {})
    claim = {"host": "a", "cores": [0, 1, 2, 3]}
    assert met._cores([claim, claim]) == [[0, 1], [2, 3]]
    assert met._cores([claim, {"host": "b", "cores": [0, 1]}]) == [[0, 1, 2, 3], [0, 1]]
    assert met._cores([{"host": "a", "cores": [0]}, {"host": "a", "cores": [1]}]) == [[0], [1]]
    assert met._cores([{"host": "a", "cores": [0]}] * 2) == [[0], []]
    met.slots.append(workers.WorkerSlot("tcp://x:1", "x", "a", (0, 1)))
    assert met._cores([claim]) == [[2, 3]]


def test_a_scheduler_lost_while_meeting_its_workers_is_reported_as_lost():
    """The lost connection is an OSError, which a build would mistake for an unwritable disk."""

    def closed(*_, **__):
        raise OSError("in <TCP (closed)>: Stream is closed")

    about = {"resources": {"device": 1}, "nthreads": 1, "local_directory": "w"}
    client = SimpleNamespace(status="running", scheduler=SimpleNamespace(identity=None), get_versions=closed)
    client.sync = lambda *_, **__: {"workers": {"tcp://x:1": about}}
    loop = clusters.Loop(None, "tcp://x:8786", client, workers.Crew(client, (), {}.__getitem__, {}, {}), [])
    with pytest.raises(ClusterLost, match="the scheduler at tcp://x:8786 is gone"):
        loop.gather()


def _answered(gpu):
    """Return the answered future of a worker on one machine whose runs use this GPU."""
    answer = {"host": "a", "machine": "node", "cores": [0, 1, 2, 3], "parts": None, "gpu": gpu}
    return SimpleNamespace(status="finished", done=lambda: True, result=lambda timeout: answer)


def test_no_two_runs_share_a_gpu():
    met = workers.Crew(None, (), {}.__getitem__, {}, {})
    first, second, third, late = [(f"tcp://x:{port}", "folder") for port in range(1, 5)]
    met.tokens = {first: 1, second: 1, third: 2, late: 1}
    met.pending = {first: _answered("GPU-a"), second: _answered("GPU-a"), third: _answered("GPU-b")}
    lines = met.welcome()
    assert [line.split(";")[0] for line in lines] == [
        "tcp://x:2: GPU-a of node belongs to another device token",
        "tcp://x:3: GPU-b of node belongs to another device token",  # its second token
    ]
    assert [(slot.address, slot.cores) for slot in met.slots] == [("tcp://x:1", (0, 1)), ("tcp://x:3", (2, 3))]
    met.pending = {late: _answered("GPU-b")}
    assert len(met.welcome()) == 1 and len(met.slots) == 2
    on_processors = workers.Crew(None, (), {}.__getitem__, {}, {}, tokens={first: 2})
    on_processors.pending = {first: _answered(None)}
    assert on_processors.welcome() == [] and len(on_processors.slots) == 2


def test_a_workers_gpu_is_named_by_a_unique_identifier(monkeypatch):
    class NVMLError(Exception):
        """Mimics the exception of the driver's library."""

    def handle(index):
        if index > 1:
            raise NVMLError("Invalid Argument")
        return f"GPU-{index}"

    driver = {"NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": handle}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**driver, nvmlDeviceGetUUID=str))
    for visible, expected in (("", "GPU-0"), ("1,0", "GPU-1"), ("GPU-8932,GPU-1", "GPU-8932"), ("MIG-1", "MIG-1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert remote._gpu() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES starts with 7: no such NVIDIA device here"):
        remote._gpu()


def test_differences_are_named():
    mine = {"versions": {"torch": "2.13.0"}, "code": {"a": "1", "b": "1"}, "template": {"0": "1"}}
    theirs = {"versions": {"torch": "2.12.0"}, "code": {"a": "2"}, "template": {"0": "2"}}
    differences = workers.differing(mine, theirs)
    assert differences == "torch is 2.13.0 here, 2.12.0 there; code: a, b differ; the template differs"


def test_a_build_begins_when_the_first_busy_worker_is_free(monkeypatch):
    """Previously it waited for the last one, which other work may keep for hours."""
    monkeypatch.setattr(clusters, "patience", lambda: 0.05)
    monkeypatch.setattr(clusters, "POLL_SECONDS", 0.01)
    began = time.monotonic()
    free = _answered(None)
    free.done = lambda: time.monotonic() - began > 0.3
    first, second = ("tcp://x:1", "a"), ("tcp://x:2", "b")
    crew = workers.Crew(None, (), {}.__getitem__, {}, {}, tokens={first: 1, second: 1})
    crew.pending = {first: free, second: SimpleNamespace(done=lambda: False)}

    def look(_):
        assert time.monotonic() - began < 20, "it waits for the other one too"
        return []

    crew.look = look
    about = {"resources": {"device": 1}, "nthreads": 1, "local_directory": "w"}
    client = SimpleNamespace(status="running", scheduler=SimpleNamespace(identity=None))
    client.sync = lambda *_, **__: {"workers": {"tcp://x:1": about, "tcp://x:2": about}}
    lines: list[str] = []
    build = SimpleNamespace(progress=SimpleNamespace(line=lines.append, side_by_side=1))
    clusters.Loop(build, "tcp://x:8786", client, crew, []).gather()
    assert [slot.address for slot in crew.slots] == ["tcp://x:1"] and list(crew.pending) == [second]
    assert len(lines) == 1 and "waiting for one of them" in lines[0]
