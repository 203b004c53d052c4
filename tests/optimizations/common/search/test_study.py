"""Studies are resumed; damaged files and those of another space are renamed; killing a run changes no answer."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from lib.errors import UserError
from lib.optimizations.common.search import study

ROOT = Path(__file__).resolve().parents[4]
SPACE = {"a": ["x", "y", "z"], "weights": "1"}
CHOICES = {name: optuna.distributions.CategoricalDistribution(("x", "y", "z")) for name in "abcde"}


def _value(params: dict) -> tuple[float, float]:
    total = sum(("xyz".index(value) + 1) * (at + 1) for at, value in enumerate(params.values()))
    return float(total), float(15 / total)


def _search(path, until: int, name: str = "s") -> list[dict]:
    with study.opened(path, name, SPACE, 2) as stored:
        while len(stored.trials) < until:
            params = stored.propose(CHOICES, lambda n: optuna.samplers.TPESampler(seed=n, n_startup_trials=4))
            stored.add(params, CHOICES, _value(params))
        return [trial.params for trial in stored.trials]


def test_a_resumed_study_equals_an_uninterrupted_one(tmp_path):
    whole = _search(tmp_path / "whole.db", 14)
    _search(tmp_path / "parts.db", 5)
    assert _search(tmp_path / "parts.db", 14) == whole == _search(None, 14)


@pytest.mark.parametrize("name", ["r{1}", "r{model} {", "a b?c=d", "100%20", "Größe #1"])
def test_folder_names_are_taken_literally(tmp_path, name):
    path = tmp_path / name / "s.db"
    assert len(_search(path, 3)) == 3 and path.is_file(), "the file lies where it was asked for"
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with study.opened(path, "s", SPACE, 2) as stored:
        assert len(stored.trials) == 3


def test_a_study_killed_during_a_commit_is_resumed(tmp_path):
    """Its journal has to be rolled back, which a read-only connection refuses: the file was called damaged."""
    path, killed = tmp_path / "s.db", tmp_path / "killed.db"
    _search(path, 3)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("pragma cache_size = 1")  # pages are written before the commit, so the journal is in use
        file.execute("begin")
        file.execute("update trials set number = number + 7")
        file.execute("create table more (a)")
        for _ in range(50):
            file.execute("insert into more values (zeroblob(4000))")
        shutil.copy(path, killed)
        shutil.copy(f"{path}-journal", f"{killed}-journal")
    assert Path(f"{killed}-journal").read_bytes()[:1] == b"\xd9", "a journal that has to be rolled back"
    with study.opened(killed, "s", SPACE, 2) as stored:
        assert len(stored.trials) == 3 and "resumed, 3 evaluations" in stored.notes[-1]


def test_a_killed_and_restarted_study_gives_the_same_answer(tmp_path):
    path = tmp_path / "killed.db"
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_study as t
from lib.optimizations.common.search import study
add = study.Study.add
def dying(self, *rest):
    if len(self.trials) == 6:
        print("ready", flush=True); import time; time.sleep(60)
    add(self, *rest)
study.Study.add = dying
t._search({str(path)!r}, 12)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "ready\n"
    says = rf"another run is searching in it \(process {child.pid}, since"
    with pytest.raises(UserError, match=says), study.opened(path, "s", SPACE, 2):
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert _search(path, 12) == _search(None, 12)


def test_facts_are_computed_once(tmp_path):
    values = iter([{"b0": [0.1]}, {"b0": [0.2]}])
    for _ in range(2):
        with study.opened(tmp_path / "s.db", "s", SPACE, 1) as stored:
            assert stored.fact("costs", lambda: next(values)) == {"b0": [0.1]}


def test_files_of_another_space_are_kept_aside(tmp_path):
    path = tmp_path / "s.db"
    _search(path, 3)
    with study.opened(path, "s", SPACE | {"weights": "2"}, 2) as stored:
        assert stored.trials == [] and "belongs to another search space; kept as s.db.aside-1" in stored.notes[0]
    with study.opened(path, "s", SPACE, 2) as stored:
        assert stored.trials == []
    assert {file.name for file in tmp_path.glob("s.db*")} == {"s.db", "s.db.aside-1", "s.db.aside-2"}
    with study.opened(tmp_path / "s.db.aside-1", "s", SPACE, 2) as stored:
        assert len(stored.trials) == 3, "nothing of it was lost"


def _table(path: Path) -> bytes:
    with sqlite3.connect(path) as file:
        file.execute("create table t (a)")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "overwritten", "other tables"])
def test_damaged_files_are_kept_aside(tmp_path, kind):
    path = tmp_path / "s.db"
    _search(path, 3)
    whole = path.read_bytes()
    damaged = {
        "text": lambda: b"no database",
        "cut": lambda: whole[: len(whole) // 2],
        "empty": lambda: b"",
        "overwritten": lambda: whole[:4096] + b"\xff" * 8192 + whole[12288:],
        "other tables": lambda: _table(tmp_path / "other.db"),
    }[kind]()
    path.write_bytes(damaged)
    with study.opened(path, "s", SPACE, 2) as stored:
        assert stored.trials == [] and "kept as s.db.aside-1" in stored.notes[0]
    assert (tmp_path / "s.db.aside-1").read_bytes() == damaged


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder"), study.opened(tmp_path / "file" / "s.db", "s", {}, 1):
        pass


def test_the_code_of_an_optimization_is_its_whole_folder(tmp_path):
    """A trial also applies files next to the method: previously it was resumed after those had changed."""
    folder = tmp_path / "an_optimization"
    (folder / "inner").mkdir(parents=True)
    single = tmp_path / "single.py"
    for file in (folder / "method.py", folder / "beside.py", folder / "inner" / "deeper.py", single):
        file.write_text("before")
    parts = [SimpleNamespace(__file__=str(folder / "method.py")), SimpleNamespace(__file__=str(single))]
    seen = {study.code(parts=parts)}
    for file in (folder / "beside.py", folder / "inner" / "deeper.py", single):
        file.write_text("after")
        seen.add(study.code(parts=parts))
    assert len(seen) == 4 and study.code(parts=parts) in seen
    (tmp_path / "another.py").write_text("new")
    assert study.code(parts=parts) in seen, "what lies beside a single file is not its own"
    assert study.code(*parts) != study.code(parts=parts)
