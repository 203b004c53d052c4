"""What a build leaves behind, what it reports about failures, and what it does when called again."""

import os
import signal
import subprocess
import sys

import pytest
import workbench

from lib import files
from lib.suite import build
from lib.suite.plan import template as templates
from lib.suite.run import settle
from lib.suite.store import render, running
from lib.suite.store.result_folder import Folder


def test_one_failure_does_not_stop_other_runs(built):
    root, ended = built
    assert ended.returncode == 1, ended.stdout + ended.stderr
    statuses = {name: workbench.record(root, f"{name}--alpha-1.5")["status"] for name in ("well", "raises", "hangs")}
    assert statuses == {"well": "not_applicable", "raises": "failed", "hangs": "failed"}
    assert "2 of 6 finished, 4 failed" in ended.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "cell 6 under “Sums” (`y = x / 0`): ZeroDivisionError: division by zero"),
        ("hangs", "cell 4 under “Endless” (`import time`): it exceeded its time limit"),
        ("killed", "cell 4 under “Gone” (`import os`): the kernel was killed or died"),
        ("silent", "the notebook glued no record"),
    ],
)
def test_a_failure_names_cell_error_and_notebook(built, name, message):
    root, ended = built
    stem = f"{name}--alpha-1.5"
    record = workbench.record(root, stem)
    assert record["status"] == "failed" and record["reason"].startswith(message)
    [line] = [line for line in ended.stdout.splitlines() if line.startswith(f"FAILED {stem}")]
    place = f"executed/proxy/failed/{stem}.ipynb"
    assert message in line and place in line and (root / place).is_file()
    assert not (root / f"executed/proxy/{stem}.ipynb").exists()


def test_not_applicable_is_a_result(built):
    root, ended = built
    folder, stem = root / "executed" / "proxy", "absent--alpha-1.5"
    record = workbench.record(root, stem)
    assert (record["status"], record["reason"]) == ("not_applicable", "this model has no experts")
    assert record["verdict"]["sentence"] == "Not applicable: this model has no experts."
    page = (folder / f"{stem}.html").read_text(encoding="utf-8")
    assert "Not applicable: this model has no experts" in page and "Traceback (most" not in page
    assert "An Exception was encountered" not in (folder / f"{stem}.ipynb").read_text(encoding="utf-8")
    assert f"FAILED {stem}" not in ended.stdout and not (folder / "failed" / f"{stem}.ipynb").exists()


def test_a_finished_run_is_complete(built):
    root, _ = built
    folder, stem = root / "executed" / "proxy", "well--alpha-1.5"
    assert {path.name for path in folder.glob(f"{stem}.*")} == {
        f"{stem}{end}" for end in (".ipynb", ".html", ".md", ".json")
    }
    assert (folder / "index.html").is_file() and (folder / "logs" / f"{stem}.log").is_file()
    assert not (folder / ".running").exists() and not list(folder.glob(".*.part"))
    record = workbench.record(root, stem)
    process = record["process"]
    assert record["parameters"]["ratio"] == 0.25 and record["parameters"]["model"] == "alpha-1.5"
    assert len(process["seconds"]) == len(process["memory_bytes"]) == len(process["cpu_percent"]) > 0
    assert max(process["memory_bytes"]) > 0 and process["jobs_side_by_side"] * process["cores"] <= os.cpu_count()
    assert "under “Record”" in record["log"] and record["seconds"] > 0 and record["key"].startswith("sha256:")


def test_machine_paths_stay_out_of_the_notebook(built):
    root, _ = built
    text = (root / "executed/proxy/well--alpha-1.5.ipynb").read_text(encoding="utf-8")
    assert str(root) not in text


def test_without_changes_nothing_runs(built):
    root, _ = built
    before = (root / "executed/proxy/well--alpha-1.5.json").stat().st_mtime_ns
    ended = workbench.build(root, "run", "well", "--model", "alpha-1.5")
    assert ended.returncode == 0 and "nothing had to be run" in ended.stdout, ended.stdout + ended.stderr
    assert (root / "executed/proxy/well--alpha-1.5.json").stat().st_mtime_ns == before


def test_list_shows_the_state_of_every_run(built):
    root, _ = built
    lines = workbench.build(root, "list").stdout.splitlines()
    states = {line.split()[1]: line.split()[0] for line in lines if "--" in line}
    assert states["well--alpha-1.5"] == "not_applicable" and states["well--beta-2"] == "missing"
    assert states["raises--alpha-1.5"] == "failed"
    assert any("parameters: ratio changed" in line for line in _list(root, "-p", "ratio=0.5"))


@pytest.mark.parametrize(
    ("path", "old", "new", "reason"),
    [
        ("lib/errors.py", '"""', '"""Changed: ', "code: lib/errors.py changed"),
        ("notebooks/well.ipynb", "x = ratio", "x = ratio + 1", "template: cells changed"),
        ("parameters/alpha-1.5.yaml", "num_hidden_layers: 2", "num_hidden_layers: 1", "model: config changed"),
        ("parameters/proxies/alpha-1.5/config.json", "{", "{ ", "weights: config.json changed"),
    ],
)
def test_list_says_why_a_run_is_stale(built, path, old, new, reason):
    root, _ = built
    before = (root / path).read_text(encoding="utf-8")
    if path.startswith("lib"):
        assert "import UserError" in workbench.RECORD  # the template depends on that module
    (root / path).write_text(before.replace(old, new, 1), encoding="utf-8")
    try:
        [line] = [line for line in _list(root) if "well--alpha-1.5" in line]
    finally:
        (root / path).write_text(before, encoding="utf-8")
    assert line.split()[0] == "stale" and reason in line


def _list(root, *arguments):
    ended = workbench.build(root, "list", "--model", "alpha-1.5", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_missing_pages_are_rendered_without_a_run(built):
    root, _ = built
    page = root / "executed/proxy/well--alpha-1.5.html"
    page.unlink()
    ended = workbench.build(root, "run", "well", "--model", "alpha-1.5")
    assert ended.returncode == 0 and "nothing had to be run" in ended.stdout and page.is_file()


def test_report_renders_from_the_records(built):
    root, _ = built
    page = root / "executed/proxy/raises--alpha-1.5.html"
    page.unlink()
    ended = workbench.build(root, "report")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ZeroDivisionError" in page.read_text(encoding="utf-8")


def test_a_record_that_is_not_json_is_named(built):
    root, _ = built
    path = root / "executed/proxy/killed--alpha-1.5.json"
    before = path.read_bytes()
    path.write_text("{half", encoding="utf-8")
    try:
        assert any("damaged" in line and "is not JSON" in line for line in _list(root))
        ended = workbench.build(root, "report")
        assert ended.returncode == 1
        assert "killed--alpha-1.5.json: not a record: not JSON" in ended.stdout
        assert "well--alpha-1.5: rendered" in ended.stdout
    finally:
        path.write_bytes(before)


def test_two_builds_at_once_in_one_folder(built):
    root, _ = built
    with files.locked(root / "executed/proxy/.lock"):
        ended = workbench.build(root, "run", "well")
    assert ended.returncode == 2 and "another build is running there" in ended.stderr
    assert str(os.getpid()) in ended.stderr and "Traceback" not in ended.stderr


def test_the_lock_of_a_dead_process_is_ignored(tmp_path):
    path = tmp_path / "lock"
    program = (
        "import os, sys; from pathlib import Path; from lib import files\n"
        "with files.locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], cwd=workbench.ROOT).returncode == -signal.SIGKILL
    with files.locked(path):
        pass


def test_a_report_names_pages_that_could_not_be_made(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "proxy"
    folder.mkdir()
    (folder / "well--alpha-1.5.json").write_text("{}")
    monkeypatch.setattr(render, "render_all", lambda *_: [])
    monkeypatch.setattr(build.site, "finish", lambda *_: ["index.html could not be made: no reason"])
    assert build.report(folder) == 1
    output = capsys.readouterr().out
    assert "FAILED index.html could not be made: no reason\n" in output and "1 failed; " in output


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signal of a closed terminal")
def test_a_build_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with build.stoppable():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(build.BuildStopped):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / ".well--alpha-1.5_files.part").mkdir()  # pictures of pages that were being made
    (tmp_path / ".well--alpha-1.5_files.part" / "figure.png").write_bytes(b"half")
    (tmp_path / ".index.html.x.part").write_text("half")
    running.tidy(folder)
    assert not list(tmp_path.iterdir())


def test_a_run_of_code_other_than_planned_is_out_of_date(project, tmp_path):
    changes = "import os\n\nwith open(os.environ['CHANGED'], 'a') as file:\n    file.write('# new')"
    workbench.notebook(project / "notebooks/well.ipynb", [("Change", changes), ("Record", workbench.RECORD)])
    code, arguments = project / "lib" / "errors.py", ("run", "--model", "alpha-1.5")
    before = code.read_bytes()
    ended = workbench.build(project, *arguments, CHANGED=str(code))
    assert ended.returncode == 0 and "changed during the build; it is out of date" in " ".join(ended.stderr.split())
    assert workbench.record(project, "well--alpha-1.5")["key"] == ""
    code.write_bytes(before)
    ended = workbench.build(project, *arguments, CHANGED=str(tmp_path / "elsewhere"))
    assert ended.returncode == 0 and "changed during" not in ended.stderr and "1 run (" in ended.stdout, ended.stdout
    assert workbench.record(project, "well--alpha-1.5")["key"].startswith("sha256:")


def test_overview_runs_last_and_only_when_a_record_changed(project):
    code = "from pathlib import Path\nprint(sorted(p.name for p in Path(folder).glob('*--*.json')))"
    workbench.notebook(project / "notebooks/overview.ipynb", [("Records", code)], 'folder: str = ""  # records')
    ended = workbench.build(project, "run", "--model", "beta-2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = project / "executed/proxy"
    assert "well--beta-2.json" in (folder / "overview.ipynb").read_text(encoding="utf-8")
    assert (folder / "overview.html").is_file() and (folder / "overview.md").is_file()
    before = (folder / "overview.ipynb").stat().st_mtime_ns
    assert workbench.build(project, "run", "--model", "beta-2").returncode == 0
    assert (folder / "overview.ipynb").stat().st_mtime_ns == before


def test_a_cell_removed_from_the_template_is_named_by_its_number(tmp_path):
    template = templates.read(workbench.notebook(tmp_path / "short.ipynb", [("Sums", "x = 1")]))
    assert settle._cell(template, 4) == "cell 4 under “Sums” (`x = 1`)" and settle._cell(template, 9) == "cell 9"
