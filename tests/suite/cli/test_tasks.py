"""`list tasks`: every task with its items, its data and their license."""

from lib.models.tasks import registry
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.suite.cli import command, tasks


def test_every_task_has_a_complete_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    rows = tasks.rows()
    assert [row[0] for row in rows] == [*registry.CLASSIFY, *registry.GENERATE, *BENCHMARKS]
    assert all(cell for row in rows for cell in row)
    assert {row[-1] for row in rows} == {"yes", "fetched by the first run"}
    assert command.main(["list", "tasks"]) == 0
    shown = capsys.readouterr().out
    assert "hellaswag" in shown and "10,042" in shown and "lm_eval:NAME" in shown and "text=PATH" in shown


def test_other_lists_are_named(capsys):
    assert command.main(["list", "task"]) == 2
    assert 'expected "list" or "list tasks". Did you mean "tasks"?' in capsys.readouterr().err
