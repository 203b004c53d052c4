"""Unit tests of the suite: keys, imports, cores, samples, kernels, the progress table."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import workbench

from lib.errors import UserError
from lib.models import parameters
from lib.suite.plan import cache_key, dependencies
from lib.suite.plan.template import Template
from lib.suite.run import cpu_affinity, kernel_process, progress, sampling, schedule
from lib.suite.store import result_folder


def test_leftovers_of_editors_and_macos_change_no_key(tmp_path):
    """Previously one of them in the evaluation data made every run be measured again."""
    (tmp_path / "text.xz").write_bytes(b"1")
    before = cache_key.Hashes().of_folder(tmp_path)
    for name in (".DS_Store", "._text.xz", ".README.md.swp", ".ipynb_checkpoints/a.ipynb", "__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert cache_key.Hashes().of_folder(tmp_path) == before and list(before) == ["text.xz"]


def test_imports_are_followed_through_functions_packages_and_relative_names():
    source = "import lib.errors\nfrom lib.suite import bootstrap\n%magic\ndef f():\n    from lib.files import x\n"
    source += "    run('-m', 'lib.suite.run.cpu_affinity')"
    cells = (("markdown", "import lib.suite.plan.plan", ()), ("code", source, ()))
    reached = {
        path.relative_to(workbench.ROOT).as_posix()
        for path in dependencies.reached(Template(workbench.ROOT / "x.ipynb", cells, {}))
    }
    expected = {
        "lib/__init__.py",
        "lib/errors.py",
        "lib/suite/__init__.py",
        "lib/suite/bootstrap.py",
        "lib/suite/run/__init__.py",
        "lib/suite/run/cpu_affinity.py",
    }
    assert reached == expected | {"lib/cpu_limits.py", "lib/memory_limits.py", "lib/files.py"}
    assert list(imported("from . import a\nfrom ..b import c", "lib.suite")) == ["lib.suite.a", "lib.b.c"]


def imported(source, package):
    return dependencies.imported(source, package)


def test_only_statements_and_quoted_names_can_import():
    """Compared with a walk over the whole tree, which takes several times as long, for every file of `lib`."""
    for path in sorted((workbench.ROOT / "lib").rglob("*.py")):
        source, expected = path.read_text(encoding="utf-8"), set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                expected |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, path
                expected |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and dependencies.NAME.fullmatch(node.value)
            ):
                expected.add(node.value)
        assert set(dependencies.imported(source, "lib")) == expected, path
    text = "def f():\n    try:\n        match x:\n            case 1:\n                import lib.a\n    except E:\n"
    text += "        from lib import b\n    else:\n        call(f'lib.c')\n"
    assert set(dependencies.imported(text, "lib")) == {"lib.a", "lib.b", "lib.c"}


def test_finding_modules_by_name_reaches_every_optimization():
    cells = (("code", "import importlib\nimportlib.import_module('lib.optimizations.' + name)", ()),)
    reached = {path.name for path in dependencies.reached(Template(workbench.ROOT / "x.ipynb", cells, {}))}
    assert {path.name for path in (workbench.ROOT / "lib/optimizations").rglob("*.py")} <= reached


def test_hashes_are_cached_by_size_and_time(tmp_path):
    file, store = tmp_path / "weights", tmp_path / "cache" / "hashes.json"
    file.write_bytes(b"one")
    hashes = cache_key.Hashes(store)
    first = hashes.of(file)
    hashes.save()
    assert cache_key.Hashes(store).known[str(file)][2] == first
    file.write_bytes(b"two")
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert cache_key.Hashes(store).of(file) != first


def test_a_huge_file_is_sampled_and_a_changed_end_is_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_key, "WHOLE_BYTES", 2**20)
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * (3 * 2**20))
    before = cache_key._content_hash(file, file.stat().st_size)
    file.write_bytes(b"\0" * (3 * 2**20 - 1) + b"1")
    assert cache_key._content_hash(file, file.stat().st_size) != before


def test_a_changed_tensor_in_a_huge_file_is_detected(tmp_path, monkeypatch):
    for name, value in (("WHOLE_BYTES", 2**10), ("SAMPLE_BYTES", 2**6)):
        monkeypatch.setattr(cache_key, name, value)
    ends = {"a": [0, 40_000], "b": [40_000, 40_100], "c": [40_100, 100_000]}
    header = {name: {"dtype": "U8", "shape": [], "data_offsets": place} for name, place in ends.items()}
    text, hashes = json.dumps(header).encode(), set()
    for byte in (b"\0", b"\1"):
        content = len(text).to_bytes(8, "little") + text + bytes(40_000) + 100 * byte + bytes(59_900)
        (tmp_path / "weights").write_bytes(content)
        hashes.add(cache_key._content_hash(tmp_path / "weights", len(content)))
    assert len(hashes) == 2


def test_the_difference_is_described_in_words():
    before = {"code": {"a": "1", "b": "1"}, "versions": {"torch": "2.12"}, "template": {"0": "1"}}
    after = {"code": {"a": "2", "c": "1"}, "versions": {"torch": "2.13"}, "template": {"0": "2"}}
    difference = cache_key.difference(before, after)
    assert difference == "code: a changed; code: c new; code: b gone; versions: torch changed; template: cells changed"
    assert cache_key.difference(after, after) == ""
    assert cache_key.of(before) != cache_key.of(after) and cache_key.of(after) == cache_key.of(
        json.loads(json.dumps(after))
    )


def test_cores_are_split_evenly_without_overlap(monkeypatch):
    monkeypatch.setattr(cpu_affinity, "available", lambda: [0, 4, 1, 5, 2])
    assert cpu_affinity.share_out(2) == [[0, 4], [1, 5]]
    with pytest.raises(UserError, match="--jobs 6: expected 1 to 5"):
        cpu_affinity.share_out(6)


def test_default_jobs_depend_on_scale_device_and_memory(monkeypatch):
    monkeypatch.setattr(cpu_affinity, "available", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(cpu_affinity, "can_pin", lambda: True)
    total = [64 * 2**30]
    monkeypatch.setattr(cpu_affinity.memory_limits, "memory_bytes", lambda: total[0])
    assert cpu_affinity.default_jobs("proxy", "cuda") == cpu_affinity.default_jobs("full", "cpu") == 1
    assert cpu_affinity.default_jobs("proxy", "cpu") == cpu_affinity.default_jobs("slice", "cpu") == 2
    total[0] = 12 * 2**30
    assert cpu_affinity.default_jobs("proxy", "cpu") == 2 and cpu_affinity.default_jobs("slice", "cpu") == 1
    total[0] = 4 * 2**30
    assert cpu_affinity.default_jobs("slice", "cpu") == 1


@pytest.mark.parametrize(
    ("parameters", "memory", "jobs"), [(135e6, 24, 2), (135e6, 12, 1), (270e6, 24, 1), (4e9, 64, 1), (None, 64, 1)]
)
def test_two_small_checkpoints_run_side_by_side(monkeypatch, parameters, memory, jobs):
    """Memory has to hold both: the copies that a pair of parts needs, and what loads them."""
    monkeypatch.setattr(cpu_affinity, "available", lambda: [0, 1])
    monkeypatch.setattr(cpu_affinity, "can_pin", lambda: True)
    monkeypatch.setattr(cpu_affinity.memory_limits, "memory_bytes", lambda: memory * 2**30)
    assert cpu_affinity.default_jobs("full", "cpu", parameters and int(parameters)) == jobs
    assert cpu_affinity.default_jobs("full", "cuda", 1000) == 1


def _entries(scale):
    models = [model for _ in ("first", "second") for model in parameters.names_at("slice")]
    return [schedule.Entry(SimpleNamespace(scale=scale, model=model), "", {}) for model in models]


def _begun(scale, monkeypatch):
    """Return the models given to each of two shares of the cores, in order, if all runs take equally long."""
    begun = {(0,): [], (1,): []}

    def begin(build, slot, entry):
        begun[slot.cores].append(entry.job.model)
        slot.run = schedule.EntryRun(entry, worker=None)

    monkeypatch.setattr(schedule, "_begin", begin)
    monkeypatch.setattr(schedule, "_step", lambda build, slot, run: SimpleNamespace())
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0)
    build = SimpleNamespace(temporary=Path(), shares=[[0], [1]])
    assert len(schedule.run(build, _entries(scale))) == 8
    return list(begun.values())


def test_the_two_largest_slices_are_never_in_memory_together(monkeypatch):
    glm, dense, coder, pictures = parameters.names_at("slice")
    large, small = _begun("slice", monkeypatch)
    assert large == [coder, coder, glm, glm] and small == [dense, dense, pictures, pictures]
    first, second = _begun("proxy", monkeypatch)
    assert sorted(first + second) == sorted(large + small)
    assert [entry.job.model for entry in schedule.by_size(_entries("proxy"))] == [glm, dense, coder, pictures] * 2


def test_a_long_run_keeps_few_samples_and_its_peak():
    samples = sampling.Samples()
    for at in range(10 * sampling.MOST_SAMPLES):
        samples.add(at, at % 100, 7 if at == 5000 else 1)
    assert len(samples.seconds) < sampling.MOST_SAMPLES and max(samples.memory_bytes) == 7
    assert len(samples.seconds) == len(samples.memory_bytes) == len(samples.cpu_percent)
    assert samples.interval_seconds > sampling.INTERVAL_SECONDS


def test_usage_of_descendants_is_sampled_and_they_are_ended():
    program = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'b = b\"x\" * (60 * 2**20)\\nwhile True: pass'])"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    tree = sampling.Tree(process.pid)
    try:
        workbench.wait_for(lambda: (tree.sample(), max(tree.samples.memory_bytes, default=0) > 50 * 2**20)[1], 30)
        time.sleep(0.6)
        tree.sample()
        assert 5 < tree.samples.cpu_percent[-1] < 130
    finally:
        tree.end()
        process.wait()
    assert not [seen for seen in tree.seen.values() if sampling.is_alive(seen)]


def test_a_foreign_kernel_of_the_same_name_is_not_used(tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    foreign = tmp_path / "home" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")  # as outside a virtual environment
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == "/bin/false"
    monkeypatch.setenv("JUPYTER_PATH", kernel_process.surroundings(tmp_path)["JUPYTER_PATH"])
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        result_folder.open_folder(tmp_path / "file" / "proxy")


def test_remaining_time_is_estimated_from_earlier_runs():
    shown = progress.Progress(["a", "b"], 2, {"a": 10.0, "b": 30.0})
    assert shown.left() == 20
    shown = progress.Progress(["a", "b", "c"], 1, {})
    assert shown.left() is None
    shown.start("a", lambda: "")
    shown.end("a", "ok", 4.0, None)
    assert shown.left() == 8
    assert [progress.duration(value) for value in (3.21, 250, 7500)] == ["3.2 s", "4 min 10 s", "2 h 05 min"]


def test_hashes_on_a_read_only_mount_are_not_cached_and_raise_no_error(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    (tmp_path / "file").write_text("content")
    hashes = cache_key.Hashes(tmp_path / "hashes.json")
    assert hashes.of(tmp_path / "file") and hashes.changed
    for name in ("mkdir", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    hashes.save()
