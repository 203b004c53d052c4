"""A full disk gives one line and loses no finished run (needs a small file system of its own, so root).

Also tests a run that read what an earlier one wrote.
"""

import json
import os
import subprocess

import pytest
import workbench

from lib.files import hash_of
from lib.suite.plan import cache_key
from lib.suite.store import result_folder

FILL = """import os

with open(os.path.join(os.environ["FILL"], "filler"), "wb", buffering=0) as file:
    try:
        while file.write(b"0" * 4096):
            pass
    except OSError:
        pass"""


@pytest.fixture
def disk(tmp_path):
    """Return a folder on a file system of 600 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.name == "posix" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_from_the_start(project, disk):
    (disk / "filler").write_bytes(b"0" * 580_000)
    ended = workbench.build(project, "--out", str(disk))
    assert ended.returncode == 2 and "cannot be written to (No space left on device)" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_full_in_the_middle(project, disk):
    workbench.notebook(project / "notebooks" / "z_fills.ipynb", [("Fill", FILL), ("Record", workbench.RECORD)])
    arguments = ("--model", "alpha-1.5", "--jobs", "1", "--out", str(disk))
    ended = workbench.build(project, "run", *arguments, FILL=str(disk))
    output = ended.stdout + ended.stderr
    assert ended.returncode == 1 and "No space left on device" in output and "Traceback" not in output, output
    assert workbench.record(project, "well--alpha-1.5", disk / "proxy")["status"] == "not_applicable"
    (disk / "filler").unlink()
    ended = workbench.build(project, "run", "well", *arguments)
    assert ended.returncode == 0 and "nothing had to be run" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["stacks/m.yaml", "executed/proxy/stacks/m.yaml"])
@pytest.mark.parametrize(
    ("recorded", "now", "says"),
    [
        ("{hash}", "chosen: a", ""),
        ("{hash}", "chosen: b", "changed"),
        ("{hash}", None, "gone"),
        ("", "chosen: a", "new"),
    ],
)
def test_a_run_is_stale_if_it_read_another_version_of_a_runs_file(tmp_path, monkeypatch, recorded, now, says, name):
    """The stack stored by a search is read after the key is made, so the record holds its hash.

    The hash is stored by path among the results, in earlier versions by path in the project.
    """
    monkeypatch.setattr(result_folder, "ROOT", tmp_path)
    folder = result_folder.Folder(tmp_path / "executed" / "proxy")
    file = folder.path / "stacks" / "m.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("chosen: a")
    inputs = {name: recorded.format(hash=hash_of(file))}
    file.unlink()
    if now:
        file.write_text(now)
    parts = {"code": {"lib/a.py": "1"}}
    record = {"status": "ok", "key": cache_key.of(parts), "details": {"inputs": {"value": inputs}}}
    for ending in (".ipynb", ".json", ".html", ".md"):
        folder.of("a--m", ending).write_text(json.dumps(record))
    state = result_folder.state(folder, "a--m", parts)
    assert (state.kind, state.why) == (("stale", f"{name}: {says}") if says else ("finished", ""))


LEAVE = """from lib.files import results_folder, write_atomically

write_atomically(results_folder(scale) / "stacks" / f"{model}.yaml", "left")"""


def test_a_runs_output_for_other_runs_is_stored_among_its_results(project):
    workbench.notebook(project / "notebooks" / "leaves.ipynb", [("Leave", LEAVE), ("Record", workbench.RECORD)])
    for arguments, place in ((("--out", "elsewhere"), "elsewhere"), ((), "executed")):
        ended = workbench.build(project, "run", "leaves", "--model", "alpha-1.5", *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert (project / place / "proxy" / "stacks" / "alpha-1.5.yaml").is_file()
        assert place == "executed" or not (project / "executed").exists()


READ = """from lib.files import hash_of, results_folder

place = f"stacks/{model}.yaml"
hashes = {place: hash_of(results_folder(scale) / place)}
inputs = {"inputs": {"provenance": "derived", "source": "SHA-256", "value": hashes}}"""


def test_runs_that_read_a_file_rewritten_by_this_build_run_again_in_it(project):
    folder, arguments = project / "notebooks", ("run", "--model", "alpha-1.5", "--jobs", "1")
    (project / "disk").mkdir()
    (project / "executed").mkdir()
    (project / "executed" / "proxy").symlink_to(project / "disk")  # previously the shared files lay outside it
    reading = workbench.RECORD.replace('reason="tiny")', 'reason="tiny", details=inputs)')
    workbench.notebook(folder / "b_reads.ipynb", [("Read", READ), ("Record", reading)])
    for text in ("left", "left anew"):
        write = LEAVE.replace('"left"', f'"{text}"')
        workbench.notebook(folder / "a_writes.ipynb", [("Leave", write), ("Record", workbench.RECORD)])
        ended = workbench.build(project, *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "b_reads--alpha-1.5: stacks/alpha-1.5.yaml: changed during this build; it is run again" in ended.stdout
    assert "2 of 3 runs are already finished" in ended.stdout and "2 run (" in ended.stdout
    recorded = workbench.record(project, "b_reads--alpha-1.5")["details"]["inputs"]["value"]
    assert recorded == {"stacks/alpha-1.5.yaml": hash_of(project / "executed/proxy/stacks/alpha-1.5.yaml")}
    assert "nothing had to be run" in workbench.build(project, *arguments).stdout
