"""A full disk: one line, nothing lost that was finished. Needs a small file system of its own, so root."""

import os
import subprocess

import pytest
import workbench

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
