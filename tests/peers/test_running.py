"""Tests arms in turns and arms that do not run; nothing is installed, and no peer is needed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.peers import environments, run, running
from tests.peers.comparisons import COMPARISONS, Arm, Comparison
from tests.peers.environments import Impossible, Way
from tests.peers.running import ARMS, Places, Result

PEER, ONE, TWO = Arm("llama.cpp", "llama_cpp"), Arm("one", "one", own=False), Arm("two", "two", own=False)
THREE = Comparison("llama.cpp", "", (PEER, ONE, TWO), ())


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "setting.json", tmp_path / "environments", tmp_path, 1)


def recorded(order: list, fails: tuple[str, ...] = ()):
    """Return a fake arm runner that records what was run by which interpreter."""

    def run_arm(arm, turn, interpreter, _):
        order.append((arm.title, turn, interpreter))
        if arm.title in fails:
            raise Impossible(f"{arm.title} ends early")
        return Result(arm, turn, {"x": 1.0})

    return run_arm


def test_arms_take_turns_and_the_order_is_reversed(places):
    order: list = []
    results = running.in_turns(THREE, places, 4, {}, run=recorded(order), make=lambda *_: Path("peer's"))
    titles = [title for title, _, _ in order]
    assert titles == ["llama.cpp", "one", "two", "two", "one", "llama.cpp"] * 2 and len(results) == 12
    for first, second in (("llama.cpp", "one"), ("one", "two"), ("llama.cpp", "two")):
        ahead = [titles[at : at + 3].index(first) < titles[at : at + 3].index(second) for at in range(0, 12, 3)]
        assert sum(ahead) == 2
    assert {str(where) for title, _, where in order if title == "llama.cpp"} == {"peer's"}
    assert {str(where) for title, _, where in order if title != "llama.cpp"} == {sys.executable}


def test_a_peer_that_cannot_be_installed_gives_one_result_with_every_reason(places):
    def impossible(_, name, way):
        raise Impossible(f"{name} has no wheel")

    order: list = []
    peer = next(comparison for comparison in COMPARISONS if comparison.peer == "llm-compressor")
    results = running.in_turns(peer, places, 4, {}, run=recorded(order), make=impossible)
    assert len(results) == 1 and not order and results[0].reason.count("has no wheel") == 4


def test_the_next_way_is_tried_if_the_peer_does_not_run_and_is_remembered(places):
    made, known = [], {}

    def make(_, name, way):
        made.append(way)
        return Path(str(len(made)))

    def run_arm(arm, turn, interpreter, _):
        if arm.own and interpreter == Path("1"):
            raise Impossible("needs another transformers")
        return Result(arm, turn)

    peer = next(comparison for comparison in COMPARISONS if comparison.peer == "llm-compressor")
    assert all(result.reason is None for result in running.in_turns(peer, places, 1, known, run=run_arm, make=make))
    assert len(made) == 2 and known == {"llm-compressor": made[1]}
    running.in_turns(peer, places, 1, known, run=run_arm, make=make)
    assert len(made) == 3 and made[2] == made[1]


def test_a_failing_arm_is_not_rerun_and_stops_no_other(places):
    order: list = []
    results = running.in_turns(THREE, places, 4, {}, run=recorded(order, ("one",)), make=lambda *_: Path("x"))
    assert [title for title, _, _ in order].count("one") == 1
    assert [result.reason for result in results if result.arm == ONE] == ["one ends early"]
    assert len([result for result in results if result.arm == TWO]) == 4


def test_arms_that_take_minutes_run_once(places):
    order: list = []
    once = Comparison("llama.cpp", "", (PEER, ONE), (), once=True)
    running.in_turns(once, places, 4, {}, run=recorded(order), make=lambda *_: Path("x"))
    assert [title for title, _, _ in order] == ["llama.cpp", "one"]


def test_a_result_is_read_and_a_damaged_one_gives_a_reason(tmp_path):
    written, log = tmp_path / "result.json", tmp_path / "log"
    written.write_text(json.dumps({"values": {"rate": 3}, "versions": {"peer": "1.0"}, "note": "so"}))
    result = running.read(PEER, 1, written, log)
    assert result.values == {"rate": 3.0} and result.versions == {"peer": "1.0"} and result.note == "so"
    for content in ("", "[]", "{}", '{"values": {"rate": "fast"}, "versions": {}}', '{"values": [1], "versions": {}}'):
        written.write_text(content)
        with pytest.raises(Impossible, match="no result that can be read"):
            running.read(PEER, 1, written, log)
    written.unlink()
    log.write_text("Traceback (most recent call last):\n  …\nModuleNotFoundError: No module named 'peer'\n")
    with pytest.raises(Impossible, match=r"does not run \(1\): ModuleNotFoundError: No module named 'peer'"):
        running.read(PEER, 1, written, log, 1)


def test_an_arm_runs_in_its_own_process(places, tmp_path, monkeypatch):
    (tmp_path / "arms").mkdir()
    script = """import json, os, sys
from pathlib import Path
threads = float(os.environ["OMP_NUM_THREADS"])
Path(sys.argv[2]).write_text(json.dumps({"values": {"threads": threads}, "versions": {}, "note": sys.argv[3]}))
"""
    (tmp_path / "arms" / "well.py").write_text(script)
    (tmp_path / "arms" / "ill.py").write_text("raise SystemExit('no such file')")
    monkeypatch.setattr(running, "ARMS", tmp_path / "arms")
    result = running.run_arm(Arm("well", "well", ("a=b",)), 0, Path(sys.executable), places)
    assert result.values == {"threads": 1.0} and result.note == "a=b"
    with pytest.raises(Impossible, match=r"does not run \(1\): no such file"):
        running.run_arm(Arm("ill", "ill"), 0, Path(sys.executable), places)


def test_an_interrupted_run_resumes(places, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ARMS", tmp_path / "arms")  # contains no scripts, so nothing could run
    (tmp_path / "arm-0.json").write_text(json.dumps({"values": {"x": 1}, "versions": {}}))
    resumed = replace(places, resumed=True)
    assert running.run_arm(Arm("arm", "arm", own=False), 0, Path(sys.executable), resumed).values == {"x": 1.0}
    with pytest.raises(Impossible, match="does not run"):
        running.run_arm(Arm("arm", "arm", own=False), 1, Path(sys.executable), resumed)
    with pytest.raises(Impossible, match="does not run"):
        running.run_arm(Arm("arm", "arm", own=False), 0, Path(sys.executable), places)


def test_a_setting_is_kept_only_for_the_same_choices(tmp_path, monkeypatch):
    made = []

    def make(command, **_):
        made.append(command)
        Path(command[-1]).write_text("{}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(run.subprocess, "run", make)
    options = run.parser().parse_args(["--out", str(tmp_path)])
    assert run.make_setting(options, tmp_path) == (tmp_path / "setting.json", False)
    assert run.make_setting(options, tmp_path) == (tmp_path / "setting.json", True) and len(made) == 1
    options.sparsity = 0.6
    assert run.make_setting(options, tmp_path)[1] is False and len(made) == 2


def test_an_environment_is_reused_and_each_way_has_its_own(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environments, "_run", calls.append)
    way, other = Way(("torch==1",), ("peer",)), Way(("torch==1",))
    for each in (way, other):
        environments.place(tmp_path, "peer", each).mkdir()
    python = environments.ensure(tmp_path, "peer", way)
    assert python.is_relative_to(environments.place(tmp_path, "peer", way)) and len(calls) == 3
    assert "--no-deps" in calls[2] and "--constraint" in calls[1] and calls[1][-1] == "torch==1"
    assert environments.ensure(tmp_path, "peer", way) == python and len(calls) == 3
    assert environments.ensure(tmp_path, "peer", other) != python and len(calls) == 5


@pytest.mark.parametrize(
    "output, expected",
    [
        ("Collecting x\nERROR: No matching distribution found for x\n", "ERROR: No matching distribution found for x"),
        ("Traceback\n  File\nImportError: cannot import name 'y'", "ImportError: cannot import name 'y'"),
        ("", "it gives no reason"),
    ],
)
def test_the_reason_is_one_line(output, expected):
    assert environments.reason(output) == expected
    assert len(environments.reason("error: " + "x" * 999)) == environments.REASON_CHARACTERS


def test_every_arm_is_a_script_and_an_unknown_peer_gives_one_line():
    assert {arm.script for comparison in COMPARISONS for arm in comparison.arms} | {"probe"} == {
        path.stem for path in ARMS.glob("*.py")
    }
    command = [sys.executable, str(Path(run.__file__)), "llama.ccp", "--out", "unused"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert 'unknown peer "llama.ccp". Did you mean "llama.cpp"?' in ended.stderr


def test_a_peers_result_is_kept_only_for_its_environment(places, tmp_path, monkeypatch):
    """Previously a resumed run paired it with another way to install the peer, in which the next turns failed."""
    (tmp_path / "arms").mkdir()
    script = 'import json, sys; open(sys.argv[2], "w").write(json.dumps({"values": {"x": 1}, "versions": {}}))'
    (tmp_path / "arms" / "arm.py").write_text(script)
    monkeypatch.setattr(running, "ARMS", tmp_path / "arms")
    arm, resumed = Arm("arm", "arm"), replace(places, resumed=True)
    running.run_arm(arm, 0, Path(sys.executable), places)
    (tmp_path / "arms" / "arm.py").unlink()  # nothing could run again
    assert running.run_arm(arm, 0, Path(sys.executable), resumed).values == {"x": 1.0}
    with pytest.raises(Impossible):
        running.run_arm(arm, 0, tmp_path / "another-way" / "bin" / "python", resumed)


def test_results_of_other_choices_are_not_resumed(tmp_path, monkeypatch):
    """Otherwise a call for one peer, then one for all of them, mixes two settings in a table."""

    def make(command, **_):
        Path(command[-1]).write_text("{}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(run.subprocess, "run", make)
    options = run.parser().parse_args(["--out", str(tmp_path)])
    run.make_setting(options, tmp_path)
    (tmp_path / "arms").mkdir()
    kept = tmp_path / "arms" / "workbench_speed-0.json"
    kept.write_text("{}")
    assert run.make_setting(options, tmp_path)[1] and kept.is_file()
    options.windows = 8
    assert not run.make_setting(options, tmp_path)[1] and not kept.exists()
