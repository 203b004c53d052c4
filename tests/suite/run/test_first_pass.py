"""A build at effort standard first makes a complete site at effort preview, then replaces it run by run."""

import signal

import psutil
import pytest
import workbench

from lib.report.records import history
from lib.suite.run.sampling import is_alive

MARK = """import os, time
from pathlib import Path

with Path(os.environ["MARKS"], "order").open("a") as order:
    order.write(f"{NAME} {effort}\\n")
if effort == "standard" and NAME == "z_slow":
    Path(os.environ["MARKS"], "pid").write_text(str(os.getpid()))
    time.sleep(float(os.environ["SLOW"]))"""


@pytest.fixture
def marked(project, tmp_path):
    """Return a project with two templates that leave a mark when they run, and the folder of the marks."""
    for name in ("well", "z_slow"):
        workbench.notebook(project / "notebooks" / f"{name}.ipynb", [("Mark", MARK), ("Record", workbench.RECORD)])
    marks = tmp_path / "marks"
    marks.mkdir()
    return project, marks


def _order(marks):
    return (marks / "order").read_text().splitlines()


def _efforts(root):
    return [workbench.record(root, f"{name}--alpha-1.5")["effort"] for name in ("well", "z_slow")]


def test_all_previews_precede_standard_runs_and_later_builds_make_none(marked):
    root, marks = marked
    arguments = ("--model", "alpha-1.5", "--jobs", "1")
    ended = workbench.build(root, *arguments, MARKS=str(marks), SLOW="0")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert _order(marks) == ["well preview", "z_slow preview", "well standard", "z_slow standard"]
    assert "first pass: 2 runs at effort preview" in ended.stdout and "first pass complete: executed" in ended.stdout
    assert _efforts(root) == ["standard", "standard"]
    [build] = history.builds(root / "executed" / history.NAME)
    assert {run.effort for run in history.records(root / "executed" / history.NAME, build)} == {"standard"}
    again = workbench.build(root, *arguments, MARKS=str(marks), SLOW="0")
    assert "nothing had to be run" in again.stdout and "first pass" not in again.stdout and len(_order(marks)) == 4
    stale = workbench.build(root, *arguments, "-p", "ratio=0.5", MARKS=str(marks), SLOW="0")
    assert stale.returncode == 0 and "first pass" not in stale.stdout, stale.stdout + stale.stderr
    assert _order(marks)[4:] == ["well standard", "z_slow standard"]  # a result stays until its own run replaces it


def test_a_stopped_build_keeps_the_first_pass_and_resumes_there(marked):
    root, marks = marked
    arguments = ("--model", "alpha-1.5", "--jobs", "1")
    process = workbench.begin(root, *arguments, MARKS=str(marks), SLOW="600")
    path = marks / "pid"
    kernel = psutil.Process(int(workbench.wait_for(lambda: path.is_file() and path.read_text(), 120)))
    assert _efforts(root) == ["standard", "preview"]
    folder = root / "executed" / "proxy"
    assert all((folder / f"{name}--alpha-1.5.html").is_file() for name in ("well", "z_slow"))
    workbench.kill(process, signal.SIGINT)
    assert process.returncode == 130 and not is_alive(kernel)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "1 at preview, 1 at standard" in page or "1 at standard, 1 at preview" in page
    assert not (root / "executed" / history.NAME).exists()  # no build has ended
    listed = workbench.build(root, "list", "--model", "alpha-1.5").stdout
    assert any("z_slow--" in line and "at effort preview so far" in line for line in listed.splitlines())
    ended = workbench.build(root, *arguments, MARKS=str(marks), SLOW="0")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 of 2 runs are already finished and kept" in ended.stdout
    assert _order(marks).count("z_slow preview") == 1 and _efforts(root) == ["standard", "standard"]


def test_named_runs_and_other_efforts_have_no_first_pass(marked):
    root, marks = marked
    for arguments in (("run", "well"), ("--effort", "quick", "--out", "quick")):
        ended = workbench.build(root, *arguments, "--model", "alpha-1.5", MARKS=str(marks), SLOW="0")
        assert ended.returncode == 0 and "first pass" not in ended.stdout, ended.stdout + ended.stderr
    assert _order(marks)[0] == "well standard" and set(_order(marks)[1:]) == {"well quick", "z_slow quick"}


def test_a_preview_never_replaces_a_result_of_a_larger_effort(marked):
    root, marks = marked
    for arguments in (("--effort", "quick"), ()):
        ended = workbench.build(root, *arguments, "--model", "alpha-1.5", "--jobs", "1", MARKS=str(marks), SLOW="0")
        assert ended.returncode == 0 and "first pass" not in ended.stdout, ended.stdout + ended.stderr
    assert _order(marks) == ["well quick", "z_slow quick", "well standard", "z_slow standard"]
