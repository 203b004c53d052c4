"""Unusual machines, terminals and paths: literal paths, any encoding, no home, pipes instead of records."""

import os
import pathlib
import subprocess
import sys

import pytest
import workbench

from lib import files
from lib.errors import UserError
from lib.report.records import record, rows
from lib.report.text.wording import untagged
from lib.suite.run import execute, overview
from lib.suite.store import build_history, result_folder, site


@pytest.mark.parametrize("out", ["r{1}", "r{model} {"])
def test_braces_in_a_path_are_literal(project, out):
    ended = workbench.build(project, "run", "--model", "alpha-1.5", "--out", out)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert workbench.record(project, "well--alpha-1.5", f"{out}/proxy")["status"] == "not_applicable"
    assert execute._literal("a{b}").format() == "a{b}"


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [("ascii", ["check"]), ("cp1252", ["compare", "executed/proxy", "executed/proxy"]), ("latin-1", ["list"])],
)
def test_a_terminal_that_cannot_encode_our_characters(built, encoding, arguments):
    root, _ = built
    environment = workbench.surroundings(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    program = [sys.executable, str(root / "build.py"), *arguments]
    ended = subprocess.run(program, cwd=root, env=environment, capture_output=True, timeout=180)
    assert ended.stdout.decode(encoding) and b"Traceback" not in ended.stderr
    assert ended.returncode == {"check": 1}.get(arguments[0], 0)


def test_a_user_without_a_home(monkeypatch, tmp_path):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("WORKBENCH_CACHE", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", nobody)
    assert files.cache_folder().parent.is_dir(), "among the temporary files"
    monkeypatch.setattr(pathlib.Path, "expanduser", nobody)
    with pytest.raises(UserError, match="~/x: there is no home folder of that name here"):
        files.expanded("~/x")


@pytest.mark.parametrize("error", [ValueError("path is on mount 'D:', start on mount 'C:'"), FileNotFoundError()])
def test_a_path_on_another_drive_is_shown_in_full(error, monkeypatch, tmp_path):
    def elsewhere(_):
        raise error

    assert files.seen_from_here(pathlib.Path.cwd() / "a" / "b") == str(pathlib.Path("a", "b"))
    monkeypatch.setattr(os.path, "relpath", elsewhere)
    assert files.seen_from_here(tmp_path / "x") == str(tmp_path / "x")


def test_the_home_of_an_unknown_user(project):
    applied = ["apply", "well", "--model", "alpha-1.5"]
    for command in (
        ["--out", "~nobody-of-this-name/x"],
        [*applied, "--out", "~nobody-of-this-name/x"],
        [*applied, "--out", "x", "--results", "~nobody-of-this-name/x"],
        [*applied, "--out", "x", "--stack", "~nobody-of-this-name/x"],
        ["--scale", "full", "--checkpoints", "~nobody-of-this-name/x"],
    ):
        ended = workbench.build(project, *command)
        [line] = ended.stderr.strip().splitlines()
        assert ended.returncode == 2 and "there is no home folder of that name here" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_as_a_record_counts_as_damaged_without_waiting(project):
    folder = project / "executed" / "proxy"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "well--alpha-1.5.json")
    assert "not a regular file" in record.read_folder(folder)[1]["well--alpha-1.5"]
    ended = workbench.build(project, "list", timeout=60)
    assert "damaged" in ended.stdout and "is not a regular file" in ended.stdout
    for command in (["check"], ["compare", "executed/proxy", "executed/proxy"]):
        assert workbench.build(project, *command, timeout=60).returncode in (1, 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_non_files_among_the_records_are_neither_waited_for_nor_opened(tmp_path):
    """Previously a build waited for a pipe in another scale's folder, and a dangling link ended in a traceback."""
    path = workbench.notebook(tmp_path / "overview.ipynb", [])
    folder = result_folder.Folder(tmp_path / "proxy")
    for scale in ("proxy", "full"):
        (tmp_path / scale).mkdir()
    before = overview._key(folder, path), site.made_from(folder)
    os.mkfifo(tmp_path / "full" / "well--alpha-1.5.json")
    os.mkfifo(folder.of("well--alpha-1.5", ".json"))
    folder.of("well--beta-2", ".json").symlink_to("nowhere.json")
    assert (overview._key(folder, path), site.made_from(folder)) == before
    assert build_history.keep(folder, "run") == [] and not build_history.store_of(folder.path).exists()


def test_names_cannot_open_a_tag_in_markdown():
    name = "<img src=x onerror=alert(1)>"
    assert untagged(name) == f"\\{name}" and untagged("p < 0.05, a<b> c</b>") == "p < 0.05, a\\<b> c\\</b>"
    assert "| \\<b>x\\</b> |" in rows.markdown([name], [["<b>x</b>"]])
    assert "<img" not in rows.markdown([name], []).replace("\\<img", "")


def test_a_full_disk_while_reporting_gets_one_line(built, tmp_path):
    root, _ = built
    program = (
        "import sys, zipfile\nfrom lib.suite.cli import command\n"
        "def full(*a, **k): raise OSError(28, 'No space left on device', 'report.zip')\n"
        "zipfile.ZipFile.write = full\nsys.exit(command.main(['report']))"
    )
    (root / "executed" / "proxy" / ".cache" / "made" / "report.zip.json").unlink(missing_ok=True)
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == (
        "build.py: report.zip: cannot be written (No space left on device)"
    )
    assert not list((root / "executed" / "proxy").glob(".*.part"))
