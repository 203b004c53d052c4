"""JupyterLab's start page: one line per optimization with its minutes and last result, read from records."""

from dataclasses import replace

import pytest
import workbench

from lib.errors import UserError
from lib.report.records import record
from lib.suite.lab import request, start_page
from lib.suite.plan import plan
from lib.suite.plan import template as templates
from tests.report import samples

MODEL = samples.MODELS[1]


def _rows(page: str) -> dict[str, list[str]]:
    rows = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| [")]
    return {row[0]: row[1:] for row in rows}


def test_every_optimization_has_a_row_with_its_last_result(tmp_path):
    run = samples.run()
    folder = tmp_path / "proxy"
    record.write(run, folder / f"{run.stem}.json")
    other = samples.run("tensor_decomposition", samples.MODELS[0]).model_copy(update={"seconds": 120.0})
    record.write(other, folder / f"{other.stem}.json")
    failed = samples.without_result("failed", "cell 3 | raised <b>", "automl_components", MODEL)
    record.write(failed, folder / f"{failed.stem}.json")
    page = start_page.write(start_page.entries([]), tmp_path, tmp_path / ".lab").read_text(encoding="utf-8")
    rows = _rows(page)
    assert len(rows) == len(plan.optimizations())
    about, takes, last = rows["[Structured pruning](structured_pruning.ipynb)"]
    assert about.startswith("Whole parts of a model are removed") and about.endswith(".") and about.count(". ") == 0
    assert takes == f"{run.seconds / 60:.1f} min at quick"
    assert "(2026-01-31, quick)" in last and last.split(" ")[0] in run.verdict.sentence
    assert rows["[Tensor decomposition](tensor_decomposition.ipynb)"][1] == "2.0 min at quick, on other models"
    assert rows["[AutoML components](automl_components.ipynb)"][2].startswith("failed: cell 3 ¦ raised \\<b>")
    _, takes, last = rows["[Continuous NAS](continuous_nas.ipynb)"]
    assert takes == "no run yet; its limit is 60 min" and last == "not run yet"
    assert "stand-in" in page.split("| notebook")[0] and "3.62 M parameters" in page
    assert "(overview.ipynb)" in page and "`smollm2-135m-instruct`" in page and f"`{MODEL}`" not in page


def test_times_of_two_efforts_are_not_mixed(tmp_path):
    """While previews were replaced, the time of other models was a median of both efforts, labeled as the first."""
    for model, effort, seconds in ((samples.MODELS[0], "preview", 30.0), (samples.MODELS[2], "standard", 600.0)):
        run = samples.run("tensor_decomposition", model).model_copy(update={"effort": effort, "seconds": seconds})
        record.write(run, tmp_path / "proxy" / f"{run.stem}.json")
    page = start_page.write(start_page.entries([]), tmp_path, tmp_path / ".lab").read_text(encoding="utf-8")
    takes = _rows(page)["[Tensor decomposition](tensor_decomposition.ipynb)"][1]
    assert takes == "0.5 min at preview, on other models"


def test_the_page_is_made_without_any_record(tmp_path):
    page = start_page.write(start_page.entries([]), tmp_path / "none", tmp_path).read_text(encoding="utf-8")
    assert all(row[2] == "not run yet" for row in _rows(page).values())


def test_an_unreadable_record_is_not_reported_as_missing(tmp_path):
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / f"continuous_nas--{MODEL}.json").write_text("{half")
    page = start_page.write(start_page.entries([]), tmp_path, tmp_path / ".lab").read_text(encoding="utf-8")
    last = _rows(page)["[Continuous NAS](continuous_nas.ipynb)"][2]
    assert last.startswith(f"continuous_nas--{MODEL}.json: not a record") and "build it again" in last


def test_with_all_models_listed_another_one_is_a_checkpoint():
    entry = start_page.entries([])[0]
    listed = [replace(entry, model=name) for name in plan.models()]
    assert "set to it: a checkpoint: a folder" in start_page.text(listed, {})
    assert f"`{plan.models()[0]}`, or a checkpoint: a folder" in start_page.text(listed[1:], {})


def test_the_description_is_the_first_sentence(tmp_path):
    path = workbench.notebook(tmp_path / "a.ipynb", [])
    assert start_page.what_it_does(templates.read(path)) == ""
    text = path.read_text(encoding="utf-8").replace('"# a"', '"# a\\n\\nIt cuts\\n1.5 of them. It may lose."')
    path.write_text(text, encoding="utf-8")
    assert start_page.what_it_does(templates.read(path)) == "It cuts 1.5 of them."


def _asked(*arguments: str):
    return request.parser("").parse_known_args(arguments)


def test_options_are_ours_or_jupyterlabs():
    options, passed_on = _asked("--no-browser", "--model", MODEL, "--port=8899", "--out", "here")
    assert passed_on == ["--no-browser", "--port=8899"] and request.results(options).name == "here"
    jobs = request.jobs(options)
    assert [job.optimization for job in jobs] == plan.optimizations()
    assert {(job.model, job.scale, job.effort) for job in jobs} == {(MODEL, "proxy", "quick")}
    assert request.jobs(_asked("--no-browser")[0]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "qwen3-4b-instruct"), "Did you mean"),
        (("--model", MODEL, "--scale", "slize"), "Did you mean"),
        (("--effort", "thorough"), "give --model too"),
        (("--out", ""), "--out: expected a path, got nothing"),
    ],
)
def test_a_wrong_option_gets_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        request.jobs(_asked(*arguments)[0])
    with pytest.raises(UserError, match="expected one argument"):
        _asked("--model")
