"""The command line: every command responds, and unimplemented ones are not offered."""

import os
import re
import subprocess
import sys

import pytest
import workbench

from lib.models.sources import hub
from lib.report.records import record
from lib.suite.cli import command, listing, tools
from lib.suite.cli import options as command_line
from lib.suite.plan import plan
from lib.suite.plan import template as templates
from tests.report import samples


def _build(*arguments, **more):
    return workbench.build(workbench.ROOT, *arguments, **more)


@pytest.mark.parametrize("name", ["run", "comprehensive", "report", "list", "lab", "test"])
def test_every_command_has_help(name):
    ended = _build(name, "--help")
    assert ended.returncode == 0 and ended.stdout.startswith(f"usage: build.py {name}"), ended.stdout + ended.stderr


def test_help_matches_what_a_command_does():
    applied = _build("apply", "--help").stdout
    assert "the folder of the new checkpoint" in applied and "<scale> (default: executed)\n" in applied
    assert "--dimension" not in applied and "default: all" not in applied and "results go to" not in applied
    assert "results go to DIR/<scale>" in _build("run", "--help").stdout
    advised = " ".join(_build("advise", "--help").stdout.split())
    assert "full for a model that has no proxy" in advised and "'memory<=8GiB'" in advised  # quoted for the shell
    assert "perplexity keeps its own margin" in advised


def test_help_names_every_command_and_every_exit_code():
    ended = _build("--help")
    top, commands = command.parser()
    assert ended.returncode == 0 and all(f"    {name}" in ended.stdout for name in commands)
    assert all(f"{code} " in top.epilog for code in (0, 1, 2, 130))


def test_a_stopped_command_exits_with_the_stop_code(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_main", stop)
    assert command.main(["list"]) == 130 and "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(("asks", "code"), [(False, 130), (True, 2)])
def test_stopping_the_child_program_stops_the_command(asks, code, monkeypatch, capsys):
    class Child:
        """A program that also receives Ctrl-C and ends a moment later."""

        waits = 0

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return 2

    monkeypatch.setattr(tools.subprocess, "Popen", lambda *_, **__: Child())
    monkeypatch.setattr(tools, "proxies", lambda *_: tools._call(["x"], asks=asks))
    assert command.main(["proxies"]) == code


def test_the_list_describes_each_optimization_in_one_line():
    template = templates.read(plan.NOTEBOOKS / "structured_pruning.ipynb")
    line = listing.about(template)
    assert line.startswith("Whole parts of a model are removed") and len(line) <= listing.WIDTH
    for path in plan.NOTEBOOKS.glob("*.ipynb"):
        line = listing.about(templates.read(path))
        assert line and "\n" not in line and len(line) <= listing.WIDTH, path.name


def test_the_network_is_used_only_on_request(monkeypatch):
    def options(*arguments):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        _, commands = command.parser()
        command._request(command_line.parsed(commands["run"], list(arguments)), ())
        return os.environ.pop("HF_HUB_OFFLINE", None)

    assert options() == options("--scale", "slice") == options("--scale", "full", "--checkpoints", "x") == "1"
    assert options("--scale", "full") is None
    assert options("-p", "tasks=topic") == "1" and options("-p", "tasks=topic,lm_eval:arc_easy") is None


def test_a_reader_closing_the_pipe_is_not_an_error(tmp_path):
    line = f"{sys.executable} build.py list | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], cwd=workbench.ROOT, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr


def test_test_runs_ruff_and_pytest_and_fails_with_either(tmp_path):
    root = workbench.project(tmp_path / "project")
    settings = {name: (workbench.ROOT / name).read_text(encoding="utf-8") for name in (".ruff.toml", ".pytest.ini")}
    (root / ".ruff.toml").write_text('extend-exclude = ["lib"]\n' + settings[".ruff.toml"], encoding="utf-8")
    (root / ".pytest.ini").write_text(settings[".pytest.ini"], encoding="utf-8")
    (root / "tests").mkdir()
    test = root / "tests" / "test_one.py"
    test.write_text("def test_one():\n    assert True\n", encoding="utf-8")
    workbench.notebook(root / "notebooks" / "well.ipynb", [("Code", 'print("x")')], "seed: int = 0")
    ended = workbench.build(root, "test")
    assert ended.returncode == 0 and "passed" in ended.stdout.splitlines()[-1], ended.stdout + ended.stderr
    test.write_text("import os\n\n\ndef test_one():\n    assert True\n", encoding="utf-8")
    ended = workbench.build(root, "test", "tests/test_one.py")
    assert ended.returncode == 1 and "failed: ruff check" in ended.stdout and "1 passed" in ended.stdout
    test.write_text("def test_one():\n    raise ValueError\n", encoding="utf-8")
    ended = workbench.build(root, "test", "-k", "one")
    assert ended.returncode == 1 and "failed: pytest" in ended.stdout and "1 failed" in ended.stdout


def test_an_empty_comparison_does_not_rule_out_regressions(tmp_path, capsys):
    old, new = tmp_path / "old" / "proxy", tmp_path / "new" / "full"
    samples.good(old, samples.OPTIMIZATIONS[:1])
    real = samples.run(model="a-real-model").model_copy(update={"scale": "full"})
    record.write(real, new / f"{real.stem}.json")
    assert command.main(["compare", str(old), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no primary measurement could be compared, so this says nothing about regressions"
    assert lines[0].startswith("Stand-ins with") and "A-Real-Model" not in lines[0]
    assert command.main(["compare", str(old), str(old)]) == 0
    assert "says nothing about regressions" in capsys.readouterr().out  # the same runs: nothing to compare


def test_training_options_match_those_checked_beforehand(capsys):
    from lib.models.proxies import train

    with pytest.raises(SystemExit):
        train.main(["--help"])
    listed = set(re.findall(r"(?<!\S)--[a-z]+", capsys.readouterr().out))
    own = tools.train_options("")
    assert listed == {name for action in own._actions for name in action.option_strings if name.startswith("--")}


def test_a_comparison_says_what_it_left_out(tmp_path, capsys):
    old, new = tmp_path / "old" / "proxy", tmp_path / "new" / "proxy"
    for folder in (old, new):
        samples.good(folder, samples.OPTIMIZATIONS[:1])
    damaged = f"{samples.OPTIMIZATIONS[0]}--{samples.MODELS[0]}.json"
    (new / damaged).write_text("{half")
    command.main(["compare", str(old), str(new)])
    lines = capsys.readouterr().out.splitlines()
    assert f"old: {old}" in lines
    [line] = [line for line in lines if line.startswith("new: ")]
    assert line.startswith(f"new: {new} (1 damaged record left out: {damaged}: not a record: not JSON")


@pytest.mark.parametrize(("named", "place"), [("mine", "mine"), ("~/x", "home/x"), ("a/../b", "b")])
def test_the_cache_is_the_same_for_every_started_program(named, place, tmp_path, monkeypatch):
    """The weight check and `apply` run in the project's folder, notebooks in their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORKBENCH_CACHE", named)
    monkeypatch.setattr(command, "_main", lambda _: 0)
    assert command.main(["list"]) == 0 and os.environ["WORKBENCH_CACHE"] == str(tmp_path / place)
    monkeypatch.setenv("WORKBENCH_CACHE", "~nobody-of-this-name/x")
    assert command.main(["list"]) == 2


def test_the_hub_cache_is_the_same_for_every_started_program(tmp_path, monkeypatch):
    """Previously a notebook looked for the planned cache in its own folder and fetched the checkpoint again."""
    monkeypatch.chdir(tmp_path)
    for name in hub.PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "./mine")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/x")
    monkeypatch.setattr(command, "_main", lambda _: 0)
    assert command.main(["list"]) == 0
    assert os.environ["HF_HOME"] == str(tmp_path / "mine") and hub.cache() == tmp_path / "mine" / "hub"
    assert os.environ["HF_DATASETS_CACHE"] == "/elsewhere" and "HF_HUB_CACHE" not in os.environ
    assert os.environ["XDG_CACHE_HOME"] == "~nobody-of-this-name/x"


def test_disk_errors_get_one_line(monkeypatch, capsys):
    def refused(error):
        def fail(_):
            raise error

        monkeypatch.setattr(command, "_main", fail)
        return command.main(["list"])

    assert refused(PermissionError(13, "Permission denied", "/models/x/config.json")) == 2
    assert capsys.readouterr().err == "build.py: /models/x/config.json: Permission denied\n"
    for error in (FileNotFoundError(2, "No such file", "lib/x"), PermissionError(13, "Permission denied")):
        with pytest.raises(OSError):  # a bug in the program: with its traceback
            refused(error)


@pytest.mark.parametrize("out", ["out", "out/deeper/still"])
def test_an_unwritable_folder_is_refused_before_fetching(out, tmp_path, monkeypatch, capsys):
    from lib.suite import build

    monkeypatch.setattr(build.plan, "plan", lambda *_, **__: pytest.fail("planned, and fetched"))
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    target = tmp_path / out
    for arguments in (["run"], ["apply", "structured_pruning", "--model", "qwen3-vl-2b"]):
        assert command.main([*arguments, "--out", str(target)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{target}" in line and "cannot be written to (no permission); give another folder" in line
    assert not list(tmp_path.iterdir())
